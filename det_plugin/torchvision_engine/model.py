"""Mask R-CNN, or Faster R-CNN, on a plain ViT: torchvision's frame, Detectron2's definitions.

Where torchvision differs from Detectron2, this engine follows Detectron2:

* RoIAlign is half-pixel aligned with adaptive sampling (``aligned=True, sampling_ratio=0``), and strides are
  given, not inferred from image sizes (:mod:`layers`);
* anchors are not rounded (:mod:`proposals`); box offsets are decoded in float32 (:mod:`layers`);
* all box losses are L1; both RPN losses are divided by ``rpn_batch_per_image * images`` (:mod:`proposals`,
  :mod:`heads`);
* heads: four convolutions without bias, each with LayerNorm; no box offsets or mask for the background;
  Detectron2's initialization (:mod:`heads`);
* ground-truth masks are polygons, cut at the crop's edges and filled at the mask head's resolution under each
  sampled box; bitmaps where an image has an RLE (:mod:`masks`);
* tests drop boxes without extent after the NMS, and sample predicted masks at sub-pixel positions
  (:mod:`heads`, :mod:`predict`);
* pixels are padded with zeros after normalization, to a square of whole strides of the coarsest map
  (:class:`SquarePad`).

What still differs from Detectron2's ViTDet configuration:

* class 0 is background (Detectron2: the last class), a permutation of the classifier's rows;
* the crop is cut while resizing, not after it: gray values differ by up to 2 of 255;
* polygons that leave the image are cut at its edge, also if the image is smaller than the crop;
* images come in one shuffled order, not in two groups by aspect ratio (all are padded to the same square).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList

from det_plugin.features import FeatureOptions, detection_features, prepare
from det_plugin.protocol import DetectionProtocol
from det_plugin.torchvision_engine.heads import DetectionHeads
from det_plugin.torchvision_engine.layers import ConvNorm, Sizes, get_norm
from det_plugin.torchvision_engine.proposals import ProposalNetwork
from pretrain.backbones.vit import ViT
from pretrain.errors import UserError


def pyramid_strides(patch_size: int, scales: tuple[float, ...]) -> list[int]:
    """Strides of the levels and the max-pooled one, in pixels: (4, 2, 1, .5) of 16 give 4, 8, 16, 32, 64.

    Raises:
        UserError: the strides are no powers of two.
    """
    strides = [patch_size / scale for scale in scales]
    if any(stride < 1 or not math.log2(stride).is_integer() for stride in strides):
        given = f"patch_size {patch_size} and scales {scales}"
        raise UserError(f"pyramid: {given} give strides {strides}, not powers of two")
    return [int(stride) for stride in (*strides, 2 * strides[-1])]


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's (Li et al., 2022, section 3): levels from a plain ViT's last map, and a max-pooled one.

    Keys are Detectron2's (``simfp_2`` ... ``simfp_5``, by the logarithm of the stride), so weights can be
    exchanged.

    Args:
        dim: D, of the ViT.
        patch_size: its stride in pixels.
        scales: 4, 2, 1, 0.5, or the end of it.
    """

    def __init__(
        self, dim: int, patch_size: int, channels: int, scales: tuple[float, ...], norm: str
    ) -> None:
        super().__init__()
        self.strides = pyramid_strides(patch_size, scales)
        self.levels = [int(math.log2(stride)) for stride in self.strides]
        for scale, level in zip(scales, self.levels):
            resize, width = _resize(dim, scale, norm)
            project = [ConvNorm(width, channels, 1, norm), ConvNorm(channels, channels, 3, norm)]
            self.add_module(f"simfp_{level}", nn.Sequential(*resize, *project))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, D, h, w] -> ``{"p2": [B, C, 4h, 4w], ..., "p6": [B, C, h / 4, w / 4]}``, finest first."""
        maps = {f"p{level}": self.get_submodule(f"simfp_{level}")(x) for level in self.levels[:-1]}
        last = maps[f"p{self.levels[-2]}"]
        maps[f"p{self.levels[-1]}"] = F.max_pool2d(last, kernel_size=1, stride=2)
        return maps


def _resize(dim: int, scale: float, norm: str) -> tuple[list[nn.Module], int]:
    """The layers that change the resolution by ``scale``, and the width after them."""
    if scale == 4.0:
        first = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        second = nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)
        return [first, get_norm(norm, dim // 2), nn.GELU(), second], dim // 4
    if scale == 2.0:
        return [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)], dim // 2
    return [nn.MaxPool2d(2, stride=2)] if scale == 0.5 else [], dim


class PyramidBackbone(nn.Module):
    """The ViT (key ``vit``) under its pyramid (key ``pyramid``)."""

    def __init__(self, vit: ViT, pyramid: SimpleFeaturePyramid, options: FeatureOptions) -> None:
        super().__init__()
        self.vit, self.pyramid, self.options = vit, pyramid, options
        prepare(vit, options)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, S, S] normalized pixels -> the pyramid's maps."""
        features = detection_features(self.vit, x, self.options)  # [B, D, S / p, S / p]
        return self.pyramid(features.contiguous(memory_format=torch.channels_last))


class SquarePad(nn.Module):
    """Images of any size up to the square -> one normalized batch. :mod:`augment` resizes them.

    Args:
        stride: the square's side S is the protocol's ``image_size_px``, rounded up to a multiple of it, as in
            Detectron2.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, protocol: DetectionProtocol, stride: int = 1) -> None:
        super().__init__()
        self.size = math.ceil(protocol.image_size_px / stride) * stride
        self.register_buffer("mean", torch.tensor(protocol.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(protocol.pixel_std).view(3, 1, 1), persistent=False)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """uint8 RGB [3, h_i, w_i], at most the square's -> float [B, 3, S, S] and the sizes (h_i, w_i)."""
        batch = self.mean.new_zeros(len(images), 3, self.size, self.size)
        for row, image in zip(batch, images):
            row[:, : image.shape[1], : image.shape[2]] = (image - self.mean) / self.std
        return ImageList(batch, [(image.shape[1], image.shape[2]) for image in images]), targets

    def postprocess(
        self, result: list[dict[str, Tensor]], image_shapes: Sizes, original_image_sizes: Sizes
    ) -> list[dict[str, Tensor]]:
        """Detections as they are: pasting masks needs the image's own size."""
        return result


def build_model(
    vit: ViT, protocol: DetectionProtocol, *, checkpointing: bool = False, compile: bool = False
) -> GeneralizedRCNN:
    """The detector around a backbone.

    In training, ``model(images, targets)`` gives the losses ``loss_rpn_cls``, ``loss_rpn_loc``, ``loss_cls``,
    ``loss_box_reg``, and with masks ``loss_mask``. In tests, ``model(images)`` gives :meth:`DetectionHeads.forward`'s
    detections, in pixels of the resized image.

    Args:
        checkpointing, compile: as in :class:`det_plugin.features.FeatureOptions`.

    Raises:
        UserError: the patch size gives strides that are no powers of two, or the engine has no such norm.
    """
    p, options = protocol, FeatureOptions.of(protocol, checkpointing, compile)
    pyramid = SimpleFeaturePyramid(vit.embed_dim, vit.patch_size, p.channels, p.pyramid_scales, p.norm)
    backbone = PyramidBackbone(vit, pyramid, options)
    rpn = ProposalNetwork(protocol, pyramid.strides)
    *strides, _ = pyramid.strides  # the last level is max-pooled
    heads = DetectionHeads(protocol, strides)
    return GeneralizedRCNN(backbone, rpn, heads, SquarePad(protocol, strides[-1]))
