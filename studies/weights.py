"""How far experts moved the same weights, and in the same direction (M2RL, section 3.3, Table 5,
Figure 3).

    python -m studies.analyze weights --base toy --experts math=runs/math code=runs/code \\
        --out analyses/weights

    changed   |w_RL − w_0| > 1e-3 · max(|w_RL|, |w_0|)
    Jaccard   |M_1 ∧ M_2| / |M_1 ∨ M_2| of the masks of changed weights, by weight type (Q K V O,
              FFN down, up, gate). Random: what two independent masks of the same densities p, q
              have, pq / (p + q − pq); that is 0.18 for p = q = 0.3
    cosine    of the shifts w_RL − w_0 where both changed, after a random orthogonal projection to
              256 dimensions

Tensor suffixes: K experts, N elements of a vector.
"""

import re
from collections import defaultdict

import numpy as np
import torch

import merge
from common.cli import natural
from common.errors import UserError
from common.keys import rng
from studies import pictures
from studies.folders import named_folders

# weight type → the names of its tensors
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


def parse_args(parser, argv):
    add = parser.add_argument
    add("--base", required=True, help="the model that the experts were trained from")
    add("--experts", nargs="+", required=True, help="two experts or more, NAME=FOLDER …")
    add(
        "--layers",
        type=natural,
        nargs="+",
        default=[],
        help="only these layers (the paper: 17); default: all, which takes hours for billions of "
        "weights",
    )
    add("--seed", type=int, default=0, help="seed of the projection")
    return parser.parse_args(argv)


def run(args):
    """(numbers, figure). numbers: {experts, layers: {"<layer>/<type>": density [K], jaccard,
    random and cosine [K, K]}}.

    One weight of the base and of every expert is in memory at a time. Raises UserError.
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


# ---------------- one weight ----------------


def typed_parts(name: str, tensor) -> list[tuple]:
    """[(weight type, that part of the tensor)]: GPT-2 keeps Q, K and V side by side."""
    if tensor.ndim != 2:
        return []
    if ".c_attn." in name:
        return list(zip("QKV", tensor.chunk(3, 1)))
    return [(kind, tensor) for kind, pattern in WEIGHT_TYPES.items() if re.search(pattern, name)]


def project(x_N, key: tuple, size: int = 256):
    """A random orthogonal projection of a vector to `size` dimensions; the same for the same key.

    Random signs, the Walsh-Hadamard transform, and `size` of its coordinates. This is exactly
    orthogonal and takes n log n operations, where a dense matrix would take n · size.
    """
    width = 1 << max(len(x_N) - 1, 1).bit_length()
    draw = rng(*key)
    signs_N = torch.from_numpy(draw.integers(0, 2, len(x_N)) * 2.0 - 1)
    y = torch.zeros(width, dtype=torch.float64)
    y[: len(x_N)] = x_N.double() * signs_N
    step = 1
    while step < width:
        a, b = y.view(-1, 2, step).unbind(1)
        y = torch.stack((a + b, a - b), 1).flatten()
        step *= 2
    coordinates = torch.from_numpy(draw.choice(width, min(size, width), replace=False))
    return y[coordinates] / width**0.5


def shift_overlap(before, after_K: list, key: tuple) -> dict:
    """Of one weight, before RL and of each expert: density [K] of the masks of changed elements;
    jaccard, random (its reference) and cosine [K, K]."""
    shift_K, mask_K = [], []
    for after in after_K:
        shift = (after - before).flatten()
        larger = torch.maximum(after.abs(), before.abs()).flatten()
        shift_K.append(shift)
        mask_K.append(shift.abs() > 1e-3 * larger)

    K = len(after_K)
    jaccard_KK, cosine_KK = np.eye(K), np.eye(K)
    for i in range(K):
        for j in range(i):
            both, either = mask_K[i] & mask_K[j], mask_K[i] | mask_K[j]
            jaccard = (both.sum() / either.sum().clamp(min=1)).item()
            cosine = projected_cosine(shift_K[i][both], shift_K[j][both], key)
            jaccard_KK[i, j] = jaccard_KK[j, i] = jaccard
            cosine_KK[i, j] = cosine_KK[j, i] = cosine

    p_K = np.array([mask.double().mean().item() for mask in mask_K])
    product_KK = p_K[:, None] * p_K
    random_KK = product_KK / np.maximum(p_K[:, None] + p_K - product_KK, 1e-300)
    return {"density": p_K, "jaccard": jaccard_KK, "random": random_KK, "cosine": cosine_KK}


def projected_cosine(a_N, b_N, key: tuple) -> float:
    """Of the projections of two vectors; 0 where they are empty or 0."""
    if not len(a_N):
        return 0.0
    a, b = project(a_N, key), project(b_N, key)
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-300)).item()


# ---------------- all weights ----------------


def measure_layers(base, experts: list, layers: list[int], seed: int) -> dict:
    """{(layer, weight type): shift_overlap()} of these layers; of all where `layers` is empty."""
    overlaps = {}
    for name in sorted(base.shape):
        match = re.search(r"(?:^|\.)(\d+)\.", name)
        if not match:
            continue
        layer = int(match[1])
        if layers and layer not in layers:
            continue
        parts_before = typed_parts(name, read_tensor(base, name))
        parts_after_K = [typed_parts(name, read_tensor(expert, name)) for expert in experts]
        for i, (weight_type, before) in enumerate(parts_before):
            after_K = [parts[i][1] for parts in parts_after_K]
            key = (seed, name, weight_type)
            overlaps[layer, weight_type] = shift_overlap(before, after_K, key)
    return overlaps


def read_tensor(checkpoint, name: str):
    flat = checkpoint.read(name, 0, checkpoint.size(name))
    return flat.float().view(checkpoint.shape[name])


def mean_by_type(overlaps: dict) -> dict:
    """{weight type: {measure: mean over the layers}}, in WEIGHT_TYPES' order."""
    overlaps_of = defaultdict(list)
    for (_, weight_type), overlap in overlaps.items():
        overlaps_of[weight_type].append(overlap)
    means = {}
    for weight_type in WEIGHT_TYPES:
        if weight_type in overlaps_of:
            means[weight_type] = {
                measure: np.mean([overlap[measure] for overlap in overlaps_of[weight_type]], 0)
                for measure in MEASURES
            }
    return means


def print_table(names: list[str], means: dict, layers: int) -> None:
    """A line per pair of experts; then the means of the random reference and of the densities."""
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
    """Heat maps over pairs of experts: Jaccard, and cosine in attention and in FFN."""
    attention = [weight_type for weight_type in means if weight_type in "QKVO"]
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
