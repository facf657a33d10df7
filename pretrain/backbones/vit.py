"""The plain Vision Transformer that pre-training, detection and segmentation share.

Keys are timm's (cls_token, pos_embed, patch_embed.proj, blocks.N.norm1 / attn.qkv / attn.proj / norm2 /
mlp.fc1 / mlp.fc2 / ls1.gamma, norm, reg_token). When positions are a field, ``pos_field`` [1, D, 50, 50] and
``cls_pos`` [1, 1, D] stand in place of ``pos_embed``; rotary ones have no parameters. What other methods' networks
lack can be left out: [CLS], the final norm, positions, biases.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.backbones.attention import QKV_BIASES, Geometry, Shapes, choose_attention
from pretrain.backbones.block import GELUS, Block, run_block
from pretrain.backbones.position import FIELD_INTERPOLATIONS, GRID_INTERPOLATIONS, resample_grid, sample_field
from pretrain.backbones.relative import relative_buckets
from pretrain.backbones.rotary import behind_special, of_visible, rotation
from pretrain.registry import BACKBONES

POS_ENCODINGS = ("field", "standard", "rotary", "none")


class Tokens(NamedTuple):
    """What a ViT gives for a batch of images, after the final norm."""

    cls: Tensor  # [B, D]; of a ViT without [CLS] the mean of the patches (ours)
    registers: Tensor  # [B, R, D]
    patches: Tensor  # [B, N, D], row-major, or [B, n, D] in the order of ``visible``


class ViewGroup(NamedTuple):
    """Crops of one size, and where they are: the arguments of :meth:`ViT.embed`."""

    x: Tensor  # [B, 3, H, W]
    boxes: Tensor | None = None  # [B, 4]
    flips: Tensor | None = None  # [B]
    content_mask: Tensor | None = None  # [B, N]
    position_mask: Tensor | None = None  # [B, N]
    visible: Tensor | None = None  # [B, n]
    is_local: bool = False  # last: it is for the final norm alone


class PatchEmbed(nn.Module):
    """Image to patch embeddings: a convolution whose stride is its kernel (key ``proj``)."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, ceil(H / p), ceil(W / p)]; bottom and right are padded to whole patches."""
        pad_h, pad_w = -x.shape[2] % self.patch_size, -x.shape[3] % self.patch_size
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        return self.proj(x)


def resolve_positions(encoding: str, grid: int | None, interpolation: str | None) -> tuple[int, str]:
    """Grid and interpolation of a position encoding, its defaults where none is given.

    Raises:
        ValueError: an encoding, or an interpolation of it, that does not exist.
    """
    if encoding not in POS_ENCODINGS:
        raise ValueError(f"pos_encoding: {encoding!r} is none of {POS_ENCODINGS}")
    if encoding in ("rotary", "none"):
        if grid or interpolation not in (None, "none"):
            given = f"pos_encoding {encoding!r} has neither, not {grid} and {interpolation!r}"
            raise ValueError(f"pos_grid and pos_interpolation: {given}")
        return 0, "none"
    is_field = encoding == "field"
    interpolation = interpolation or ("bicubic" if is_field else "dinov2")
    allowed = FIELD_INTERPOLATIONS if is_field else GRID_INTERPOLATIONS
    if interpolation not in allowed:
        wanted = f"none of {allowed} for pos_encoding {encoding!r}"
        raise ValueError(f"pos_interpolation: {interpolation!r} is {wanted}")
    return grid or (50 if is_field else 14), interpolation


def check_options(**given: Any) -> None:
    """Arguments of :class:`ViT` that exclude each other.

    Raises:
        ValueError: by name.
    """
    dim, heads = given["embed_dim"], given["num_heads"]
    if given["gelu"] not in GELUS:
        raise ValueError(f"gelu: {given['gelu']!r} is none of {tuple(GELUS)}")
    if dim % heads:
        raise ValueError(f"num_heads: {heads} does not divide embed_dim {dim}")
    if given["qkv_bias"] not in QKV_BIASES:
        raise ValueError(f"qkv_bias: {given['qkv_bias']!r} is none of {QKV_BIASES}")
    if given["pos_encoding"] == "rotary" and (given["relative_positions"] or dim // heads % 4):
        needed = "needs heads whose width is a multiple of 4, and no relative positions"
        raise ValueError(f"pos_encoding 'rotary' {needed}")
    if (given["cls_norm"] or given["local_cls_norm"]) and not (given["has_cls"] and given["final_norm"]):
        raise ValueError("cls_norm and local_cls_norm: there is no [CLS], or no final norm")


class ViT(nn.Module):
    """Plain ViT: no windows, any input size.

    Args:
        embed_dim: width of the tokens, D.
        depth: number of blocks.
        num_heads: of the attention.
        mlp_ratio: width of an MLP's hidden layer, in D.
        patch_size: side of a patch in pixels.
        n_registers: learned tokens without a position between [CLS] and the patches (DINOv2-reg).
        layerscale: initial value of LayerScale, none for no LayerScale.
        drop_path: stochastic depth of the last block; linear from 0 over the blocks.
        pos_encoding: ``field`` (paper 3.2.1), ``standard`` (one learned grid, resampled to other sizes), ``rotary``
            (DINOv3; :mod:`pretrain.backbones.rotary`) or ``none``.
        pos_grid: side of the field (paper: 50) or of the learned grid (14 for 224 px).
        pos_interpolation: none for the encoding's default (``bicubic`` | ``dinov2``); see
            :mod:`pretrain.backbones.position`.
        mask_tokens: hold ``mask_token`` and ``pos_mask_token`` [1, D], which only pre-training and position
            probes use.
        attention: ``auto`` | ``sdpa`` | ``xformers``.
        ln_eps: LayerNorm's epsilon.
        gelu: ``erf`` | ``tanh``.
        has_cls: there is a [CLS] token, with a position of its own.
        final_norm: there is a norm after the last block.
        relative_positions: attention adds LoMaR's contextual relative positions
            (:mod:`pretrain.backbones.relative`), with any ``pos_encoding`` but ``rotary``, in LoMaR ``none``.
        qkv_bias: ``all`` | ``no_key`` (DINOv3) | ``none`` (its 7B).
        swiglu: the MLP is gated (:class:`pretrain.backbones.block.SwiGlu`), ``mlp_ratio`` its hidden width to ``embed_dim``.
        cls_norm: [CLS] and registers have a final norm of their own.
        local_cls_norm: those of local crops have one while training (DINOv3's 7B and ViT-L of satellite images).

    Attributes:
        rescale: R, which a training may set: it multiplies rotary places by a factor, log-uniform in [1 / R, R], one a
            pass (DINOv3: 2).

    Raises:
        ValueError: an option that does not exist, by name.
    """

    rescale = 1.0

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        n_registers: int = 0,
        layerscale: float | None = None,
        drop_path: float = 0.0,
        pos_encoding: str = "standard",
        pos_grid: int | None = None,
        pos_interpolation: str | None = None,
        mask_tokens: bool = False,
        attention: str = "auto",
        ln_eps: float = 1e-6,
        gelu: str = "erf",
        has_cls: bool = True,
        final_norm: bool = True,
        relative_positions: bool = False,
        qkv_bias: str = "all",
        swiglu: bool = False,
        cls_norm: bool = False,
        local_cls_norm: bool = False,
    ) -> None:
        super().__init__()
        pos_grid, pos_interpolation = resolve_positions(pos_encoding, pos_grid, pos_interpolation)
        self.embed_dim, self.patch_size = embed_dim, patch_size
        self.n_registers, self.has_cls = n_registers, has_cls
        self.pos_encoding, self.pos_grid, self.pos_interpolation = pos_encoding, pos_grid, pos_interpolation
        # Everything that a file must say so that the same network can be built again.
        sizes = dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=float(mlp_ratio))
        tokens = dict(patch_size=patch_size, n_registers=n_registers, layerscale=layerscale)
        places = dict(pos_encoding=pos_encoding, pos_grid=pos_grid, pos_interpolation=pos_interpolation)
        kinds = dict(
            mask_tokens=mask_tokens, ln_eps=ln_eps, gelu=gelu, has_cls=has_cls, final_norm=final_norm
        )
        self.model_kwargs: dict[str, Any] = {**sizes, **tokens, **places, **kinds}
        self.model_kwargs["relative_positions"] = relative_positions
        # Newer ones: what files and hashes of before say by silence
        added = dict(qkv_bias=qkv_bias, swiglu=swiglu, cls_norm=cls_norm, local_cls_norm=local_cls_norm)
        self.model_kwargs |= {key: value for key, value in added.items() if value not in (False, "all")}
        check_options(**{**self.model_kwargs, **added})
        self.drop_path = drop_path
        self.checkpointing = "none"  # of packed passes, see :func:`pretrain.backbones.block.run_block`
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self._make_tokens(mask_tokens)
        self._make_blocks(attention, qkv_bias, swiglu)
        norm = lambda: nn.LayerNorm(embed_dim, eps=ln_eps)  # noqa: E731
        self.norm = norm() if final_norm else nn.Identity()
        self.cls_norm = norm() if cls_norm else None
        self.local_cls_norm = norm() if local_cls_norm else None
        self._init_weights()

    def _make_tokens(self, mask_tokens: bool) -> None:
        """[CLS], registers, positions and mask tokens; :meth:`_init_weights` fills them."""
        dim, side = self.embed_dim, self.pos_grid
        if self.has_cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if self.n_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, self.n_registers, dim))
        if self.pos_encoding == "field":
            self.pos_field = nn.Parameter(torch.zeros(1, dim, side, side))
            if self.has_cls:
                self.cls_pos = nn.Parameter(torch.zeros(1, 1, dim))
        elif self.pos_encoding == "standard":
            self.pos_embed = nn.Parameter(torch.zeros(1, self.has_cls + side**2, dim))
        if mask_tokens:
            self.mask_token = nn.Parameter(torch.zeros(1, dim))
            self.pos_mask_token = nn.Parameter(torch.zeros(1, dim))

    def _make_blocks(self, attention: str, qkv_bias: str, swiglu: bool) -> None:
        own, names = self.model_kwargs, ("ln_eps", "gelu", "relative_positions")
        dim, heads, ratio, layerscale = (
            own[k] for k in ("embed_dim", "num_heads", "mlp_ratio", "layerscale")
        )
        how: dict[str, Any] = {key: own[key] for key in names} | dict(qkv_bias=qkv_bias, swiglu=swiglu)
        how["attention"] = choose_attention(attention, own["relative_positions"])
        rates = torch.linspace(0, self.drop_path, own["depth"], device="cpu").tolist()
        blocks = (Block(dim, heads, ratio, layerscale, rate, **how) for rate in rates)
        self.blocks = nn.ModuleList(blocks)

    def _init_weights(self) -> None:
        """DINOv2's initialization, and a field of white noise (METHOD.md 2); mask_token stays zero, as DINOv2's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in ("cls_token", "reg_token"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name), std=1e-6)
        for name in ("pos_field", "cls_pos", "pos_embed", "pos_mask_token"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    @property
    def is_gated(self) -> bool:
        """Whether the MLPs are SwiGLUs."""
        return bool(self.model_kwargs.get("swiglu", False))

    @property
    def qkv_bias(self) -> str:
        """Which of queries, keys and values have a bias: one of :data:`pretrain.backbones.attention.QKV_BIASES`."""
        return str(self.model_kwargs.get("qkv_bias", "all"))

    @property
    def n_prefix(self) -> int:
        """Tokens before the first patch: [CLS], if there is one, and the registers."""
        return self.has_cls + self.n_registers

    def grid_of(self, size_px: Sequence[int]) -> tuple[int, int]:
        """Patches (h, w) of an image of (height, width) pixels, whose sides are padded to whole patches."""
        height, width = (math.ceil(side / self.patch_size) for side in size_px)
        return height, width

    def cls_input(self) -> Tensor:
        """The [CLS] token with its position, [1, 1, D]: a learned vector of its own, whatever the crop."""
        if self.pos_encoding in ("rotary", "none"):
            return self.cls_token
        return self.cls_token + (self.cls_pos if self.pos_encoding == "field" else self.pos_embed[:, :1])

    def positions(
        self, grid: tuple[int, int], boxes: Tensor | None = None, flips: Tensor | None = None
    ) -> Tensor:
        """Position embeddings of the patches of a grid (h, w); zeros where there are none to add.

        Without ``boxes``: the plain ViT rule, the same for every image, [1, h * w, D]. With ``boxes`` [V, 4]
        (image units) and ``flips`` [V]: those of V crops, [V, h * w, D]; a standard encoding ignores them
        (DINOv2's way).
        """
        if self.pos_encoding in ("rotary", "none"):
            return self.patch_embed.proj.weight.new_zeros(1, grid[0] * grid[1], self.embed_dim)
        if self.pos_encoding == "standard":
            learned = self.pos_embed[:, self.has_cls :].unflatten(1, (self.pos_grid, -1))  # [1, G, G, D]
            return resample_grid(learned, grid, self.pos_interpolation)
        if boxes is None:  # the whole image
            boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=self.pos_field.device)
        return sample_field(self.pos_field, boxes, grid, flips, self.pos_interpolation)

    def geometry(
        self,
        grid: tuple[int, int],
        boxes: Tensor | None = None,
        flips: Tensor | None = None,
        position_mask: Tensor | None = None,
        visible: Tensor | None = None,
        rescale: Tensor | float = 1.0,
    ) -> Geometry:
        """What blocks must be told of where the tokens are: ``block(tokens, geometry=vit.geometry(grid))``.

        Args:
            grid: (h, w) of the patches.
            boxes, flips, position_mask, visible: of :meth:`embed`, with whose tokens it goes.
            rescale: factor on rotary places (:meth:`draw_rescale`).

        Returns:
            the angles of rotary positions; [S + N, S + N] long, the relative position of each query and key, special
            tokens first; None where there is neither.
        """
        device = self.patch_embed.proj.weight.device
        if self.model_kwargs["relative_positions"]:
            return relative_buckets(grid, self.n_prefix, device)
        if self.pos_encoding != "rotary":
            return None
        if boxes is None:  # the whole image
            boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
        boxes = boxes.to(device, torch.promote_types(self.patch_embed.proj.weight.dtype, torch.float32))
        flips = None if flips is None else flips.to(device)
        head_dim = self.embed_dim // self.model_kwargs["num_heads"]
        angles = rotation(boxes, grid, head_dim, flips, position_mask, rescale)
        return behind_special(angles if visible is None else of_visible(angles, visible), self.n_prefix)

    def draw_rescale(self) -> Tensor | float:
        """The factor of a pass on rotary places."""
        if not self.training or self.rescale == 1 or self.pos_encoding != "rotary":
            return 1.0
        drawn = 2 * torch.rand((), device=self.patch_embed.proj.weight.device) - 1
        return (drawn * math.log(self.rescale)).exp()

    def preprocess(self, image: Any, size_px: int | None = None) -> Tensor:
        """An image as this backbone takes it, on its device: [1, 3, H, W], RGB, ImageNet's mean and deviation
        (other statistics are folded into the patch projection when weights are read).

        Args:
            image: a path, a PIL image, or a uint8 array [H, W, 3] or [H, W].
            size_px: side of the central square, after the shorter side was resized to 256 / 224 of it (DINO's
                evaluations); None: the whole image, its sides rounded to whole patches.

        Raises:
            UserError: it cannot be read, by name.
        """
        from pretrain.data.images import as_input  # above this module: training needs no files here

        return as_input(image, self.patch_size, size_px).to(self.patch_embed.proj.weight)

    def embed(
        self,
        x: Tensor,
        boxes: Tensor | None = None,
        flips: Tensor | None = None,
        content_mask: Tensor | None = None,
        position_mask: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """The sequence that enters the first block (paper 3.3), and its grid.

        Args:
            x: [B, 3, H, W] normalized pixels.
            boxes, flips: [B, 4], [B]: the crops' places (with position augmentation), none for whole images.
            content_mask, position_mask: [B, N] bool; where set, the patch becomes ``e_mask + p`` or ``x +
                e_posmask``.
            visible: [B, n] int64, the patches that enter the sequence, in this order; the same number for
                each image, none of them twice (MAE). Not with relative positions, which belong to whole
                grids.

        Returns:
            [B, S + N, D] and (h, w); the S = :attr:`n_prefix` special tokens stand first. With ``visible``:
            [B, S + n, D].
        """
        is_whole = visible is None or not self.model_kwargs["relative_positions"]
        assert is_whole, "relative positions belong to whole grids"
        maps = self.patch_embed(x)  # [B, D, h, w]
        grid = (maps.shape[2], maps.shape[3])
        content = maps.flatten(2).transpose(1, 2)  # [B, N, D]
        # Under autocast content is bfloat16; positions, ten times smaller at first, and the sum stay float32.
        position = self.positions(grid, boxes, flips)  # [B or 1, N, D]
        if content_mask is not None:
            content = torch.where(content_mask.unsqueeze(-1), self.mask_token.to(content.dtype), content)
        if position_mask is not None:
            masked = self.pos_mask_token.to(position.dtype)
            position = torch.where(position_mask.unsqueeze(-1), masked, position)
        prefix = [self.cls_input().expand(len(x), -1, -1)] if self.has_cls else []
        if self.n_registers:
            prefix.append(self.reg_token.expand(len(x), -1, -1))
        patches = content + position
        if visible is not None:
            patches = patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, self.embed_dim))  # [B, n, D]
        return torch.cat([*prefix, patches], dim=1), grid

    def forward(
        self,
        x: Tensor,
        boxes: Tensor | None = None,
        flips: Tensor | None = None,
        content_mask: Tensor | None = None,
        position_mask: Tensor | None = None,
        visible: Tensor | None = None,
        is_local: bool = False,
    ) -> Tokens:
        """Tokens after the final norm; the arguments are those of :meth:`embed` and :meth:`normed`."""
        tokens, grid = self.embed(x, boxes, flips, content_mask, position_mask, visible)
        geometry = self.geometry(grid, boxes, flips, position_mask, visible, self.draw_rescale())
        for block in self.blocks:
            tokens = block(tokens, geometry=geometry)
        return self.split(self.normed(tokens, is_local))

    def forward_views(self, groups: Sequence[ViewGroup]) -> list[Tokens]:
        """Views of several sizes in one pass: their rows are packed, only attention knows the sequences.

        Equal to :meth:`forward` on each group; in training, the paths that are dropped are drawn for one
        group after the other.
        """
        embedded, grids = zip(*(self.embed(*group[:-1]) for group in groups))  # each [B, n, D] and (h, w)
        rescale = self.draw_rescale()
        geometry = [
            self.geometry(grid, of.boxes, of.flips, of.position_mask, of.visible, rescale)
            for grid, of in zip(grids, groups)
        ]
        shapes: Shapes = [(x.shape[0], x.shape[1]) for x in embedded]
        x = torch.cat([e.flatten(0, 1) for e in embedded])  # [T, D]
        paths = self.draw_paths(shapes, x.device)
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, shapes, None if paths is None else paths[i], self.checkpointing, geometry)
        if self.cls_norm or self.local_cls_norm:
            parts = x.split([b * n for b, n in shapes])
            tokens = [self.normed(p.unflatten(0, s), of.is_local) for p, s, of in zip(parts, shapes, groups)]
            return [self.split(own) for own in tokens]
        packed = self.norm(x).split([b * n for b, n in shapes])
        return [self.split(rows.unflatten(0, shape)) for rows, shape in zip(packed, shapes)]

    def draw_paths(self, shapes: Shapes, device: torch.device) -> Tensor | None:
        """Stochastic depth of a packed pass, [depth, 2, T, 1]: 0 or 1 / keep for each branch; none: no drop."""
        if not self.training or self.drop_path == 0:
            return None
        depth = len(self.blocks)
        # filled there: no copy to wait for
        keep = 1 - torch.linspace(0, self.drop_path, depth, device=device).view(-1, 1, 1)
        factors = [(torch.rand(depth, 2, b, device=device) < keep) / keep for b, _ in shapes]
        rows = [f.unsqueeze(-1).expand(-1, -1, -1, n).flatten(2) for f, (_, n) in zip(factors, shapes)]
        return torch.cat(rows, 2).unsqueeze(-1)

    def normed(self, tokens: Tensor, is_local: bool = False) -> Tensor:
        """[B, S + N, D] after the final norm.

        Args:
            is_local: of local crops, whose special tokens may have a norm of their own while training.
        """
        own = self.local_cls_norm if is_local and self.training and self.local_cls_norm else self.cls_norm
        if own is None:
            return self.norm(tokens)
        return torch.cat([own(tokens[:, : self.n_prefix]), self.norm(tokens[:, self.n_prefix :])], 1)

    def split(self, tokens: Tensor) -> Tokens:
        """[B, S + N, D] -> [CLS], registers, patches."""
        special, patches = tokens[:, : self.n_prefix], tokens[:, self.n_prefix :]
        cls = special[:, 0] if self.has_cls else patches.mean(1)
        return Tokens(cls, special[:, self.has_cls :], patches)

    def feature_map(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> normed patch tokens as a map, [B, D, h, w]."""
        return self(x).patches.transpose(1, 2).unflatten(2, self.grid_of(x.shape[2:]))


def _row(embed_dim: int, depth: int, num_heads: int, gated: int = 0) -> dict[str, Any]:
    """A row of :data:`SIZES`; ``gated``: the hidden width of a SwiGLU."""
    size = dict[str, Any](embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    return {**size, "swiglu": True, "mlp_ratio": gated / embed_dim} if gated else size


SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": _row(192, 12, 3),
    "small": _row(384, 12, 6),
    "small_plus": _row(384, 12, 6, gated=1536),  # DINOv3's, as the next ones
    "base": _row(768, 12, 12),
    "large": _row(1024, 24, 16),
    "large_plus": _row(1024, 24, 16, gated=4096),
    "huge_plus": _row(1280, 32, 20, gated=5120),
    "giant": _row(1536, 40, 24, gated=4096),  # DINOv2's
    "7b": _row(4096, 40, 32, gated=8192),
}


def size_name(backbone: str) -> str | None:
    """The key of :data:`SIZES` in a registry name; None where it is not one of these."""
    size = backbone.removeprefix("vit_").partition("_patch")[0]
    return size if size in SIZES and backbone.startswith(f"vit_{size}_patch") else None


def _register(size: str, n_registers: int) -> None:
    def make(**model_kwargs: Any) -> ViT:
        return ViT(**{**SIZES[size], "patch_size": 16, "n_registers": n_registers, **model_kwargs})

    make.__name__ = f"vit_{size}_patch16" + (f"_reg{n_registers}" if n_registers else "")
    BACKBONES.register(make)


for _size in SIZES:
    for _n_registers in (0, 4):
        _register(_size, _n_registers)
