"""What all probes share: the features of a frozen backbone, layer by layer, of uint8 images."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.backbones.block import Block
from pretrain.backbones.vit import Tokens, ViT
from pretrain.errors import UserError
from pretrain.views.pixels import normalize

FORWARD_BATCH = 32  # images a forward pass: probes run beside a training that already fills the memory

LayerVisitor = Callable[[slice, int, Tensor], None]


def layer_names(backbone: ViT) -> list[str]:
    """What :meth:`Features.visit` counts: ``embedding``, ``block 1``, ..., and ``norm`` where there is a
    final one."""
    return ["embedding", *(f"block {i + 1}" for i in range(len(backbone.blocks)))] + [
        "norm"
    ] * backbone.model_kwargs["final_norm"]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for the time being; each part gets the mode back that it had."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in before:
            part.training = training


@dataclass(frozen=True)
class Features:
    """The features of one backbone, which the caller holds :func:`frozen`.

    Attributes:
        backbone: on ``device``.
        autocast: context of the forward passes, entered again for each.
    """

    backbone: ViT
    device: torch.device
    autocast: AbstractContextManager[Any]

    def __call__(self, images: Tensor, position_masks: Tensor | None = None) -> Iterator[Tokens]:
        """Tokens after the final norm, ``FORWARD_BATCH`` images at a time, in order.

        Args:
            images: uint8 [n, 3, S, S], whole images.
            position_masks: [n, N] bool, patches whose position is replaced by the position mask token.
        """
        for part in _parts(images):
            yield Tokens(*map(_full, self._forward(part, images, position_masks)))

    def visit(self, images: Tensor, visitor: LayerVisitor, position_masks: Tensor | None = None) -> None:
        """Show the patch features of every layer to ``visitor(part, layer, patches)`` as they arise: one
        layer at a time is held.

        The pass is the backbone's own, looked at through hooks.

        Args:
            images, position_masks: those of a call.
            visitor: takes which of the images (a slice), the layer's number in :func:`layer_names`, and [n,
                N, D].
        """
        backbone = self.backbone
        last = len(backbone.blocks)

        def show(layer: int, tokens: Tensor) -> None:
            visitor(part, layer, _full(backbone.split(tokens).patches))

        with ExitStack() as hooks:
            hooks.enter_context(
                backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: show(0, inputs[0]))
            )
            for i, block in enumerate(backbone.blocks):
                hooks.enter_context(
                    block.register_forward_hook(lambda _, __, out, layer=i + 1: show(layer, out))
                )
            if backbone.model_kwargs["final_norm"]:
                hooks.enter_context(
                    backbone.norm.register_forward_hook(lambda _, __, out: show(last + 1, out))
                )
            for part in _parts(images):
                self._forward(part, images, position_masks)

    def layer(self, images: Tensor, layer: int) -> Tensor:
        """Patch features [n, N, D] of one layer, by its number in :func:`layer_names` (negative: from the
        end).

        Raises:
            UserError: they are not finite; so do :meth:`keys`.
        """
        found: list[Tensor] = []
        wanted = range(len(layer_names(self.backbone)))[layer]
        self.visit(images, lambda _, number, patches: found.append(patches) if number == wanted else None)
        return finite(torch.cat(found))

    def keys(self, images: Tensor) -> Tensor:
        """Keys of the last attention layer, heads side by side, of the patches alone: [n, N, D]."""
        found: list[Tensor] = []
        last = self.backbone.blocks[-1]
        assert isinstance(last, Block)
        with last.attn.qkv.register_forward_hook(
            lambda _, __, qkv: found.append(_full(qkv.chunk(3, dim=-1)[1]))
        ):
            for part in _parts(images):
                self._forward(part, images)
        return finite(torch.cat(found)[:, self.backbone.n_prefix :])

    def _forward(self, part: slice, images: Tensor, position_masks: Tensor | None = None) -> Tokens:
        masks = None if position_masks is None else position_masks[part].to(self.device)
        pixels = normalize(images[part].to(self.device)).to(self.backbone.patch_embed.proj.weight.dtype)
        with self.autocast:
            tokens: Tokens = self.backbone(pixels, position_mask=masks)
        return tokens


def _parts(images: Tensor) -> list[slice]:
    return [slice(start, start + FORWARD_BATCH) for start in range(0, len(images), FORWARD_BATCH)]


def finite(x: Tensor) -> Tensor:
    """Features, all of them finite; else a UserError."""
    if not x.isfinite().all():
        raise UserError("the backbone's features are not finite numbers")
    return x


def _full(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
