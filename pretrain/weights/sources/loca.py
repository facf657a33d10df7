"""LOCA (Flax): a ViT without [CLS], with the tanh GELU, whose positions are resampled bilinearly.

``scenic/projects/loca/vit.py``. The published files are msgpack ``{teacher_weights, student_weights}`` of
nested dictionaries; today's trainer writes ``{ema_params, params}``. Kernels are (in, out): (D, heads, d) for
queries, keys and values, (heads, d, D) for their output, (p, p, 3, D) for patches. LayerNorm has Flax's
epsilon of 1e-6; nn.gelu defaults to the tanh form.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.weights.common import Checkpoint, Match, Misfit, Source, State, plain_vit, without
from pretrain.weights.container import Container

NETWORKS = {"teacher": ("teacher_weights", "ema_params"), "student": ("student_weights", "params")}
# Dropped, since only training uses them: cluster prediction, localization.
HEADS: tuple[str, ...] = (
    "projection_head_for_clustering_prediction.",
    "cross_attention_block.",
    "final_norm.",
)
HEADS += ("position_predictor.",)
TOKENS = "ToTokenSequence_0."
ATTENTION = "MultiHeadDotProductAttention_0."
PARTS = ("query", "key", "value")
# Flax's name: ours, the number of dimensions
OUTSIDE = {
    f"{TOKENS}embedding.kernel": ("patch_embed.proj.weight", 4),
    f"{TOKENS}embedding.bias": ("patch_embed.proj.bias", 1),
    f"{TOKENS}posembed_input": ("pos_embed", 4),
    "encoder_norm.scale": ("norm.weight", 1),
    "encoder_norm.bias": ("norm.bias", 1),
}
IN_BLOCK = {
    **{f"{ATTENTION}{part}.kernel": (f"attn.{part}.weight", 3) for part in PARTS},
    **{f"{ATTENTION}{part}.bias": (f"attn.{part}.bias", 2) for part in PARTS},
    f"{ATTENTION}out.kernel": ("attn.proj.weight", 3),
    f"{ATTENTION}out.bias": ("attn.proj.bias", 1),
    **{f"LayerNorm_{i}.scale": (f"norm{i + 1}.weight", 1) for i in (0, 1)},
    **{f"LayerNorm_{i}.bias": (f"norm{i + 1}.bias", 1) for i in (0, 1)},
    **{f"MlpBlock_0.Dense_{i}.kernel": (f"mlp.fc{i + 1}.weight", 2) for i in (0, 1)},
    **{f"MlpBlock_0.Dense_{i}.bias": (f"mlp.fc{i + 1}.bias", 1) for i in (0, 1)},
}


def match(file: Container) -> Match:
    """By Scenic's name for the patch projection, in a network without [CLS]."""
    trees = [file.tree.get(key) for keys in NETWORKS.values() for key in keys]
    found = [tree.get(TOKENS[:-1]) for tree in trees if isinstance(tree, Mapping)]
    marked = any(isinstance(t, Mapping) and "embedding" in t and "cls" not in t for t in found)
    return Match.MARKED if marked else Match.NONE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The teacher (default) or the student."""
    subnet = subnet or "teacher"
    trees: Any = [file.tree[key] for key in NETWORKS[subnet] if isinstance(file.tree.get(key), Mapping)]
    if not trees:
        raise Misfit(f"no {' or '.join(NETWORKS[subnet])}")
    tree = trees[0].get("params", trees[0]) if len(trees[0]) == 1 else trees[0]
    left = without(_flat(tree), *HEADS)
    state = {ours: _taken(left, flax, n_dims) for flax, (ours, n_dims) in OUTSIDE.items()}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].permute(3, 2, 0, 1)
    state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    n_blocks = len({key.split(".")[0] for key in left if key.startswith("encoderblock_")})
    heads = left.get(f"encoderblock_0.{ATTENTION}query.kernel", torch.zeros(0))
    if heads.ndim != 3:
        raise Misfit(f"no tensor encoderblock_0.{ATTENTION}query.kernel of 3 dimensions")
    n_heads = heads.shape[1]
    for i in range(n_blocks):
        state |= {
            f"blocks.{i}.{key}": value for key, value in _block(left, f"encoderblock_{i}.", n_heads).items()
        }
    state = {key: value.contiguous() for key, value in state.items()} | left  # an error by name
    unseen: dict[str, Any] = {
        "num_heads": n_heads,
        "gelu": "tanh",
        "ln_eps": 1e-6,
        "pos_interpolation": "bilinear_antialias",
    }
    return plain_vit(file, state, subnet, **unseen)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> State:
    """{a: {b: tensor}} -> {a.b: tensor}."""
    flat: State = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
    return flat


def _taken(left: State, key: str, n_dims: int) -> Tensor:
    """Remove a tensor from those that are left."""
    if key not in left:
        raise Misfit(f"no tensor {key}")
    value = left.pop(key)
    if value.ndim != n_dims or not value.numel():
        raise Misfit(f"{key} is {tuple(value.shape)}, not of {n_dims} dimensions")
    return value


def _block(left: State, prefix: str, n_heads: int) -> State:
    state = {ours: _taken(left, prefix + flax, n_dims) for flax, (ours, n_dims) in IN_BLOCK.items()}
    for kind, join in (("weight", lambda kernel: kernel.flatten(1).T), ("bias", Tensor.flatten)):
        parts = [state.pop(f"attn.{part}.{kind}") for part in PARTS]  # each [D, heads, d] or [heads, d]
        if len({part.shape for part in parts}) > 1 or parts[0].shape[-2] != n_heads:
            raise Misfit(f"{prefix}{ATTENTION}query, key and value are not of the same {n_heads} heads")
        state[f"attn.qkv.{kind}"] = torch.cat([join(part) for part in parts])
    state["attn.proj.weight"] = state["attn.proj.weight"].flatten(0, 1)
    return {key: value.T if value.ndim == 2 and "qkv" not in key else value for key, value in state.items()}


SOURCES = (Source("loca", "LOCA", match, convert),)
