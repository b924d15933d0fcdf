"""Merge experts that were trained from one base: average, task arithmetic, TIES, SCE, and DARE.

θ_0 is the base (in M2RL the SFT model), θ_i are the experts, τ_i = θ_i − θ_0 their task vectors,
w_i the --weights (1 unless given).

    average   Σ w_i θ_i / Σ w_i                                         (Wortsman et al. 2022)
    ta        θ_0 + λ Σ w_i τ_i             task arithmetic (Ilharco et al. 2022), λ = 1 in M2RL
    ties      θ_0 + λ Σ w_i m_i τ̂_i / Σ w_i m_i                         (Yadav et al. 2023)
              trim: τ̂_i keeps the --density largest |τ_i| of the whole model and is 0 elsewhere. It
                    keeps all non-zeros where they are fewer, and all that equal the threshold.
              elect: the sign of Σ w_i τ̂_i.
              m_i = 1 where τ̂_i has the elected sign.
    sce       θ_0 + λ Σ w_i m_i τ_i / Σ w_i m_i, tensor by tensor       (Wan et al. 2025)
              select: only the --density positions with the largest variance over the experts
                      (1: all of them, as in M2RL's script).
              calculate: w_i = mean τ_i² / Σ_j mean τ_j².
              erase: m_i = 1 where τ_i ≠ 0 has the sign of Σ τ_i; a sum of 0 counts as +.
    --dare P  each entry of τ_i is 0 with probability P, else divided by 1 − P, before ta or ties
              (Yu et al. 2024)

Where no expert has the elected sign the base stays. All is computed in fp32 and rounded once, when
it is written.

    python merge.py --base toy --experts runs/math runs/code --method ties --out merged

A folder may have any number of safetensors files. They are read in pieces and written in the same
order, so memory does not grow with the model: TIES's exact threshold comes from two counting passes
over the bits of |τ_i|, not from a sort.

Suffixes: K experts, M models (the base, then the experts), N elements of a piece.
"""

import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.cli import Parser, add_flags, fraction, number, run_main, share
from common.errors import UserError
from common.files import write_text
from common.keys import rng
from common.models import from_pretrained
from sources.models import resolve_model

PIECE = 2**20  # elements of a tensor that are in memory at once, per model
SHARD_BYTES = 4 << 30  # a larger model is written into several files
DTYPES = {
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
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


# ---------------- reading ----------------


class Place(NamedTuple):
    """Where a tensor's elements begin: an open file and a byte offset in it."""

    file: object
    offset: int


class Checkpoint:
    """The tensors of a model's folder, known by the headers of its safetensors files.

    dtype, shape and place are dicts by the tensor's name. read() brings elements of one. A tensor
    that only repeats another one is left out. Raises UserError.
    """

    def __init__(self, name: str):
        self.folder = Path(resolve_model(name, fetch=True))
        self.dtype = {}
        self.shape = {}
        self.place = {}
        for path in safetensors_files(self.folder):
            self.add_file(path)
        for tensor in repeated_tensors(self.folder) & self.shape.keys():
            del self.dtype[tensor], self.shape[tensor], self.place[tensor]

    def add_file(self, path: Path) -> None:
        if not path.exists():
            raise UserError(
                f"{path} is missing: merge.py reads Hugging Face folders with safetensors files"
            )
        file = open(path, "rb", buffering=0)
        header, data_start = read_header(path, file)
        for tensor, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: {tensor} is of type {entry['dtype']}; "
                    f"merge.py reads {' '.join(DTYPES)}"
                )
            self.dtype[tensor] = DTYPES[entry["dtype"]]
            self.shape[tensor] = tuple(entry["shape"])
            self.place[tensor] = Place(file, data_start + entry["data_offsets"][0])

    def size(self, tensor: str) -> int:
        """The number of elements."""
        return int(np.prod(self.shape[tensor]))

    def read(self, tensor: str, start: int, stop: int):
        """Elements start … stop of a tensor, flat, in the type that the file has."""
        file, offset = self.place[tensor]
        dtype = self.dtype[tensor]
        buffer = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        file.seek(offset + start * dtype.itemsize)
        left = memoryview(buffer.numpy())
        while len(left):  # the system may answer a large read in parts
            left = left[file.readinto(left) :]
        return buffer.view(dtype)


def safetensors_files(folder: Path) -> list[Path]:
    """The files of a model's weights. One file goes before an index, as in transformers."""
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
    """({tensor: {"dtype", "shape", "data_offsets"}}, where the data start in bytes) of a file.

    A safetensors file is the header's length in 8 bytes, the header in JSON, the tensors' bytes.
    Raises UserError for a file that does not end where its last tensor does.
    """
    file_bytes = path.stat().st_size
    header_bytes = int.from_bytes(file.read(8), "little")
    data_start = 8 + header_bytes
    try:
        header = json.loads(file.read(header_bytes)) if header_bytes < file_bytes else {}
        header.pop("__metadata__", None)
        data_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=-1)
        is_whole = data_bytes == file_bytes - data_start
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} is cut off, or no safetensors file")
    return header, data_start


def repeated_tensors(folder: Path) -> set[str]:
    """Names of tensors that only repeat another one: an output head tied to the embedding."""
    config = from_pretrained(AutoConfig, str(folder))
    if not getattr(config, "tie_word_embeddings", False):
        return set()
    try:
        with torch.device("meta"):  # no memory: only the names are asked for
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{folder}: {reason}: merge.py knows causal language models") from None
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every_name - {name for name, _ in model.named_parameters()}


# ---------------- checks, before anything is written ----------------


def check_out(out: Path, models: list[Checkpoint]) -> None:
    """--out is no model's folder, and nobody's. Raises UserError."""
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
    """The expert has the base's tensors, in the same shapes. Raises UserError."""
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
                "the base: another architecture or vocabulary"
            )
        if expert.dtype[name].is_floating_point != base.dtype[name].is_floating_point:
            raise UserError(
                f"{name} is {expert.dtype[name]} in {expert.folder} and {base.dtype[name]} in "
                "the base"
            )


def tokenizer_file(folder: Path) -> Path | None:
    """The file that tells one tokenizer from another."""
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            return folder / name
    return None


def check_vocabulary(base: Checkpoint, expert: Checkpoint) -> None:
    """The expert's tokens have the base's ids, where both have a tokenizer. Raises UserError."""
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
    """Σ w_k x_k, [N]. A weight of 0 adds nothing, not even a rounding."""
    used = [k for k, weight in enumerate(weight_K) if weight]
    if not used:
        return torch.zeros_like(x_KN[0])
    total_N = x_KN[used[0]] * weight_K[used[0]]
    for k in used[1:]:
        total_N.add_(x_KN[k], alpha=weight_K[k])
    return total_N


def dare(tau_KN, draws_K: list[torch.Generator], rate: float):
    """Drop entries with probability `rate` and divide the others by 1 − rate."""
    N = tau_KN.shape[1]
    kept_KN = torch.stack([torch.rand(N, generator=draw) >= rate for draw in draws_K])
    return tau_KN * kept_KN / (1 - rate)


def elect(base_N, tau_KN, sign_weight_K: list[float], weight_K: list[float], lam: float, zero: int):
    """What TIES and SCE end with: the mean of the entries that have the elected sign.

    sign_weight_K: weights of the sum whose sign is elected. zero: the sign that a sum of 0 has.
    Returns (merged [N], whether each entry has the elected sign [K, N]).
    """
    sign_N = weighted_sum(tau_KN, sign_weight_K).sign()
    sign_N[sign_N == 0] = zero
    agree_KN = tau_KN * sign_N > 0  # m_i
    share_N = weighted_sum(agree_KN.float(), weight_K)  # Σ w_i m_i
    mean_N = weighted_sum(tau_KN * agree_KN, weight_K) / share_N
    return base_N + lam * mean_N.where(share_N > 0, 0.0), agree_KN


def count_true(flag_KN):
    """How many entries of each row are true, [K]. By rows: sum(1) takes seven times as long."""
    return torch.stack([row_N.count_nonzero() for row_N in flag_KN])


def variance(x_KN):
    """Over the experts, [N]."""
    return (x_KN - x_KN.mean(0)).square_().mean(0)


LOW_BITS = 15  # fp32 without its sign is 31 bits: 16 high ones and 15 low ones
LOW_MASK = 2**LOW_BITS - 1


def kth_largest(pieces, count: int) -> list[float]:
    """For each of K rows, its `count`-th largest value, exactly.

    pieces() yields the rows in parts [K, N], in fp32 and not negative; it is run through twice. The
    bits of such numbers, read as integers, are in the numbers' order. So the first pass counts the
    values by their high bits, and the second counts by their low bits the values whose high bits
    are the answer's.
    """

    def high_bits(k, bits_N):
        return bits_N >> LOW_BITS

    high_K = []  # the answer's high bits
    left_K = []  # the answer is the left-th largest of the values that have them
    for counts in count_values(pieces, high_bits, 2**16):
        high, above = bin_of_kth_largest(counts, count)
        high_K.append(high)
        left_K.append(count - above)

    def low_bits(k, bits_N):
        return bits_N[bits_N >> LOW_BITS == high_K[k]] & LOW_MASK

    bits_K = []
    for k, counts in enumerate(count_values(pieces, low_bits, 2**LOW_BITS)):
        low, _ = bin_of_kth_largest(counts, left_K[k])
        bits_K.append((high_K[k] << LOW_BITS) | low)
    return torch.tensor(bits_K, dtype=torch.int32).view(torch.float32).tolist()


def count_values(pieces, pick, bins: int) -> list:
    """For each of K rows, [bins]: how often pick(k, the row's bits as integers) has each value."""
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
    """(the bin that holds the k-th largest of the counted values, how many are in higher bins)."""
    from_above = counts.flip(0).cumsum(0)  # [j]: values in the j + 1 highest bins
    j = int((from_above < k).sum())
    above = int(from_above[j - 1]) if j else 0
    return len(counts) - 1 - j, above


# ---------------- merging ----------------


class Merge:
    """One merge: it reads the models in pieces, and counts for the report."""

    def __init__(self, base: Checkpoint, experts: list[Checkpoint], args):
        self.base = base
        self.experts = experts
        self.models = [base, *experts]
        self.args = args
        # in the order of the base's files
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

    def count_passes(self) -> int:
        """How often the models are read."""
        selective = self.args.density < 1
        if self.args.method == "ties":
            return 3 if selective else 1  # two for the threshold
        if self.args.method == "sce":
            return 4 if selective else 2  # one for w, two for the threshold
        return 1

    def bytes_of_a_pass(self) -> int:
        total = 0
        for model in self.models:
            for name in self.floating:
                total += self.size[name] * model.dtype[name].itemsize
        return total

    def pieces(self, names: list[str]):
        """Yield (θ_0 [N], τ after DARE [K, N], θ [K, N]) in fp32, piece by piece.

        A value that is not finite raises UserError.
        """
        for name in names:
            draws_K = self.dare_generators(name) if self.args.dare else []
            for start in range(0, self.size[name], PIECE):
                theta_KN = self.read_piece(name, start, min(start + PIECE, self.size[name]))
                base_N, theta_KN = theta_KN[0], theta_KN[1:]
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
        """[1 + K, N]: elements start … stop of the base's tensor, then of the experts', in fp32."""
        rows = [model.read(name, start, stop) for model in self.models]
        self.bar.update(sum(row_N.nbytes for row_N in rows))
        theta_MN = torch.empty(len(rows), stop - start)
        for theta_N, row_N in zip(theta_MN, rows, strict=True):
            theta_N.copy_(row_N)
        for theta_N, model in zip(theta_MN, self.models, strict=True):
            # the sum is quick, and finite only if all values are; but it may overflow
            if not theta_N.sum().isfinite() and not theta_N.isfinite().all():
                raise UserError(
                    f"{name} in {model.folder} has a value that is not finite; nothing was written"
                )
        return theta_MN

    def trim_thresholds(self) -> list[float]:
        """TIES: for each expert, the smallest |τ_i| that stays, [K]."""
        if self.args.method != "ties" or self.args.density == 1:
            return [0.0] * len(self.experts)

        def magnitudes():
            for _, tau_KN, _ in self.pieces(self.floating):
                yield tau_KN.abs()

        return kth_largest(magnitudes, max(1, round(self.args.density * self.elements)))

    def select(self, name: str) -> tuple[float, list[float]]:
        """SCE: (the smallest variance over the experts that is selected, w [K]) of one tensor."""

        def variances():
            for _, tau_KN, _ in self.pieces([name]):
                yield variance(tau_KN)[None]

        lowest = 0.0
        if self.args.density < 1:
            count = max(1, round(self.args.density * self.size[name]))
            lowest = kth_largest(variances, count)[0]
        square_K = torch.zeros(len(self.experts), dtype=torch.float64)
        for _, tau_KN, _ in self.pieces([name]):
            square_K += keep_selected(tau_KN, lowest).square().sum(1)
        return lowest, (square_K / square_K.sum()).nan_to_num().tolist()

    def merged(self, name: str, threshold_K1):
        """Yield the merged tensor's pieces [N], in fp32."""
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
            yield merged_N

    def count_norms(self, base_N, tau_KN) -> None:
        self.dots_KK += (tau_KN @ tau_KN.T).double()
        self.base_square += base_N.square().sum().item()

    def integers(self, name: str):
        """A tensor of integers: the base's, which all experts must have. Raises UserError."""
        base_N = self.base.read(name, 0, self.size[name])
        for expert in self.experts:
            if not torch.equal(expert.read(name, 0, self.size[name]), base_N):
                raise UserError(
                    f"{name} in {expert.folder} holds other integers than the base's, which no "
                    "method merges"
                )
        return base_N

    def report(self) -> dict:
        """Norms ‖τ_i‖ and cosines of the task vectors (before DARE), and per expert two shares.

        kept: of τ_i's entries, those that are not 0 after DARE, trimming and selection. agree: of
        those, the ones that have the elected sign.
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
            "cosines": cosine_KK.tolist(),
            "experts": experts,
        }


def keep_selected(tau_KN, lowest: float):
    """SCE's selection: τ where its variance over the experts is at least `lowest`, else 0."""
    if not lowest:
        return tau_KN
    return tau_KN * (variance(tau_KN) >= lowest)


# ---------------- writing ----------------


def write_model(merge: Merge, folder: Path) -> None:
    """The merged model's files. Everything but its weights is the base's."""
    written_dtype = DTYPES.get(merge.args.dtype)  # None: the base's
    dtype = {}
    for name in merge.names:
        is_converted = written_dtype is not None and name in merge.floating
        dtype[name] = written_dtype if is_converted else merge.base.dtype[name]
    tensor_bytes = {name: merge.size[name] * dtype[name].itemsize for name in merge.names}

    threshold_K1 = torch.tensor(merge.trim_thresholds())[:, None]
    shards = split_into_shards(merge.names, tensor_bytes)
    for file_name, names in shards.items():
        write_shard(merge, folder / file_name, names, dtype, threshold_K1)
    if len(shards) > 1:
        write_index(folder, shards, sum(tensor_bytes.values()))

    for pattern in COPIED_FILES:
        for path in merge.base.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    if written_dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("torch_dtype", None)  # the older name of "dtype"
        config["dtype"] = str(written_dtype).removeprefix("torch.")
        write_text(folder / "config.json", json.dumps(config, indent=1))


def split_into_shards(names: list[str], tensor_bytes: dict) -> dict[str, list[str]]:
    """{file name: its tensors}, in order; a file has at most SHARD_BYTES, or one larger tensor."""
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
    """One safetensors file: the header's length, the header, the tensors as they are merged."""
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
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned to 8 bytes

    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if name not in merge.floating:
                file.write(merge.integers(name).view(torch.uint8).numpy())
                continue
            for merged_N in merge.merged(name, threshold_K1):
                file.write(rounded(merged_N, dtype[name], name).view(torch.uint8).numpy())


def rounded(merged_N, dtype: torch.dtype, name: str):
    """A merged piece in the type that is written. Raises UserError if that is not finite."""
    piece_N = merged_N.to(dtype)
    if not piece_N.sum(dtype=torch.float32).isfinite() and not piece_N.isfinite().all():
        raise UserError(
            f"{name} is not finite once merged and of type {dtype}; nothing was written"
        )
    return piece_N


def write_index(folder: Path, shards: dict[str, list[str]], total_bytes: int) -> None:
    """The file by which transformers and vLLM find the tensors of several files."""
    weight_map = {}
    for file_name, names in shards.items():
        for name in names:
            weight_map[name] = file_name
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


# ---------------- the command ----------------


def parse_args(argv: list[str] | None = None):
    finite = number(float, "be a finite number", np.isfinite)
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--base",
        required=True,
        help="the model that the experts were trained from: a folder, a run, a hub id, or toy",
    )
    add(
        "--experts",
        nargs="+",
        required=True,
        help="folders of the experts, or runs (their last checkpoint is taken)",
    )
    add("--method", choices=["average", "ta", "ties", "sce"], required=True, help="see above")
    add("--dare", type=fraction, default=0.0, help="drop rate before ta or ties; M2RL: 0.8")
    add("--lambda", type=finite, default=1.0, dest="lam", help="λ; average has none")
    add(
        "--density",
        type=share,
        default=None,
        help="share of the entries that ties keeps (default 0.2) or sce selects (default 1)",
    )
    add(
        "--weights",
        type=finite,
        nargs="+",
        default=[],
        help="w_i, one per expert; sce calculates its own",
    )
    add(
        "--dtype",
        choices=["base", "F32", "BF16", "F16"],
        default="base",
        help="type of the written weights; base: the base's",
    )
    add("--seed", type=int, default=0, help="seed of DARE")
    add_flags(parser, "--threads")
    add("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args) -> None:
    """Checks between flags, and the defaults that depend on --method."""
    if args.dare and args.method not in ("ta", "ties"):
        parser.error(f"--dare {args.dare}: before ta or ties only")
    if args.density is not None and args.method not in ("ties", "sce"):
        parser.error(f"--density {args.density}: of ties or sce only")
    if args.method == "average" and args.lam != 1:
        parser.error(f"--lambda {args.lam}: an average has none; --method ta with --weights has")
    if args.weights and args.method == "sce":
        parser.error(f"--weights {args.weights}: sce calculates its own")
    if args.weights and len(args.weights) != len(args.experts):
        parser.error(f"--weights {args.weights}: give one per expert ({len(args.experts)})")
    if args.density is None:
        args.density = 0.2 if args.method == "ties" else 1.0
    if not args.weights:
        args.weights = [1.0] * len(args.experts)
    if args.method != "ta" and (min(args.weights) < 0 or not sum(args.weights)):
        parser.error(f"--weights {args.weights}: not negative, nor all 0, except with ta")


def print_report(args, report: dict, out: Path) -> None:
    """One row per expert."""
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
    print(f"model {out}")


def main(argv: list[str] | None = None) -> Path:
    """Write --out, all of it or nothing: it appears by one rename. Returns the folder."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    out = Path(args.out)
    base = Checkpoint(args.base)
    experts = [Checkpoint(name) for name in args.experts]
    check_out(out, [base, *experts])
    for expert in experts:
        check_tensors(base, expert)
        check_vocabulary(base, expert)

    temporary = out.with_name(f".{out.name}-partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        merge = Merge(base, experts, args)
        write_model(merge, temporary)
        merge.bar.close()
        report = {name: value for name, value in vars(args).items() if name != "threads"}
        report |= merge.report()
        report["seconds"] = time.perf_counter() - started
        write_text(temporary / "merge.json", json.dumps(report, indent=1))
        if out.exists():
            out.rmdir()  # it is empty: check_out
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print_report(args, report, out)
    return out


if __name__ == "__main__":
    run_main(main, "nothing was written")
