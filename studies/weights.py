"""Did experts change the same weights, and in the same direction? (M2RL, section 3.3, Table 5,
Figure 3)

    python -m studies.analyze weights --base toy --experts math=runs/math code=runs/code \\
        --out analyses/weights

    changed   |w_RL − w_0| > 1e-3 · max(|w_RL|, |w_0|)
    Jaccard   |M_1 ∧ M_2| / |M_1 ∨ M_2| of the masks of changed weights, by weight type (Q, K, V,
              O, FFN down, up and gate)
    random    the Jaccard of two independent masks of the same densities p and q:
              pq / (p + q − pq), which is 0.18 for p = q = 0.3
    cosine    of the shifts w_RL − w_0 where both changed, after a random orthogonal projection to
              256 dimensions

Tensor suffixes: K experts, N elements of a vector.
"""

import re
from collections import defaultdict

import numpy as np
import torch

import merge
from common.cli import natural, seed
from common.errors import UserError
from common.keys import rng
from studies import pictures
from studies.folders import named_folders

# weight type: the names of its tensors (a regular expression), in Llama's, Qwen's and GPT-2's style
WEIGHT_TYPES = {
    "Q": r"\.q_proj\.",
    "K": r"\.k_proj\.",
    "V": r"\.v_proj\.",
    "O": r"\.o_proj\.|\.attn\.c_proj\.",
    "FFN-dn": r"\.down_proj\.|\.mlp\.c_proj\.",
    "FFN-up": r"\.up_proj\.|\.c_fc\.",
    "FFN-gt": r"\.gate_proj\.",
}
MEASURES = ("density", "jaccard", "random", "cosine")
CHANGED_FROM = 1e-3  # relative shift above which a weight counts as changed, as in the paper
PROJECTED_SIZE = 256  # dimensions of a projected shift, as in the paper
TINY = 1e-300  # avoids 0 / 0


def parse_args(parser, argv):
    """The flags of this analysis; `parser` has --out already."""
    add = parser.add_argument
    add("--base", required=True, help="the model that the experts were trained from")
    add(
        "--experts",
        nargs="+",
        required=True,
        help="folders of two experts or more, or NAME=FOLDER",
    )
    add(
        "--layers",
        type=natural,
        nargs="+",
        default=[],
        help="compare only these layers (the paper: 17); default: all, which takes hours if there "
        "are billions of weights",
    )
    add("--seed", type=seed, default=0, help="seed of the random projection")
    return parser.parse_args(argv)


def run(args):
    """(numbers, figure). numbers: {experts, layers: {"<layer>/<type>": shift_overlap() as lists}}.

    One tensor of the base and of every expert is in memory at a time. Raises UserError.
    """
    experts = named_folders(args.experts)
    if len(experts) < 2:
        raise UserError("--experts: at least two, to compare")
    base = merge.Checkpoint(args.base)
    checkpoints = [merge.Checkpoint(folder) for folder in experts.values()]
    for checkpoint in checkpoints:
        merge.check_tensors(base, checkpoint)
    overlaps = measure_layers(base, checkpoints, args.layers, args.seed)
    if not overlaps:
        where = " in these layers" if args.layers else ""
        raise UserError(
            f"no weight of {base.folder} is of a known type ({' '.join(WEIGHT_TYPES)}){where}"
        )
    means = mean_by_type(overlaps)
    print_table(list(experts), means, len({layer for layer, _ in overlaps}))
    layers = {}
    for (layer, weight_type), overlap in overlaps.items():
        lists = {measure: values.tolist() for measure, values in overlap.items()}
        layers[f"{layer}/{weight_type}"] = lists
    return {"experts": experts, "layers": layers}, draw(list(experts), means)


# ---------------- one tensor ----------------


def by_weight_type(name: str, tensor) -> list[tuple]:
    """[(weight type, its matrix)] of a tensor; GPT-2's c_attn has Q, K and V side by side."""
    if tensor.ndim != 2:
        return []
    if ".c_attn." in name:
        return list(zip("QKV", tensor.chunk(3, 1)))
    for weight_type, pattern in WEIGHT_TYPES.items():
        if re.search(pattern, name):
            return [(weight_type, tensor)]
    return []


def project(x_N, key: tuple, size: int = PROJECTED_SIZE):
    """[size]: a random orthogonal projection of a vector; the same one for the same key and N.

    It consists of random signs, the Walsh-Hadamard transform, and a choice of `size` of the
    resulting coordinates. This is exactly orthogonal. It takes N log N operations; a dense matrix
    would take N · size.
    """
    width = 1 << max(len(x_N) - 1, 1).bit_length()  # the next power of 2
    draw = rng(*key)
    signs_N = torch.from_numpy(draw.integers(0, 2, len(x_N)) * 2.0 - 1)
    mixed = torch.zeros(width, dtype=torch.float64)
    mixed[: len(x_N)] = x_N.double() * signs_N
    step = 1
    while step < width:  # the fast Walsh-Hadamard transform
        left, right = mixed.view(-1, 2, step).unbind(1)
        mixed = torch.stack((left + right, left - right), 1).flatten()
        step *= 2
    coordinates = torch.from_numpy(draw.choice(width, min(size, width), replace=False))
    return mixed[coordinates] / width**0.5


def shift_overlap(before, after_K: list, key: tuple) -> dict:
    """{density [K], jaccard, random, cosine [K, K]} of one matrix before RL and after it.

    after_K: the experts' matrices. key: chooses the projection. density: share of changed elements.
    """
    shift_K = []
    mask_K = []
    for after in after_K:
        shift = (after - before).flatten()
        larger = torch.maximum(after.abs(), before.abs()).flatten()
        shift_K.append(shift)
        mask_K.append(shift.abs() > CHANGED_FROM * larger)

    K = len(after_K)
    jaccard_KK = np.eye(K)
    cosine_KK = np.eye(K)
    for i in range(K):
        for j in range(i):
            both = mask_K[i] & mask_K[j]
            either = mask_K[i] | mask_K[j]
            jaccard = (both.sum() / either.sum().clamp(min=1)).item()
            cosine = projected_cosine(shift_K[i][both], shift_K[j][both], key)
            jaccard_KK[i, j] = jaccard_KK[j, i] = jaccard
            cosine_KK[i, j] = cosine_KK[j, i] = cosine

    density_K = np.array([mask.double().mean().item() for mask in mask_K])
    product_KK = density_K[:, None] * density_K
    random_KK = product_KK / np.maximum(density_K[:, None] + density_K - product_KK, TINY)
    return {"density": density_K, "jaccard": jaccard_KK, "random": random_KK, "cosine": cosine_KK}


def projected_cosine(a_N, b_N, key: tuple) -> float:
    """The cosine of the projections of two vectors; 0 if they are empty, or if one of them is 0."""
    if not len(a_N):
        return 0.0
    a = project(a_N, key)
    b = project(b_N, key)
    return (a @ b / (a.norm() * b.norm()).clamp(min=TINY)).item()


# ---------------- all tensors ----------------


def measure_layers(base, experts: list, layers: list[int], seed: int) -> dict:
    """{(layer, weight type): shift_overlap()} of these layers, or of all if `layers` is empty."""
    overlaps = {}
    for name in sorted(base.shape):
        match = re.search(r"(?:^|\.)(\d+)\.", name)
        if not match:
            continue
        layer = int(match[1])
        if layers and layer not in layers:
            continue
        base_matrices = by_weight_type(name, read_tensor(base, name))
        matrices_K = [by_weight_type(name, read_tensor(expert, name)) for expert in experts]
        for i, (weight_type, before) in enumerate(base_matrices):
            after_K = [matrices[i][1] for matrices in matrices_K]
            key = (seed, name, weight_type)
            overlaps[layer, weight_type] = shift_overlap(before, after_K, key)
    return overlaps


def read_tensor(checkpoint, name: str):
    """A tensor of a merge.Checkpoint, in fp32 and in its shape.

    Raises UserError if a value is not finite.
    """
    flat = checkpoint.read(name, 0, checkpoint.size(name))
    if not flat.isfinite().all():
        raise UserError(f"{name} in {checkpoint.folder} has a value that is not finite")
    return flat.float().view(checkpoint.shape[name])


def mean_by_type(overlaps: dict) -> dict:
    """{weight type: {measure: mean over the layers}}, in WEIGHT_TYPES' order."""
    overlaps_of = defaultdict(list)
    for (_, weight_type), overlap in overlaps.items():
        overlaps_of[weight_type].append(overlap)
    means = {}
    for weight_type in WEIGHT_TYPES:
        if weight_type in overlaps_of:
            means[weight_type] = {}
            for measure in MEASURES:
                values = [overlap[measure] for overlap in overlaps_of[weight_type]]
                means[weight_type][measure] = np.mean(values, 0)
    return means


def print_table(names: list[str], means: dict, layers: int) -> None:
    """Print a row per pair of experts, then the means of the random Jaccard and of the densities.

    layers: how many there are in the means.
    """
    K = len(names)
    head = "".join(f"{weight_type:>15}" for weight_type in means)
    print(f"{'Jaccard (cosine)':<24}{head}      mean over {layers} layer(s)")
    for i in range(K):
        for j in range(i + 1, K):
            cells = ""
            for mean in means.values():
                cells += f"{mean['jaccard'][i, j]:7.2f} ({mean['cosine'][i, j]:+.2f})"
            print(f"{names[i] + ' - ' + names[j]:<24}{cells}")
    pairs = ~np.eye(K, dtype=bool)
    random = "".join(f"{mean['random'][pairs].mean():7.2f}        " for mean in means.values())
    changed = "".join(f"{mean['density'].mean():7.2f}        " for mean in means.values())
    print(f"{'random, mean':<24}{random}")
    print(f"{'changed, mean':<24}{changed}")


def draw(names: list[str], means: dict):
    """A figure with heat maps over pairs of experts: Jaccard, and cosine in attention and FFN."""
    attention = [weight_type for weight_type in means if weight_type in ("Q", "K", "V", "O")]
    ffn = [weight_type for weight_type in means if weight_type.startswith("FFN")]
    panels = (
        ("Jaccard of changed weights", "jaccard", list(means)),
        ("cosine of shifts, attention", "cosine", attention),
        ("cosine of shifts, FFN", "cosine", ffn),
    )
    figure, axes = pictures.grid(1, len(panels), panel_height=2.9)
    for axis, (title, measure, weight_types) in zip(axes[0], panels):
        values = np.zeros((len(names), len(names)))
        if weight_types:
            values = np.mean([means[weight_type][measure] for weight_type in weight_types], 0)
        pictures.heat_map(axis, values, names, names, title)
        axis.tick_params(axis="x", rotation=30)
        axis.set_xlabel("expert")
    axes[0, 0].set_ylabel("expert")
    return figure
