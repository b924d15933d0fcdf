"""The shape of the repository, read from the source of every Python file.

Imports point one way, those inside functions too; nothing changes another module at run time; an
algorithm's flags are known to its own file alone; the root holds the files a reader is sent to.
"""

import ast
import graphlib
import importlib.util
import re

import pytest

import sync

ROOT = sync.ROOT
ALGORITHMS = {name.removesuffix(".py") for name in sync.algorithm_files()}  # found by banners
SCRIPTS = {"sft", "eval", "merge"}
# A module imports modules of its own folder, and those of layers before its own.
LAYERS = (
    "common",
    "sources",
    "data",
    "checkers",
    "rewards",
    "algorithms",
    "scripts",
    "studies",
    "tests",
)
BEFORE_ALGORITHMS = LAYERS[: LAYERS.index("algorithms")]
FOLDERS = ("common", "sources", "checkers", "studies", "tests")
ROOT_FILES = {
    "README.md",
    "data.py",
    "rewards.py",
    "sft.py",
    "eval.py",
    "merge.py",
    "requirements.txt",
    "requirements-cpu.txt",
    "requirements-real.txt",
    "pytest.ini",
    "ruff.toml",
}


# ---------------- reading modules ----------------


def read_modules() -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of the root's scripts and the folders' modules."""
    paths = list(ROOT.glob("*.py"))
    for folder in FOLDERS:
        paths += (ROOT / folder).rglob("*.py")
    modules = {}
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        modules[".".join(parts)] = ast.parse(path.read_text(), path.name)
    return modules


MODULES = read_modules()


def parse_modules(sources: dict[str, str]) -> dict[str, ast.Module]:
    """Modules that only a test has."""
    return {name: ast.parse(source) for name, source in sources.items()}


def layer_of(module: str) -> str:
    """common.rows → common, cgpo → algorithms, eval → scripts."""
    first = module.partition(".")[0]
    if first in ALGORITHMS:
        return "algorithms"
    return "scripts" if first in SCRIPTS else first


def find_module(name: str, modules: dict) -> str | None:
    """The project's module of this name, or None. Tests import each other by their bare names."""
    for candidate in (name, f"tests.{name}"):
        if candidate in modules:
            return candidate
    return None


def imported_names(module: str, tree: ast.Module, modules: dict) -> dict[str, str]:
    """{name in this file: project's module it is, or comes from}, of all its import statements."""
    is_package = any(other.startswith(f"{module}.") for other in modules)
    package = module if is_package else module.rpartition(".")[0]
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                source = find_module(alias.name, modules)
                if source:
                    names[alias.asname or alias.name] = source
        if isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            base = importlib.util.resolve_name(dots + (node.module or ""), package)
            for alias in node.names:
                source = find_module(f"{base}.{alias.name}", modules) or find_module(base, modules)
                if source:
                    names[alias.asname or alias.name] = source
    return names


def imports_of(module: str, tree: ast.Module, modules: dict) -> set[str]:
    """The project's modules that this one imports, by a statement or by import_module("…")."""
    imports = set(imported_names(module, tree, modules).values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                imports.add(find_module(argument.value, modules))
    return imports - {None, module}


def name_of(node: ast.AST) -> str | None:
    """The last name of a dotted expression: import_module of importlib.import_module."""
    return getattr(node, "attr", None) or getattr(node, "id", None)


# ---------------- imports ----------------


def wrong_imports(modules: dict[str, ast.Module]) -> list[str]:
    faults = []
    for module, tree in modules.items():
        layer = layer_of(module)
        if layer not in LAYERS:
            faults.append(f"{module} has no place among the layers")
            continue
        allowed = set(LAYERS[: LAYERS.index(layer)])
        if layer in FOLDERS:
            allowed.add(layer)
        for imported in sorted(imports_of(module, tree, modules)):
            if layer_of(imported) not in allowed:
                faults.append(f"{module} imports {imported}")
    return faults


def import_cycle(modules: dict[str, ast.Module]) -> list[str]:
    """The modules along one cycle of imports; [] where there is none."""
    graph = {module: imports_of(module, tree, modules) for module, tree in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_imports_point_one_way():
    faults = wrong_imports(MODULES)
    assert not faults, "\n".join(faults)


def test_there_is_no_cycle():
    cycle = import_cycle(MODULES)
    assert not cycle, " ← ".join(cycle)


def test_lazy_imports_are_seen():
    modules = parse_modules(
        {
            "common": "",
            "common.rows": "def f():\n    from common.keys import rng\n    import grpo as trainer",
            "common.keys": "import importlib\nrewards = importlib.import_module('rewards')",
            "data": "from common import rows",
            "grpo": "import data\nimport eval",
            "cgpo": "import grpo",
            "rewards": "import json\nimport common.rows",
            "eval": "import merge",
            "merge": "from studies import study",
            "studies.study": "import conftest, eval",
            "tests.conftest": "from studies import study",
            "helpers": "",
        }
    )
    assert wrong_imports(modules) == [
        "common.rows imports grpo",
        "common.keys imports rewards",
        "grpo imports eval",
        "cgpo imports grpo",  # a fork is a copy
        "eval imports merge",
        "merge imports studies.study",
        "studies.study imports tests.conftest",
        "helpers has no place among the layers",
    ]
    assert imports_of("common.rows", modules["common.rows"], modules) == {"common.keys", "grpo"}
    relative = ast.parse("from . import keys\nfrom .keys import rng")
    assert imports_of("common.rows", relative, modules) == {"common.keys"}


def test_a_cycle_is_seen():
    sources = {
        "common.rows": "from common import keys",
        "common.keys": "from common import files",
        "common.files": "",
    }
    assert import_cycle(parse_modules(sources)) == []
    sources["common.files"] = "def f():\n    from common.rows import words_of"
    cycle = import_cycle(parse_modules(sources))
    assert set(cycle) == {"common.rows", "common.keys", "common.files"}


# ---------------- nothing is patched at run time ----------------


def patches(module: str, tree: ast.Module, modules: dict) -> list[str]:
    """Statements that set something inside what was imported from another module.

    grpo.sample = …, grpo.Engine.generate = …, rewards.CHECKERS["x"] = …, setattr(grpo, "sample", …)
    """
    faults = []
    for node in changes(tree, set(imported_names(module, tree, modules))):
        faults.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    return faults


def changes(node: ast.AST, names: set[str]):
    """Yield the nodes in `node` that change something inside what one of the names stands for."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        arguments = ast.walk(node.args)
        names = names - {argument.arg for argument in arguments if isinstance(argument, ast.arg)}

    changed = None
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            changed = node.value
    elif isinstance(node, ast.Call) and name_of(node.func) in ("setattr", "delattr"):
        if isinstance(node.func, ast.Name):  # no method, such as monkeypatch.setattr
            changed = node.args[0]
    if changed is not None and is_imported(changed, names):
        yield node

    for child in ast.iter_child_nodes(node):
        yield from changes(child, names)


def is_imported(node: ast.AST, names: set[str]) -> bool:
    """Is this name, name.x, name.x["y"] or so on with an imported name (common.rows is one)?"""
    while True:
        if ast.unparse(node) in names:
            return True
        if not isinstance(node, (ast.Attribute, ast.Subscript)):
            return False
        node = node.value


def test_no_module_changes_another_at_run_time():
    faults = []
    for module, tree in MODULES.items():
        faults += patches(module, tree, MODULES)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "statement",
    [
        "grpo.sample = sample",
        "grpo.Engine.generate = sample",
        "Engine.generate = sample",
        "rewards.CHECKERS['x'] = sample",
        "grpo.STEPS += 1",
        "del grpo.sample",
        "setattr(grpo, 'sample', sample)",
        "for grpo.STEPS in range(3): pass",
        "keys.rng, x = 1, 2",
        "common.rows.DOMAINS = ()",
    ],
)
def test_a_patch_is_seen(statement):
    modules = parse_modules(
        {"grpo": "", "rewards": "", "common": "", "common.keys": "", "common.rows": ""}
    )
    imports = "import grpo, rewards, common.rows\nfrom common import keys\nfrom grpo import Engine"
    source = f"{imports}\ndef f():\n    {statement}"
    (fault,) = patches("study", ast.parse(source), modules)
    assert fault.startswith("study:5: ")


@pytest.mark.parametrize(
    "statement",
    [
        "args = grpo.parse_args(); args.steps = 3",
        "self.sample = grpo.sample",
        "table[grpo.STEPS] = 1",
        "monkeypatch.setattr(grpo, 'sample', sample)",
        "def f(grpo): grpo.sample = sample",
    ],
)
def test_own_names_and_values_may_change(statement):
    tree = ast.parse(f"import grpo\n{statement}")
    assert patches("study", tree, parse_modules({"grpo": ""})) == []


# ---------------- the root, and what knows of algorithms ----------------


def test_the_root_holds_what_a_reader_is_sent_to():
    suffixes = (".py", ".md", ".txt", ".ini", ".toml")
    names = {path.name for path in ROOT.iterdir() if path.suffix in suffixes}
    assert names == ROOT_FILES | set(sync.algorithm_files())


def test_python_stands_in_the_root_and_in_the_known_folders():
    folders = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert folders == set(FOLDERS)


def own_flags(algorithm: str) -> set[str]:
    """The flags that an algorithm file's add_algo_arguments adds, such as --alpha."""
    flags = set()
    for node in MODULES[algorithm].body:
        if isinstance(node, ast.FunctionDef) and node.name == "add_algo_arguments":
            for call in ast.walk(node):
                if not isinstance(call, ast.Call):
                    continue
                for argument in call.args:
                    value = getattr(argument, "value", None)
                    if isinstance(value, str) and value.startswith("--"):
                        flags.add(value)
    return flags


def mentions(text: str, flag: str) -> list[str]:
    """Where a text names a flag: --head-lr, args.head_lr, "head_lr" looked up in args, head_lr."""
    name = flag.removeprefix("--").replace("-", "_")
    patterns = [
        rf"{flag}(?![\w-])",
        rf"\bargs\.{name}\b",
        rf"""getattr\([\w.]*args, ["']{name}["']""",
        rf"""["']{name}["'] (?:not )?in vars\(""",
        rf"""vars\([\w.]*args\)\[["']{name}["']\]""",
    ]
    if "_" in name:  # no common word
        patterns.append(rf"\b{name}\b")
    return re.findall("|".join(patterns), text)


def test_only_an_algorithm_file_knows_its_flags():
    flags = set()
    for algorithm in ALGORITHMS - {"grpo"}:
        flags |= own_flags(algorithm)
    flags -= own_flags("grpo")
    assert flags, "no fork has a flag of its own: is add_algo_arguments still the place?"
    faults = []
    for module in MODULES:
        if layer_of(module) not in BEFORE_ALGORITHMS:
            continue
        path = ROOT / f"{module.replace('.', '/')}.py"
        if not path.exists():
            path = ROOT / module.replace(".", "/") / "__init__.py"
        for flag in sorted(flags):
            if mentions(path.read_text(), flag):
                faults.append(f"{module} names {flag}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text, flag, is_mention",
    [
        ("see --tau", "--tau", True),
        ("see --tau-max", "--tau", False),
        ("x = args.tau", "--tau", True),
        ("x = args.taur", "--tau", False),
        ("getattr(args, 'tau', 1)", "--tau", True),
        ('if "tau" in vars(args):', "--tau", True),
        ("the constant tau", "--tau", False),
        ('POSITIVE = ("head_lr",)', "--head-lr", True),
    ],
)
def test_a_mention_of_a_flag_is_seen(text, flag, is_mention):
    assert bool(mentions(text, flag)) == is_mention


def hand_made_lists(tree: ast.Module) -> list[int]:
    """Line numbers of literals that name every algorithm file, and so would miss a new fork."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            entries = node.elts
        elif isinstance(node, ast.Dict):
            entries = node.keys
        else:
            continue
        names = set()
        for entry in entries:
            if isinstance(entry, ast.Tuple) and entry.elts:  # of pytest.mark.parametrize
                entry = entry.elts[0]
            value = entry.value if isinstance(entry, ast.Constant) else name_of(entry)
            if isinstance(value, str):
                names.add(value.removesuffix(".py"))
        if ALGORITHMS <= names:
            lines.append(node.lineno)
    return lines


def test_no_test_lists_the_algorithm_files_by_hand():
    faults = []
    for module, tree in MODULES.items():
        if layer_of(module) == "tests":
            faults += [f"{module}:{line}" for line in hand_made_lists(tree)]
    assert not faults, "\n".join(faults)


def test_a_hand_made_list_is_seen():
    names = sorted(ALGORITHMS)
    files = [f"{name}.py" for name in names]
    cases = ", ".join(f"({name}, 1)" for name in names)
    source = f"a = {names}\nb = {files}\nc = [{cases}]\nd = {names[1:]}\ne = {dict.fromkeys(files)}"
    assert hand_made_lists(ast.parse(source)) == [1, 2, 3, 5]
