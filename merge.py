"""Merge experts that were trained from one base: average, task arithmetic, TIES, SCE, and DARE.

θ_0 is the base (in M2RL the SFT model), θ_i are the experts, τ_i = θ_i − θ_0 their task vectors,
w_i the --weights (default: 1 each).

    average   Σ w_i θ_i / Σ w_i                                         (Wortsman et al. 2022)
    ta        θ_0 + λ Σ w_i τ_i             task arithmetic (Ilharco et al. 2022), λ = 1 in M2RL
    ties      θ_0 + λ Σ w_i m_i τ̂_i / Σ w_i m_i                         (Yadav et al. 2023)
              trim: τ̂_i keeps the share --density of the whole model's τ_i, those with the largest
                    |τ_i|, and is 0 elsewhere. It keeps all that equal the smallest kept one. If
                    fewer are not 0, it keeps all of those.
              elect: the sign of Σ w_i τ̂_i.
              m_i = 1 where τ̂_i has the elected sign.
    sce       θ_0 + λ Σ w_i m_i τ_i / Σ w_i m_i, tensor by tensor       (Wan et al. 2025)
              select: only the share --density of the positions, those with the largest variance
                      over the experts (1: all of them, as in M2RL's script). Variances are rounded
                      to fp32, and all that equal the smallest selected one are selected.
              calculate: w_i = mean τ_i² / Σ_j mean τ_j².
              erase: m_i = 1 where τ_i ≠ 0 has the sign of Σ τ_i; a sum of 0 counts as +.
    --dare P  before ta or ties: each entry of τ_i becomes 0 with probability P, and is divided by
              1 − P otherwise (Yu et al. 2024)

The base's value stays where no expert has the elected sign. Everything is computed in fp32 and
rounded once, when it is written.

    python merge.py --base toy --experts runs/math runs/code --method ties --out merged

A model's folder may have any number of safetensors files. They are read in pieces, and the pieces
are written in the same order, so memory does not grow with the model. For the same reason TIES's
exact threshold comes from two counting passes over the bits of |τ_i|, not from a sort.

Suffixes: K experts, M models (the base, then the experts), N elements of a piece.
"""

import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.cli import Parser, add_flags, finite, fraction, run_main, seed, share
from common.checkpoints import umask
from common.errors import UserError
from common.files import check_output_folder, write_text
from common.keys import rng
from common.models import OLD_BUFFERS, WRAPPERS, from_pretrained
from sources.models import resolve_model

PIECE = 2**20  # elements of a tensor that are in memory at once, per model
SHARD_BYTES = 4 << 30  # a larger model is written into several files
DTYPES = {  # safetensors' code: torch's type
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MOST_LOST = 0.1  # of the shifts; if more are rounded away, the report says so
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
# The files that hold a tokenizer's vocabulary, the one that transformers prefers first.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken")
# What a model's folder has besides weights, as glob patterns. --out gets the base's.
CONFIG_FILES = ("config.json", "generation_config.json")
# If the base has no tokenizer, --out gets that of the first expert which has one.
TOKENIZER_PARTS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)


# ---------------- reading ----------------


class Place(NamedTuple):
    """Where a tensor's elements begin: an open file, and an offset in it in bytes."""

    file: object
    offset: int


class Checkpoint:
    """The tensors of a model's folder. Only the headers of its safetensors files are read at first.

    dtype, shape and place are dicts by the tensor's name in transformers, which is not always the
    name in the file: see name_in_model. read() reads elements of a tensor. A tensor that is tied to
    another one, and equal to it, is left out. Raises UserError if there is no such model, or if its
    files are not whole safetensors files.
    """

    def __init__(self, name: str):
        self.folder = Path(resolve_model(name, fetch=True))
        self.dtype = {}
        self.shape = {}
        self.place = {}
        layout = layout_of(self.folder)
        for path in safetensors_files(self.folder):
            self.add_file(path, layout)
        self.check_complete(layout)
        for tensor, original in layout.tied.items():
            if tensor in self.shape and self.equal(tensor, original):
                del self.dtype[tensor], self.shape[tensor], self.place[tensor]

    def add_file(self, path: Path, layout) -> None:
        """Add the tensors of one safetensors file. Raises UserError."""
        if not path.is_file():
            raise UserError(
                f"{path} is missing, or no file: merge.py reads Hugging Face folders with "
                "safetensors files"
            )
        file = open(path, "rb", buffering=0)
        header, data_start = read_header(path, file)
        prefixes = {match[0] for match in map(WRAPPERS.match, header) if match}
        for prefix in sorted(prefixes):
            print(f"{path}: the names of its tensors begin with {prefix}, which is left out")
        for name_in_file, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: {name_in_file} is of type {entry['dtype']}; "
                    f"merge.py reads {' '.join(DTYPES)}"
                )
            tensor = name_in_model(name_in_file, layout)
            if tensor is None:
                continue
            if tensor in self.place:
                raise UserError(f"{path}: {name_in_file} is the second tensor for {tensor}")
            shape = tuple(entry["shape"])
            expected = layout.shape.get(tensor, shape)
            if shape != expected:
                raise UserError(
                    f"{path}: {name_in_file} is {list(shape)}, and by config.json {list(expected)}"
                )
            self.dtype[tensor] = DTYPES[entry["dtype"]]
            self.shape[tensor] = shape
            self.place[tensor] = Place(file, data_start + entry["data_offsets"][0])

    def check_complete(self, layout) -> None:
        """Raise UserError if the files and config.json do not have the same tensors.

        A model whose files name some tensors in another way than transformers is left alone.
        """
        if not layout.shape:
            return
        lacking = layout.shape.keys() - self.shape.keys() - layout.tied.keys()
        extra = self.shape.keys() - layout.shape.keys()
        in_common = self.shape.keys() & layout.shape.keys()
        if bool(lacking) != bool(extra) or not in_common:
            what = "lack" if lacking else "have a"
            raise UserError(
                f"{self.folder}: its files {what} tensor {min(lacking or extra)}, by its "
                "config.json"
            )

    def size(self, tensor: str) -> int:
        """A tensor's number of elements."""
        return int(np.prod(self.shape[tensor]))

    def read(self, tensor: str, start: int, stop: int):
        """[stop − start]: a tensor's elements start … stop − 1, in the file's type."""
        file, offset = self.place[tensor]
        dtype = self.dtype[tensor]
        buffer = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        file.seek(offset + start * dtype.itemsize)
        unread = memoryview(buffer.numpy())
        while len(unread):  # the system may return less than was asked for
            received = file.readinto(unread)
            if not received:
                raise UserError(f"{file.name} ends within {tensor}: was it changed meanwhile?")
            unread = unread[received:]
        return buffer.view(dtype)

    def equal(self, tensor: str, other: str) -> bool:
        """Have two tensors of this model the same elements?"""
        if self.shape[tensor] != self.shape.get(other) or self.dtype[tensor] != self.dtype[other]:
            return False
        size = self.size(tensor)
        for start in range(0, size, PIECE):
            stop = min(start + PIECE, size)
            if not torch.equal(self.read(tensor, start, stop), self.read(other, start, stop)):
                return False
        return True


def safetensors_files(folder: Path) -> list[Path]:
    """The files of a model's weights. A single file goes before an index, as in transformers.

    Raises UserError for a broken index.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    try:
        file_names = json.loads(index.read_text())["weight_map"].values()
        return sorted({folder / name for name in file_names})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of safetensors files") from None


def read_header(path: Path, file) -> tuple[dict, int]:
    """({tensor: {"dtype", "shape", "data_offsets"}}, first tensor's offset in bytes) of a file.

    A safetensors file has the header's length in 8 bytes, the header in JSON, and the tensors'
    bytes, each where the one before it ends. Raises UserError for a file of which that is not true.
    """
    file_bytes = path.stat().st_size
    header_bytes = int.from_bytes(file.read(8), "little")
    data_start = 8 + header_bytes
    try:
        header = json.loads(file.read(header_bytes)) if header_bytes < file_bytes else {}
        header.pop("__metadata__", None)
        is_complete = bytes_of_tensors(header) == file_bytes - data_start
    except (ValueError, KeyError, TypeError, AttributeError):
        is_complete = False
    if not is_complete:
        raise UserError(f"{path} is cut off, or no safetensors file")
    return header, data_start


def bytes_of_tensors(header: dict) -> int:
    """How many bytes the tensors of a file's header take. Raises ValueError if it has none.

    Also if a tensor does not begin where the one before it ends, or if its bytes are not its
    shape's: reading it would give a neighbour's numbers.
    """
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        start, stop = entry["data_offsets"]
        whole = all(type(number) is int for number in (start, stop, *entry["shape"]))
        if not whole or start != end or min(entry["shape"], default=0) < 0:
            raise ValueError(entry)
        dtype = DTYPES.get(entry["dtype"])  # None for a type that merge.py does not read
        if dtype and stop - start != dtype.itemsize * math.prod(entry["shape"]):
            raise ValueError(entry)
        end = stop
    if not header:
        raise ValueError(header)
    return end


class Layout(NamedTuple):
    """What transformers calls a model's tensors; all is empty if it does not know the model."""

    shape: dict[str, tuple[int, ...]]  # of each tensor
    prefix: str  # of the names of the model's body, such as "transformer"
    tied: dict[str, str]  # {tensor: the one that it is tied to, by config.json}


def layout_of(folder: Path) -> Layout:
    """The layout of the folder's model.

    Raises UserError if there is no config.json that can be read, or if it ties tensors in a model
    that is no causal language model.
    """
    config = from_pretrained(AutoConfig, str(folder))
    is_tied = getattr(config, "tie_word_embeddings", False)
    try:
        with torch.device("meta"):  # no memory
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # what a wrong configuration raises is up to the model
        if is_tied:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{folder}: {reason}: merge.py knows causal language models") from None
        return Layout({}, "", {})

    shape = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first_name[id(parameter)] != name:
            tied[name] = first_name[id(parameter)]
    return Layout(shape, model.base_model_prefix, tied if is_tied else {})


def name_in_model(name: str, layout: Layout) -> str | None:
    """The name in transformers of a tensor in a file; None for a buffer that it no longer saves.

    Old files on the hub lack the prefix of the model's body ("h.0" for "transformer.h.0"), and have
    masks among their weights. torch.compile and others put a prefix before all names. A name that
    stays unknown is kept.
    """
    name = WRAPPERS.sub("", name)
    if not layout.shape or name in layout.shape:
        return name
    with_prefix = f"{layout.prefix}.{name}"
    if with_prefix in layout.shape:
        return with_prefix
    return None if OLD_BUFFERS.search(name) else name


# ---------------- checks, before anything is written ----------------


def check_out(out: Path, models: list[Checkpoint]) -> None:
    """Raise UserError unless --out is a new or an empty folder, and none of the models'."""
    if out.resolve() in [model.folder.resolve() for model in models]:
        raise UserError(f"--out {out} is one of the models to merge: choose another folder")
    if out.is_symlink():
        is_free = False
    elif out.exists():
        is_free = out.is_dir() and not any(out.iterdir()) and not out.samefile(".")
    else:
        is_free = True
    if not is_free:
        raise UserError(f"--out {out} exists and is not an empty folder: choose another")


def check_tensors(base: Checkpoint, expert: Checkpoint) -> None:
    """Raise UserError unless the expert has the base's tensors, in the same shapes."""
    lacking = base.shape.keys() - expert.shape.keys()
    extra = expert.shape.keys() - base.shape.keys()
    if lacking or extra:
        raise UserError(
            f"{expert.folder} lacks {len(lacking)} of the base's tensors and has {len(extra)} "
            f"that the base lacks, such as {min(lacking or extra)} (base: {base.folder})"
        )
    for name, shape in base.shape.items():
        if expert.shape[name] != shape:
            raise UserError(
                f"{name} is {list(expert.shape[name])} in {expert.folder} and {list(shape)} in "
                f"the base, {base.folder}: another architecture or vocabulary"
            )
        if expert.dtype[name].is_floating_point != base.dtype[name].is_floating_point:
            raise UserError(
                f"{name} is {expert.dtype[name]} in {expert.folder} and {base.dtype[name]} in "
                f"the base, {base.folder}"
            )


# What may differ between two configurations that compute the same
INERT_FIELDS = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def config_differences(base: Checkpoint, expert: Checkpoint) -> str:
    """The fields of config.json in which an expert differs from the base, as a text."""
    fields = []
    for model in (base, expert):
        fields.append(from_pretrained(AutoConfig, str(model.folder)).to_dict())
    differences = []
    for name in sorted(fields[0].keys() | fields[1].keys()):
        values = [config.get(name) for config in fields]
        if name not in INERT_FIELDS and not name.startswith("_") and values[0] != values[1]:
            differences.append(f"{name} {values[1]!r:.40}, not {values[0]!r:.40}")
    return "; ".join(differences)


def tokenizer_file(folder: Path) -> Path | None:
    """The file with the tokenizer's vocabulary; None if the folder has no tokenizer."""
    for pattern in TOKENIZER_FILES:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                return path
    return None


def check_vocabulary(base: Checkpoint, expert: Checkpoint) -> None:
    """Raise UserError if base and expert have tokenizers that give a token different ids."""
    base_file = tokenizer_file(base.folder)
    expert_file = tokenizer_file(expert.folder)
    if base_file is None or expert_file is None:
        return
    if base_file.read_bytes() == expert_file.read_bytes():
        return
    base_ids = from_pretrained(AutoTokenizer, str(base.folder)).get_vocab()
    expert_ids = from_pretrained(AutoTokenizer, str(expert.folder)).get_vocab()
    for token in sorted(base_ids.keys() | expert_ids.keys()):
        if base_ids.get(token) != expert_ids.get(token):
            raise UserError(
                f"{expert.folder} has another vocabulary than the base: {token!r} is "
                f"{expert_ids.get(token)} there and {base_ids.get(token)} in the base"
            )


# ---------------- the maths ----------------


def weighted_sum(x_KN, weight_K: list[float]):
    """Σ w_k x_k, [N]. A weight of 0 adds nothing, not even a rounding error."""
    nonzero = [k for k, weight in enumerate(weight_K) if weight]
    if not nonzero:
        return torch.zeros_like(x_KN[0])
    first = nonzero[0]
    total_N = x_KN[first] * weight_K[first]
    for k in nonzero[1:]:
        total_N.add_(x_KN[k], alpha=weight_K[k])
    return total_N


def dare(tau_KN, draws_K: list[torch.Generator], rate: float):
    """[K, N]: entries are 0 with probability `rate`, and divided by 1 − rate otherwise.

    draws_K: the experts' random streams. Yu et al. 2024.
    """
    N = tau_KN.shape[1]
    kept_KN = torch.stack([torch.rand(N, generator=draw) >= rate for draw in draws_K])
    return tau_KN * kept_KN / (1 - rate)


def elect(base_N, tau_KN, sign_weight_K: list[float], weight_K: list[float], lam: float, zero: int):
    """The last step of TIES and SCE: the weighted mean of the entries that have the elected sign.

    sign_weight_K: the weights of the sum whose sign is elected. zero: the sign that is elected if
    that sum is 0. Returns (merged [N], whether each entry has the elected sign [K, N]).
    """
    sign_N = weighted_sum(tau_KN, sign_weight_K).sign()
    sign_N[sign_N == 0] = zero
    agree_KN = tau_KN * sign_N > 0  # m_i
    share_N = weighted_sum(agree_KN.float(), weight_K)  # Σ w_i m_i
    mean_N = weighted_sum(tau_KN * agree_KN, weight_K) / share_N
    return base_N + lam * mean_N.where(share_N > 0, 0.0), agree_KN


def count_true(flag_KN):
    """[K]: number of true entries per expert. (flag_KN.sum(1) takes seven times as long.)"""
    return torch.stack([row_N.count_nonzero() for row_N in flag_KN])


def variance(x_KN):
    """[N]: the variance over the experts, without Bessel's correction.

    It is computed in fp64 and rounded to fp32, so that variances which are equal in exact
    arithmetic are equal here, in whatever order the experts have their values.
    """
    x_KN = x_KN.double()
    return (x_KN - x_KN.mean(0)).square_().mean(0).float()


LOW_BITS = 15  # fp32 without its sign is 31 bits: 16 high ones and 15 low ones
LOW_MASK = 2**LOW_BITS - 1


def kth_largest(pieces, count: int) -> list[float]:
    """[K]: the `count`-th largest value of each of K rows, exactly.

    pieces() yields the rows piece by piece [K, N], in fp32 and not negative; it is called twice.
    Read as integers, the bits of such numbers have the numbers' order. So the first pass counts
    the values by their high bits, which gives the result's high bits. The second pass takes only
    the values that have these high bits, and counts them by their low bits.
    """

    def high_bits(k, bits_N):
        return bits_N >> LOW_BITS

    high_K = []  # the result's high bits
    place_K = []  # of the values with these high bits, the result is the place-th largest
    for counts in count_values(pieces, high_bits, 2**16):
        high, above = bin_of_kth_largest(counts, count)
        high_K.append(high)
        place_K.append(count - above)

    def low_bits(k, bits_N):
        return bits_N[bits_N >> LOW_BITS == high_K[k]] & LOW_MASK

    bits_K = []
    for k, counts in enumerate(count_values(pieces, low_bits, 2**LOW_BITS)):
        low, _ = bin_of_kth_largest(counts, place_K[k])
        bits_K.append((high_K[k] << LOW_BITS) | low)
    return torch.tensor(bits_K, dtype=torch.int32).view(torch.float32).tolist()


def count_values(pieces, pick, bins: int) -> list:
    """[K] tensors [bins]: how often each integer below `bins` occurs in pick(k, row k's bits).

    pieces: as in kth_largest(). pick(k, bits_N) returns integers from row k's bits.
    """
    total_K = []
    for x_KN in pieces():
        counts_K = []
        for k, bits_N in enumerate(x_KN.view(torch.int32)):
            counts_K.append(torch.bincount(pick(k, bits_N), minlength=bins))
        if not total_K:
            total_K = counts_K
            continue
        for total, counts in zip(total_K, counts_K, strict=True):
            total.add_(counts)
    return total_K


def bin_of_kth_largest(counts, k: int) -> tuple[int, int]:
    """(the bin that holds the k-th largest counted value, number of values in higher bins)."""
    from_above = counts.flip(0).cumsum(0)  # [j]: values in the j + 1 highest bins
    j = int((from_above < k).sum())
    above = int(from_above[j - 1]) if j else 0
    return len(counts) - 1 - j, above


# ---------------- merging ----------------


class Merge:
    """One merge: it reads the models in pieces, merges them, and counts for the report."""

    def __init__(self, base: Checkpoint, experts: list[Checkpoint], args):
        self.base = base
        self.experts = experts
        self.models = [base, *experts]
        self.args = args
        # in the order of the base's files, so that reading is sequential
        self.names = sorted(
            base.shape, key=lambda name: (base.place[name].file.name, base.place[name].offset)
        )
        self.floating = [name for name in self.names if base.dtype[name].is_floating_point]
        self.size = {name: base.size(name) for name in base.shape}
        self.elements = sum(self.size[name] for name in self.floating)
        self.bar = tqdm(
            total=self.count_passes() * self.bytes_of_a_pass(),
            unit="B",
            unit_scale=True,
            desc=args.method,
            mininterval=0.5,
        )

        # for the report
        K = len(experts)
        self.dots_KK = torch.zeros(K, K, dtype=torch.float64)  # τ_i · τ_j
        self.kept_K = torch.zeros(K, dtype=torch.long)
        self.agreeing_K = torch.zeros(K, dtype=torch.long)
        self.base_square = 0.0  # ‖θ_0‖²
        self.moved = 0  # entries that the method moves away from the base's value
        self.lost = 0  # those of them that are the base's value again once rounded

    def count_passes(self) -> int:
        """How often the models are read: once to merge, and before that for thresholds and w."""
        needs_threshold = self.args.density < 1
        if self.args.method == "ties":
            return 3 if needs_threshold else 1  # two for the threshold
        if self.args.method == "sce":
            return 4 if needs_threshold else 2  # one for w, two for the threshold
        return 1

    def bytes_of_a_pass(self) -> int:
        """Bytes of all models' floating-point tensors."""
        total = 0
        for model in self.models:
            for name in self.floating:
                total += self.size[name] * model.dtype[name].itemsize
        return total

    def pieces(self, names: list[str]):
        """Yield (θ_0 [N], τ after DARE [K, N], θ [K, N]) in fp32, piece by piece.

        Raises UserError for a value that is not finite.
        """
        for name in names:
            draws_K = self.dare_generators(name) if self.args.dare else []
            for start in range(0, self.size[name], PIECE):
                theta_MN = self.read_piece(name, start, min(start + PIECE, self.size[name]))
                base_N = theta_MN[0]
                theta_KN = theta_MN[1:]
                tau_KN = theta_KN - base_N
                if self.args.dare:
                    tau_KN = dare(tau_KN, draws_K, self.args.dare)
                yield base_N, tau_KN, theta_KN

    def dare_generators(self, name: str) -> list[torch.Generator]:
        """A random stream per expert, a function of the seed, the expert's index and the tensor."""
        generators = []
        for k in range(len(self.experts)):
            seed = rng(self.args.seed, "dare", k, name).integers(2**62)
            generators.append(torch.Generator().manual_seed(int(seed)))
        return generators

    def read_piece(self, name: str, start: int, stop: int):
        """[M, N]: elements start … stop − 1 of the models' tensors, in fp32. Raises UserError."""
        rows = [model.read(name, start, stop) for model in self.models]
        self.bar.update(sum(row_N.nbytes for row_N in rows))
        theta_MN = torch.empty(len(rows), stop - start)
        for theta_N, row_N in zip(theta_MN, rows, strict=True):
            theta_N.copy_(row_N)
        for theta_N, model in zip(theta_MN, self.models, strict=True):
            # The sum is quick. If it is finite, all values are; if not, it may have overflowed.
            if not theta_N.sum().isfinite() and not theta_N.isfinite().all():
                raise UserError(
                    f"{name} in {model.folder} has a value that is not finite; nothing was written"
                )
        return theta_MN

    def trim_thresholds(self) -> list[float]:
        """[K]: for each expert the smallest |τ_i| that TIES keeps; 0 for the other methods."""
        if self.args.method != "ties" or self.args.density == 1:
            return [0.0] * len(self.experts)

        def magnitudes():
            for _, tau_KN, _ in self.pieces(self.floating):
                yield tau_KN.abs()

        return kth_largest(magnitudes, max(1, round(self.args.density * self.elements)))

    def select(self, name: str) -> tuple[float, list[float]]:
        """SCE: (the smallest variance over the experts that is selected, w_i [K]) of one tensor."""

        def variances():
            for _, tau_KN, _ in self.pieces([name]):
                yield variance(tau_KN)[None]

        lowest = 0.0
        if self.args.density < 1:
            count = max(1, round(self.args.density * self.size[name]))
            lowest = kth_largest(variances, count)[0]
        square_K = torch.zeros(len(self.experts), dtype=torch.float64)
        for _, tau_KN, _ in self.pieces([name]):
            square_K += keep_selected(tau_KN, lowest).double().square().sum(1)
        return lowest, (square_K / square_K.sum()).nan_to_num().tolist()

    def merged(self, name: str, threshold_K1):
        """Yield (θ_0 [N], merged [N]), piece by piece of one tensor, in fp32.

        threshold_K1: trim_thresholds(), as a column.
        """
        method = self.args.method
        lam = self.args.lam
        weight_K = self.args.weights
        if method == "sce":
            lowest, weight_K = self.select(name)
        for base_N, tau_KN, theta_KN in self.pieces([name]):
            self.count_norms(base_N, theta_KN - base_N if self.args.dare else tau_KN)
            if method == "average":
                total_N = weighted_sum(tau_KN, weight_K)
                agree_KN = tau_KN * total_N > 0
                merged_N = weighted_sum(theta_KN, weight_K) / sum(weight_K)
            elif method == "ta":
                total_N = weighted_sum(tau_KN, weight_K)
                agree_KN = tau_KN * total_N > 0
                merged_N = base_N + lam * total_N
            elif method == "ties":
                tau_KN = tau_KN * (tau_KN.abs() >= threshold_K1)
                merged_N, agree_KN = elect(base_N, tau_KN, weight_K, weight_K, lam, zero=0)
            else:
                tau_KN = keep_selected(tau_KN, lowest)
                ones_K = [1.0] * len(tau_KN)
                merged_N, agree_KN = elect(base_N, tau_KN, ones_K, weight_K, lam, zero=1)
            self.kept_K += count_true(tau_KN != 0)
            self.agreeing_K += count_true(agree_KN)
            yield base_N, merged_N

    def count_norms(self, base_N, tau_KN) -> None:
        """Add a piece to the report's dot products. tau_KN: before DARE."""
        self.dots_KK += (tau_KN @ tau_KN.T).double()
        self.base_square += base_N.square().sum().item()

    def count_lost(self, base_N, merged_N, written_N) -> None:
        """Count what rounding to the file's type does to a piece."""
        moved_N = merged_N != base_N
        self.moved += int(moved_N.count_nonzero())
        self.lost += int((moved_N & (written_N.float() == base_N)).count_nonzero())

    def integers(self, name: str):
        """[N]: a tensor of integers. Raises UserError if an expert's differs from the base's."""
        base_N = self.base.read(name, 0, self.size[name])
        for expert in self.experts:
            if not torch.equal(expert.read(name, 0, self.size[name]), base_N):
                raise UserError(
                    f"{name} in {expert.folder} holds other integers than the base's, which no "
                    "method merges"
                )
        return base_N

    def report(self) -> dict:
        """What merge.json says about the models.

        base_norm    ‖θ_0‖
        parameters   number of floating-point elements per model
        lost         share of the merged shifts that the type of the written weights rounds away
        cosines      [K, K], of the task vectors before DARE
        experts      [K] of:
            folder
            norm     ‖τ_i‖ before DARE
            kept     share of τ_i's entries that are not 0 after DARE, trimming and selection
            agree    share of the kept entries that have the elected sign
        """
        norm_K = self.dots_KK.diagonal().sqrt()
        cosine_KK = (self.dots_KK / (norm_K[:, None] * norm_K)).nan_to_num().clamp(-1, 1)
        experts = []
        for k, expert in enumerate(self.experts):
            kept = int(self.kept_K[k])
            experts.append(
                {
                    "folder": str(expert.folder),
                    "norm": float(norm_K[k]),
                    "kept": kept / self.elements,
                    "agree": int(self.agreeing_K[k]) / max(kept, 1),
                }
            )
        return {
            "base_norm": self.base_square**0.5,
            "parameters": self.elements,
            "lost": self.lost / max(self.moved, 1),
            "cosines": cosine_KK.tolist(),
            "experts": experts,
        }


def keep_selected(tau_KN, lowest: float):
    """[K, N]: τ where its variance over the experts is at least `lowest`, else 0 (SCE's select)."""
    if not lowest:
        return tau_KN
    return tau_KN * (variance(tau_KN) >= lowest)


# ---------------- writing ----------------


def write_model(merge: Merge, folder: Path) -> None:
    """Write the merged model's files. Raises UserError."""
    written_dtype = DTYPES.get(merge.args.dtype)  # None for "base"
    dtype = {}
    for name in merge.names:
        dtype[name] = merge.base.dtype[name]
        if written_dtype is not None and name in merge.floating:
            dtype[name] = written_dtype
    tensor_bytes = {name: merge.size[name] * dtype[name].itemsize for name in merge.names}

    threshold_K1 = torch.tensor(merge.trim_thresholds())[:, None]
    shards = split_into_shards(merge.names, tensor_bytes)
    for file_name, names in shards.items():
        write_shard(merge, folder / file_name, names, dtype, threshold_K1)
    if len(shards) > 1:
        write_index(folder, shards, sum(tensor_bytes.values()))

    copy_files(merge.base.folder, CONFIG_FILES, folder)
    for model in merge.models:
        if tokenizer_file(model.folder):
            copy_files(model.folder, TOKENIZER_PARTS, folder)
            break
    if written_dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("torch_dtype", None)  # the older name of "dtype"
        config["dtype"] = str(written_dtype).removeprefix("torch.")
        write_text(folder / "config.json", json.dumps(config, indent=1))


def copy_files(source: Path, patterns: tuple[str, ...], out: Path) -> None:
    """Copy the files of a folder whose paths in it match one of the glob patterns."""
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                copy = out / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def split_into_shards(names: list[str], tensor_bytes: dict) -> dict[str, list[str]]:
    """{file name: names of its tensors}, in order.

    A file has at most SHARD_BYTES of tensors, or a single tensor that is larger.
    """
    shards = [[]]
    shard_bytes = 0
    for name in names:
        if shards[-1] and shard_bytes + tensor_bytes[name] > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += tensor_bytes[name]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    file_names = [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    return dict(zip(file_names, shards, strict=True))


def write_shard(merge: Merge, path: Path, names: list[str], dtype: dict, threshold_K1) -> None:
    """Write one safetensors file. Each piece of a tensor is written as soon as it is merged.

    dtype: {tensor: the type in the file}. Raises UserError.
    """
    header = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        stop = start + merge.size[name] * dtype[name].itemsize
        header[name] = {
            "dtype": DTYPE_CODES[dtype[name]],
            "shape": merge.base.shape[name],
            "data_offsets": [start, stop],
        }
        start = stop
    header_json = json.dumps(header).encode()
    padding = -len(header_json) % 8  # so that the data are aligned to 8 bytes
    header_json = header_json.ljust(len(header_json) + padding)

    with open(path, "wb") as file:
        file.write(len(header_json).to_bytes(8, "little") + header_json)
        for name in names:
            if name not in merge.floating:
                file.write(merge.integers(name).view(torch.uint8).numpy())
                continue
            for base_N, merged_N in merge.merged(name, threshold_K1):
                written_N = rounded(merged_N, dtype[name], name)
                merge.count_lost(base_N, merged_N, written_N)
                file.write(written_N.view(torch.uint8).numpy())


def rounded(merged_N, dtype: torch.dtype, name: str):
    """[N]: a merged piece in the type of the file. Raises UserError if it is not finite."""
    piece_N = merged_N.to(dtype)
    if not piece_N.sum(dtype=torch.float32).isfinite() and not piece_N.isfinite().all():
        raise UserError(
            f"{name} is not finite once merged and of type {dtype}; nothing was written"
        )
    return piece_N


def write_index(folder: Path, shards: dict[str, list[str]], total_bytes: int) -> None:
    """Write the index by which transformers and vLLM find tensors that stand in several files."""
    weight_map = {}
    for file_name, names in shards.items():
        for name in names:
            weight_map[name] = file_name
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


# ---------------- the command ----------------


def parse_args(argv: list[str] | None = None):
    """The flags, checked. A wrong flag ends the script."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--base",
        required=True,
        help="model that the experts were trained from: a folder, a run, a hub id, or toy",
    )
    add(
        "--experts",
        nargs="+",
        required=True,
        help="folders of the experts; of a run's folder the last checkpoint is used",
    )
    add(
        "--method",
        choices=["average", "ta", "ties", "sce"],
        required=True,
        help="how to merge: one of the formulas above",
    )
    add(
        "--dare",
        type=fraction,
        default=0.0,
        help="probability P with which DARE drops an entry; 0: no DARE; M2RL: 0.8",
    )
    add(
        "--lambda",
        type=finite,
        default=1.0,
        dest="lam",
        help="λ, by which the merged task vector is multiplied; average has no λ",
    )
    add(
        "--density",
        type=share,
        default=None,
        help="share of the entries that ties keeps (default: 0.2) or sce selects (default: 1)",
    )
    add(
        "--weights",
        type=finite,
        nargs="+",
        default=[],
        help="the weights w_i, one per expert (default: 1 each); sce calculates its own",
    )
    add(
        "--dtype",
        choices=["base", "F32", "BF16", "F16"],
        default="base",
        help="type of the written weights; base: the type that they have in the base",
    )
    add("--seed", type=seed, default=0, help="seed of DARE's random numbers")
    add_flags(parser, "--threads")
    add("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args) -> None:
    """Check the flags against each other, and set the defaults that depend on --method."""
    if args.dare and args.method not in ("ta", "ties"):
        parser.error(f"--dare {args.dare}: it goes before ta or ties only")
    if args.density is not None and args.method not in ("ties", "sce"):
        parser.error(f"--density {args.density}: it is a flag of ties or sce only")
    if args.method == "average" and args.lam != 1:
        parser.error(f"--lambda {args.lam}: an average has no λ; use --method ta with --weights")
    if args.weights and args.method == "sce":
        parser.error(f"--weights {args.weights}: sce calculates its own")
    if args.weights and len(args.weights) != len(args.experts):
        parser.error(f"--weights {args.weights}: give one per expert ({len(args.experts)})")
    if args.density is None:
        args.density = 0.2 if args.method == "ties" else 1.0
    if not args.weights:
        args.weights = [1.0] * len(args.experts)
    if args.method != "ta" and (min(args.weights) < 0 or not sum(args.weights)):
        parser.error(f"--weights {args.weights}: must not be negative, nor all 0, except with ta")


def print_report(args, report: dict, out: Path) -> None:
    """Print a table with one row per expert. report: Merge.report() and the "seconds"."""
    print(
        f"{args.method} of {len(report['experts'])} experts, "
        f"{report['parameters'] / 1e6:.2f} M parameters, {report['seconds']:.1f} s"
    )
    print(f"{'expert':<40}  ‖τ‖ / ‖θ_0‖    kept   agree   cosines")
    for expert, cosines in zip(report["experts"], report["cosines"], strict=True):
        base_norm = report["base_norm"]
        relative = expert["norm"] / base_norm if base_norm else np.nan
        row = (
            f"{expert['folder'][-40:]:<40}  {relative:11.5f}  "
            f"{expert['kept']:6.1%}  {expert['agree']:6.1%}   "
        )
        print(row + " ".join(f"{cosine:+.2f}" for cosine in cosines))
    if report["lost"] > MOST_LOST:
        print(
            f"note: the type of the written weights rounds {report['lost']:.0%} of the shifts away "
            "(--dtype F32 keeps them)"
        )
    if tokenizer_file(out) is None:
        print("note: neither the base nor an expert has a tokenizer: the merged model has none")
    print(f"model {out}")


def main(argv: list[str] | None = None) -> Path:
    """Write --out and return it. It appears by one rename, so it is complete or it is not there.

    Raises UserError for models that do not fit together, before anything is written.
    """
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    check_output_folder("--out", args.out)
    out = Path(args.out)
    base = Checkpoint(args.base)
    experts = [Checkpoint(name) for name in args.experts]
    check_out(out, [base, *experts])
    for expert in experts:
        check_tensors(base, expert)
        check_vocabulary(base, expert)
        differences = config_differences(base, expert)
        if differences:
            print(f"note: {expert.folder} has another config.json than the base: {differences}")

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    temporary.chmod(0o777 & ~umask())  # mkdtemp makes it readable by its owner alone
    try:
        merge = Merge(base, experts, args)
        write_model(merge, temporary)
        merge.bar.close()
        report = {name: value for name, value in vars(args).items() if name != "threads"}
        report |= merge.report()
        report["seconds"] = time.perf_counter() - started
        write_text(temporary / "merge.json", json.dumps(report, indent=1))
        if out.exists():
            out.rmdir()  # check_out() has seen that it is empty
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print_report(args, report, out)
    return out


if __name__ == "__main__":
    run_main(main, "nothing was written")
