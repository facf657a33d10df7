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

from pretrain.weights.common import Checkpoint, Match, Source, misfit, plain_vit, with_origin, without
from pretrain.weights.container import Container

NETWORKS = {"teacher": ("teacher_weights", "ema_params"), "student": ("student_weights", "params")}
# Dropped, since only training uses them: cluster prediction, localization.
HEADS = (
    "projection_head_for_clustering_prediction.",
    "cross_attention_block.",
    "final_norm.",
    "position_predictor.",
)
TOKENS = "ToTokenSequence_0."
ATTENTION = "MultiHeadDotProductAttention_0."
NORMS = {"scale": "weight", "bias": "bias"}


def match(file: Container) -> Match:
    """By Scenic's name for the patch projection, in a network without [CLS]."""
    trees = [file.tree.get(key) for keys in NETWORKS.values() for key in keys]
    found = [tree.get(TOKENS[:-1]) for tree in trees if isinstance(tree, Mapping)]
    marked = any(isinstance(t, Mapping) and "embedding" in t and "cls" not in t for t in found)
    return Match.MARKED if marked else Match.NONE


def convert(file: Container, subnet: str | None) -> Checkpoint:
    """The teacher (default) or the student."""
    subnet = subnet or "teacher"
    tree: Any = next(
        (file.tree[key] for key in NETWORKS[subnet] if isinstance(file.tree.get(key), Mapping)), None
    )
    if tree is None:
        raise misfit(file.path, "loca", f"no {' or '.join(NETWORKS[subnet])}")
    params = without(_flat(tree.get("params", tree) if "params" in tree and len(tree) == 1 else tree), *HEADS)
    state = _Reader(file, params)
    heads = state.heads()
    renamed = state.network(heads)
    renamed.update(state.left)  # an error by name
    unseen = {"num_heads": heads, "gelu": "tanh", "ln_eps": 1e-6, "pos_interpolation": "bilinear_antialias"}
    return with_origin(plain_vit(file.path, renamed, "loca", "LOCA", **unseen), file, subnet)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """{a: {b: tensor}} -> {a.b: tensor}."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
    return flat


class _Reader:
    """Takes a Flax network's tensors one by one and checks their dimensions; ``left`` are those not taken
    yet."""

    def __init__(self, file: Container, params: dict[str, Tensor]) -> None:
        self.path, self.left = file.path, params

    def take(self, key: str, n_dims: int) -> Tensor:
        if key not in self.left:
            raise misfit(self.path, "loca", f"no tensor {key}")
        value = self.left.pop(key)
        if value.ndim != n_dims or not value.numel():
            raise misfit(self.path, "loca", f"{key} is {tuple(value.shape)}, not of {n_dims} dimensions")
        return value

    def heads(self) -> int:
        key = f"encoderblock_0.{ATTENTION}query.kernel"
        if key not in self.left or self.left[key].ndim != 3:
            raise misfit(self.path, "loca", f"no tensor {key} of 3 dimensions")
        return self.left[key].shape[1]

    def network(self, heads: int) -> dict[str, Tensor]:
        """All tensors of the encoder under our names."""
        state = {
            "patch_embed.proj.weight": self.take(TOKENS + "embedding.kernel", 4).permute(3, 2, 0, 1),
            "patch_embed.proj.bias": self.take(TOKENS + "embedding.bias", 1),
            "pos_embed": self.take(TOKENS + "posembed_input", 4).flatten(1, 2),
        }
        n_blocks = len({key.split(".")[0] for key in self.left if key.startswith("encoderblock_")})
        for i in range(n_blocks):
            state.update(self.block(f"encoderblock_{i}.", f"blocks.{i}.", heads))
        state.update({f"norm.{ours}": self.take(f"encoder_norm.{flax}", 1) for flax, ours in NORMS.items()})
        return {key: value.contiguous() for key, value in state.items()}

    def block(self, flax: str, ours: str, heads: int) -> dict[str, Tensor]:
        """One block."""
        parts = [f"{flax}{ATTENTION}{part}" for part in ("query", "key", "value")]
        kernels = [self.take(f"{part}.kernel", 3) for part in parts]  # each [D, heads, d]
        biases = [self.take(f"{part}.bias", 2) for part in parts]  # each [heads, d]
        for shapes in ({kernel.shape for kernel in kernels}, {bias.shape for bias in biases}):
            if len(shapes) > 1 or next(iter(shapes))[-2] != heads:
                raise misfit(
                    self.path, "loca", f"{parts[0]}, key and value are not of the same {heads} heads"
                )
        state = {
            "attn.qkv.weight": torch.cat([kernel.flatten(1).T for kernel in kernels]),
            "attn.qkv.bias": torch.cat([bias.flatten() for bias in biases]),
            "attn.proj.weight": self.take(f"{flax}{ATTENTION}out.kernel", 3).flatten(0, 1).T,
            "attn.proj.bias": self.take(f"{flax}{ATTENTION}out.bias", 1),
        }
        for i in (0, 1):
            state |= {
                f"norm{i + 1}.{name}": self.take(f"{flax}LayerNorm_{i}.{key}", 1)
                for key, name in NORMS.items()
            }
            state[f"mlp.fc{i + 1}.weight"] = self.take(f"{flax}MlpBlock_0.Dense_{i}.kernel", 2).T
            state[f"mlp.fc{i + 1}.bias"] = self.take(f"{flax}MlpBlock_0.Dense_{i}.bias", 1)
        return {ours + key: value for key, value in state.items()}


SOURCES = (Source("loca", "LOCA", match, convert),)
