"""A backbone at one image size, and what the formats share: its plain tensors, outputs and names."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pretrain.backbones.attention import buckets_of
from pretrain.backbones.rotary import Rotation
from pretrain.backbones.vit import Tokens, ViT
from pretrain.errors import UserError, ensure
from pretrain.files import write_safetensors
from pretrain.views.pixels import MEAN, STD
from pretrain.weights.common import registry_name

Size = tuple[int, int]  # height, width in pixels
Outputs = dict[str, Tensor]
Run = Callable[[Tensor], Outputs]
# (vit, size, path, provenance) -> a function that runs the file
Write = Callable[[ViT, Size, Path, Mapping[str, Any]], Run]

TENSORS = "model.safetensors"  # in a folder
# only our ViT has them, or their grid is another
NOT_PLAIN = ("pos_field", "cls_pos", "pos_embed", "mask_token", "pos_mask_token", "local_cls_norm.")


@dataclass(frozen=True)
class Usage:
    """How to use an exported file.

    Attributes:
        library: its name on Hugging Face's hub.
        code: Python that loads the file at ``path`` and computes features from ``image`` [B, 3, H, W].
        notes: what the export changed, and what else the reader has to know.
    """

    library: str
    code: str
    notes: tuple[str, ...] = ()


class FixedSizeViT(nn.Module):
    """A ViT at one image size. Positions, [CLS] and registers are constants; nothing is resampled when it
    runs.

    Args:
        vit: the network; its weights are shared.
        size: height, width in pixels; as in the ViT, bottom and right are padded to whole patches.
    """

    prefix: Tensor  # [1, S, D]
    position: Tensor  # [1, N, D]
    buckets: Tensor | None  # [S + N, S + N], of relative positions
    cos: Tensor | None  # [1, S + N, d / 2], of rotary positions
    sin: Tensor | None

    def __init__(self, vit: ViT, size: Size) -> None:
        super().__init__()
        self.patch_embed, self.blocks = vit.patch_embed, vit.blocks
        self.norm, self.cls_norm = vit.norm, vit.cls_norm
        self.normed, self.split = vit.normed, vit.split
        with torch.no_grad():
            tokens, self.grid = vit.embed(vit.patch_embed.proj.weight.new_zeros(1, 3, *size))
            self.register_buffer("prefix", tokens[:, : vit.n_prefix].clone())
            self.register_buffer("position", vit.positions(self.grid).clone())
            geometry = vit.geometry(self.grid)
            angles = geometry if isinstance(geometry, Rotation) else (None, None)
            for name, part in zip(("buckets", "cos", "sin"), (buckets_of(geometry), *angles)):
                self.register_buffer(name, part)
        self.eval()

    def forward(self, image: Tensor) -> Outputs:
        """[B, 3, H, W] -> :func:`outputs_of` the tokens after the final norm."""
        content = self.patch_embed(image).flatten(2).transpose(1, 2)  # [B, N, D]
        tokens = torch.cat([self.prefix.expand(image.shape[0], -1, -1), content + self.position], dim=1)
        geometry = self.buckets if self.cos is None or self.sin is None else Rotation(self.cos, self.sin)
        for block in self.blocks:
            tokens = block(tokens, geometry=geometry)
        return outputs_of(self.split(self.normed(tokens)), self.grid)


def outputs_of(tokens: Tokens, grid: tuple[int, int], cls: Tensor | None = None) -> Outputs:
    """``feature_map`` [B, D, h, w], ``cls`` [B, D] and, if any, ``registers`` [B, R, D]. ``cls`` replaces
    that of the tokens."""
    feature_map = tokens.patches.transpose(1, 2).unflatten(2, grid)
    outputs = {"feature_map": feature_map, "cls": tokens.cls if cls is None else cls}
    return {**outputs, "registers": tokens.registers} if tokens.registers.shape[1] else outputs


def whole_patches(vit: ViT, size: Size, square: str = "") -> tuple[int, int]:
    """The grid of patches (h, w) of a size. Other libraries do not pad.

    Args:
        square: why both sides have to be the same, and the way on; empty if they may differ.

    Raises:
        UserError: a side is not a multiple of the patch; the sides differ.
    """
    (height, width), px = size, vit.patch_size
    whole = f"size: {height} x {width} px are not whole patches of {px} px, and this format does not pad"
    ensure(height % px == width % px == 0, whole)
    ensure(not square or height == width, f"size: {height} x {width} px: {square}")
    return height // px, width // px


@torch.no_grad()
def plain_state(vit: ViT, size: Size) -> dict[str, Tensor]:
    """The tensors under timm's names, with the positions at one size as an ordinary ``pos_embed`` [1, (1 +) h
    * w, D].

    The first row is that of [CLS], if there is one. A network without positions gets zeros, which change
    nothing at any size, a rotary one none. Biases are as they are added: zeros where there are none. What only
    training reads is left out.

    Raises:
        UserError: see :func:`whole_patches`.
    """
    grid = whole_patches(vit, size)
    state = {
        key: value.detach().clone()
        for key, value in vit.state_dict().items()
        if not key.startswith(NOT_PLAIN)
    }
    for i, block in enumerate(vit.blocks):
        added: Any = block.attn.added_bias  # type: ignore[union-attr]
        state[f"blocks.{i}.attn.qkv.bias"] = (
            vit.cls_token.new_zeros(3 * vit.embed_dim) if added is None else added
        )
    if vit.pos_encoding == "rotary":
        return state
    rows = [vit.positions(grid)]
    if vit.has_cls:
        own = {"field": "cls_pos", "standard": "pos_embed"}.get(vit.pos_encoding)
        rows.insert(0, getattr(vit, own)[:, :1] if own else torch.zeros_like(vit.cls_token))
    return {**state, "pos_embed": torch.cat(rows, dim=1)}


def renamed(key: str, outside: Mapping[str, str], layer: str, inside: Mapping[str, str]) -> str:
    """One of timm's names in another library.

    Args:
        outside: names of tensors and modules outside the blocks.
        layer: what precedes the number of a block.
        inside: names of modules in a block, with what separates them from ``weight`` and ``bias``.
    """
    if key in outside:
        return outside[key]
    module, _, kind = key.rpartition(".")
    if module in outside:
        return f"{outside[module]}.{kind}"
    _, number, module = module.split(".", 2)
    return f"{layer}{number}.{inside[module]}{kind}"


def registered_name(vit: ViT) -> str:
    """The registry name for the metadata of our own file.

    Raises:
        UserError: no registered backbone has this width.
    """
    if name := registry_name(vit.embed_dim, vit.n_registers, vit.is_gated):
        return name
    none = f"{vit.embed_dim} is none of the registry's"
    raise UserError(f"format: our file names the network by its width, and {none}")


def refuse(library: str, vit: ViT, departures: Mapping[str, bool], ln_eps: float | None = None) -> None:
    """Raise the UserError that names what a network has and ``library`` has no place for.

    Args:
        departures: whether each holds; what no library has is added.
        ln_eps: the epsilon of the library's norms, if it is fixed.
    """
    eps = vit.model_kwargs["ln_eps"]
    of_its_own = {"with relative positions": vit.model_kwargs["relative_positions"]}
    of_its_own["with an own norm for [CLS]"] = vit.cls_norm is not None
    departures = {**of_its_own, **departures}
    departures[f"with ln_eps {eps:g} (its is {ln_eps})"] = ln_eps not in (None, eps)
    found = ", nor one ".join(name for name, holds in departures.items() if holds)
    ensure(not found, f"format: {library} has no ViT {found}; take another --format")


def require(format: str, *packages: str) -> None:
    """Raise a UserError if a format's packages are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    ensure(not missing, f"format {format} needs {', '.join(missing)}: pip install 'posfield[export]'")


def description(vit: ViT, size: Size, provenance: Mapping[str, Any]) -> str:
    """What a user of the file must know, as JSON for its metadata."""
    pixels = {"image_size_px": size, "pixel_mean": MEAN, "pixel_std": STD, "channels": "RGB, 0 to 1"}
    told = {**pixels, "backbone": vit.model_kwargs, "provenance": dict(provenance)}
    return json.dumps(told, sort_keys=True)


def write_tensors(path: Path, state: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file. Other libraries look for the ``format`` "pt"."""
    tensors = {key: value.contiguous() for key, value in state.items()}
    write_safetensors(path, save(tensors, {"format": "pt", **metadata}))


def write_folder(path: Path, state: Mapping[str, Tensor], told: str, **contents: Mapping[str, Any]) -> None:
    """Write a folder with tensors, what :func:`description` says, and the JSON files ``contents``."""
    path.mkdir()
    write_tensors(path / TENSORS, state, posfield=told)
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_export(file: Path) -> bool:
    """Whether an export of ours wrote this file; folders of other libraries have one of the same name."""
    try:
        with safe_open(file, framework="pt") as opened:
            return "posfield" in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False
