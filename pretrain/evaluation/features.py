"""What all evaluations share: the features of a frozen backbone, layer by layer, of uint8 images."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.backbones.block import Block
from pretrain.backbones.vit import Tokens, ViT
from pretrain.errors import UserError
from pretrain.precision import at_least_float32
from pretrain.views.pixels import normalize

FORWARD_BATCH = 32  # images a forward pass: probes run beside a training that already fills the memory

LayerVisitor = Callable[[slice, int, Tensor], None]


def layer_names(backbone: ViT) -> list[str]:
    """The layers of :meth:`Features.visit`: ``embedding``, ``block 1``, ..., and ``norm`` if there is one."""
    blocks = [f"block {i + 1}" for i in range(len(backbone.blocks))]
    return ["embedding", *blocks, *["norm"] * backbone.model_kwargs["final_norm"]]


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
            images: uint8 [n, 3, H, W], whole images.
            position_masks: [n, N] bool, patches whose position is replaced by the position mask token.
        """
        for _, tokens in self._passes(images, position_masks):
            yield Tokens(*map(at_least_float32, tokens))

    def visit(self, images: Tensor, visitor: LayerVisitor, position_masks: Tensor | None = None) -> None:
        """Show the patch features of every layer to ``visitor(part, layer, patches)``, one layer at a time:
        which of the images (a slice), the layer's number in :func:`layer_names`, and [n, N, D]. The pass is
        the backbone's own, looked at through hooks; images and masks are those of a call."""
        backbone, start = self.backbone, 0

        def show(layer: int, tokens: Tensor) -> None:
            # The norm of patches alone sees no others
            n_special = 0 if layer > len(backbone.blocks) and backbone.cls_norm else backbone.n_prefix
            part = slice(start, start + FORWARD_BATCH)
            visitor(part, layer, at_least_float32(tokens[:, n_special:]))

        with ExitStack() as hooks:
            layers = [*backbone.blocks, *[backbone.norm] * backbone.model_kwargs["final_norm"]]
            hooks.enter_context(layers[0].register_forward_pre_hook(lambda _, inputs: show(0, inputs[0])))
            for layer, module in enumerate(layers, 1):
                hook = lambda _, __, out, layer=layer: show(layer, out)  # noqa: E731
                hooks.enter_context(module.register_forward_hook(hook))
            for done, _ in self._passes(images, position_masks):
                start = done

    def layer(self, images: Tensor, layer: int) -> Tensor:
        """Patch features [n, N, D] of one layer, by its number in :func:`layer_names` (negative: from the
        end); a UserError where they are not finite, as of :meth:`attended`."""
        found: list[Tensor] = []
        wanted = range(len(layer_names(self.backbone)))[layer]
        self.visit(images, lambda _, number, patches: found.append(patches) if number == wanted else None)
        return finite(torch.cat(found))

    def attended(self, images: Tensor, which: str = "keys", bias: bool = True) -> Tensor:
        """``queries``, ``keys`` or ``values`` of the last attention layer, heads side by side, of the patches
        alone, with the bias of their projection or without: [n, N, D]."""
        found: list[Tensor] = []
        last, third = self.backbone.blocks[-1], ("queries", "keys", "values").index(which)
        assert isinstance(last, Block)
        added = last.attn.added_bias
        keep = lambda _, __, qkv: found.append(at_least_float32(qkv.chunk(3, dim=-1)[third]))  # noqa: E731
        with last.attn.qkv.register_forward_hook(keep):
            for _ in self._passes(images):
                pass
        patches = finite(torch.cat(found)[:, self.backbone.n_prefix :])
        return patches if bias or added is None else patches - at_least_float32(added.chunk(3)[third])

    def _passes(self, images: Tensor, masks: Tensor | None = None) -> Iterator[tuple[int, Tokens]]:
        """Number of images done, and the tokens of the last of them."""
        dtype = self.backbone.patch_embed.proj.weight.dtype
        for start in range(0, len(images), FORWARD_BATCH):
            part = slice(start, start + FORWARD_BATCH)
            mask = None if masks is None else masks[part].to(self.device)
            pixels = normalize(images[part].to(self.device)).to(dtype)
            with self.autocast:
                tokens: Tokens = self.backbone(pixels, position_mask=mask)
            yield part.stop, tokens


@contextmanager
def frozen_features(backbone: ViT, device: torch.device, bf16: bool = False) -> Iterator[Features]:
    """The features of a backbone, which is moved to ``device`` and held :func:`frozen`."""
    with frozen(backbone.to(device)):
        yield Features(backbone, device, torch.autocast(device.type, torch.bfloat16, enabled=bf16))


def finite(x: Tensor) -> Tensor:
    """Features, all of them finite; else a UserError."""
    if not x.isfinite().all():
        raise UserError("the backbone's features are not finite numbers")
    return x


def check_varied(x: Tensor, signals: object) -> None:
    """A UserError where features [n, D] of different images (or patches) are all the same: a score would be that
    of a constant answer. In a probe (no signals), which may look at a network that collapses, a warning."""
    if len(x) > 1 and bool((x.amax(0) - x.amin(0) <= 1e-6 * x.abs().amax()).all()):
        told = "the backbone's features are the same everywhere: the score is that of a constant answer"
        if signals is not None:
            raise UserError(told)
        warnings.warn(told, stacklevel=3)


def patch_maps(features: Features, images: Tensor) -> Iterator[Tensor]:
    """Patch features [b, N, D] float32 of uint8 [n, 3, S, S], ``FORWARD_BATCH`` images at a time;
    a UserError where they are not finite."""
    for tokens in features(images):
        yield finite(tokens.patches).detach().float()


def whole_patches(image_px: int, features: Features) -> int:
    """``image_px`` rounded down to whole patches, with a message: 512 px become 504 px with patches of 14, as
    in open-hummingbird-eval. A UserError if it is less than a patch."""
    patch_px = features.backbone.patch_size
    if image_px < patch_px:
        raise UserError(f"image_px={image_px} is less than a patch of {patch_px}")
    side = image_px // patch_px * patch_px
    if side < image_px:
        what = f"images of {side} px, whole patches of {patch_px}"
        print(f"{what}, in place of image_px={image_px}", flush=True)
    return side


class Moments:
    """Sums over rows of features and outputs, all that a linear fit needs, at a memory that does not grow."""

    def __init__(self, dim: int, n_outputs: int, device: torch.device) -> None:
        self.home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.n, zeros = 0, partial(torch.zeros, dtype=torch.float64, device=self.home)
        self.x, self.xx = zeros(dim), zeros(dim, dim)
        self.y, self.xy = zeros(n_outputs), zeros(dim, n_outputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows ``x`` [n, D] and their outputs ``y`` [n, K]."""
        x, y = x.to(self.home).double(), y.to(self.home).double()
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def standard(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [D] and standard deviation [D] (1 where a feature is constant) of the features, and their
        correlation [D, D]."""
        mean = self.x / self.n
        covariance = self.xx / self.n - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0)
        std = torch.where(variance > 1e-12, variance, 1.0).sqrt()
        return mean, std, covariance / torch.outer(std, std)


class ReadOut(NamedTuple):
    """x -> x @ weight + bias; weight [D, K], bias [K], float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., K] float64."""
        return x.to(self.weight.device).double() @ self.weight + self.bias
