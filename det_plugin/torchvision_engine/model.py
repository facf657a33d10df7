"""Mask R-CNN on a plain ViT: torchvision's frame, Detectron2's definitions.

Where torchvision differs from Detectron2, this engine follows Detectron2:

* RoIAlign is half-pixel aligned with adaptive sampling (``aligned=True, sampling_ratio=0``), and strides are
  given, not inferred from image sizes (:mod:`pooling`);
* anchors are not rounded (:mod:`proposals`); box offsets are decoded in float32 (:mod:`boxes`);
* all box losses are L1; both RPN losses are divided by ``rpn_batch_per_image * images`` (:mod:`proposals`,
  :mod:`heads`);
* heads: four convolutions without bias, each with LayerNorm; no box offsets or mask for the background;
  Detectron2's initialization (:mod:`heads`);
* ground-truth masks are polygons, cut at the crop's edges and filled at the mask head's resolution under each
  sampled box; bitmaps where an image has an RLE (:mod:`masks`);
* tests drop boxes without extent after the NMS, and sample predicted masks at sub-pixel positions
  (:mod:`heads`, :mod:`evaluate`);
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
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList

from det_plugin.features import FeatureOptions
from det_plugin.protocol import DetectionProtocol
from det_plugin.torchvision_engine.heads import DetectionHeads
from det_plugin.torchvision_engine.proposals import ProposalNetwork
from det_plugin.torchvision_engine.pyramid import PyramidBackbone, SimpleFeaturePyramid
from pretrain.backbones.vit import ViT


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
        """uint8 RGB [3, h_i, w_i], no side above the square's -> float [B, 3, S, S] and the sizes (h_i,
        w_i)."""
        batch = self.mean.new_zeros(len(images), 3, self.size, self.size)
        for row, image in zip(batch, images):
            row[:, : image.shape[1], : image.shape[2]] = (image - self.mean) / self.std
        return ImageList(batch, [(image.shape[1], image.shape[2]) for image in images]), targets

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Detections as they are. Pasting masks needs the image's own size, which only the evaluation
        knows."""
        return result


def build_model(
    vit: ViT, protocol: DetectionProtocol, *, checkpointing: bool = False, compile: bool = False
) -> GeneralizedRCNN:
    """The detector around a backbone.

    In training, ``model(images, targets)`` gives the losses ``loss_rpn_cls``, ``loss_rpn_loc``, ``loss_cls``,
    ``loss_box_reg``, ``loss_mask``. In tests, ``model(images)`` gives :meth:`DetectionHeads.forward`'s
    detections, in pixels of the resized image.

    Args:
        checkpointing, compile: as in :class:`det_plugin.features.FeatureOptions`.

    Raises:
        UserError: the patch size gives strides that are no powers of two, or the engine has no such norm.
    """
    pyramid = SimpleFeaturePyramid(
        vit.embed_dim, vit.patch_size, protocol.channels, protocol.pyramid_scales, protocol.norm
    )
    options = FeatureOptions.of(protocol, checkpointing=checkpointing, compile=compile)
    backbone = PyramidBackbone(vit, pyramid, options)
    rpn = ProposalNetwork(protocol, pyramid.strides)
    heads, coarsest = (
        DetectionHeads(protocol, pyramid.strides[:-1]),
        pyramid.strides[-2],
    )  # what comes after it is max-pooled
    return GeneralizedRCNN(backbone, rpn, heads, SquarePad(protocol, coarsest))
