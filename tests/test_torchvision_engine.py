"""The torchvision engine's network is Detectron2's ViTDet Mask R-CNN around our ViT, definition by
definition."""

import importlib.util
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coco_fixture import write_coco

from det_plugin.coco.annotations import read_split
from det_plugin.coco.masks import Polygons, crop_masks
from det_plugin.features import FeatureOptions, detection_features
from det_plugin.protocol import DetectionProtocol, protocol, with_overrides
from det_plugin.torchvision_engine.heads import DetectionHeads, box_losses, mask_loss
from det_plugin.torchvision_engine.layers import BoxCoder, LayerNorm2d, RoIPooler, assign_levels
from det_plugin.torchvision_engine.loader import TrainSamples, to_device
from det_plugin.torchvision_engine.model import SimpleFeaturePyramid, SquarePad, build_model, pyramid_strides
from det_plugin.torchvision_engine.optim import build_optimizer, lr_at, set_lr
from det_plugin.torchvision_engine.proposals import Anchors, ProposalNetwork
from pretrain.build import build_backbone
from pretrain.errors import UserError

TINY = "vit_tiny_patch16"
SMALL = with_overrides(
    protocol("coco-12ep", TINY),
    dict(image_size_px=128, channels=16, box_fc=32, box_convs=2, mask_convs=2, num_classes=3, roi_batch_per_image=32,
         rpn_pre_nms=(200, 100), rpn_post_nms=(100, 50), anchor_sizes_px=(8, 16, 32, 64, 128), drop_path=0.0, amp=False,
         score_threshold=0.001),
)  # fmt: skip
needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2, the oracle, is not installed"
)


def boxes(n, size=120.0, seed=0):
    """[n, 4] boxes of 4 px and more within size + 40 px."""
    rng = torch.Generator().manual_seed(seed)
    corner, side = torch.rand(n, 2, generator=rng) * size, torch.rand(n, 2, generator=rng) * 36 + 4
    return torch.cat([corner, corner + side], dim=1)


def detector(recipe=SMALL, **model_kwargs):
    """A detector whose weights are of ordinary size everywhere."""
    torch.manual_seed(0)
    model = build_model(
        build_backbone(TINY, **{"depth": 2, "drop_path": recipe.drop_path, **model_kwargs}), recipe
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.03 if parameter.ndim > 1 else 0.01))
    return model


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Two training samples, one with bitmaps and one with polygons: images and targets."""
    root = write_coco(tmp_path_factory.mktemp("data") / "coco")
    samples = TrainSamples(read_split(root, "train", num_classes=3, training=True), SMALL, seed=0)
    has_bitmaps = [isinstance(samples[i]["masks"], torch.Tensor) for i in range(10)]
    return to_device(
        [samples[has_bitmaps.index(True)], samples[has_bitmaps.index(False)]], torch.device("cpu")
    )


# --- the backbone's map -----------------------------------------------------------------------------------


def test_detection_features_are_the_feature_map():
    vit = build_backbone("vit_tiny_patch16_reg4", depth=2, pos_encoding="field").eval()
    x = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))  # padded to 48 x 64 inside
    found = detection_features(vit, x, FeatureOptions(True, True))
    assert found.shape == (2, 192, 3, 4)
    assert torch.equal(found, vit.feature_map(x))
    raw = detection_features(vit, x, FeatureOptions(False, True))
    torch.testing.assert_close(
        vit.norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), found, atol=1e-6, rtol=1e-5
    )


def test_detection_features_without_special_tokens_do_not_see_them():
    vit = build_backbone("vit_tiny_patch16_reg4", depth=2).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {keep: detection_features(vit, x, FeatureOptions(True, keep)) for keep in (True, False)}
    with torch.no_grad():
        vit.cls_token.add_(1.0)
        vit.reg_token.add_(1.0)
    assert torch.equal(detection_features(vit, x, FeatureOptions(True, False)), before[False])
    after = detection_features(vit, x, FeatureOptions(True, True))
    assert not torch.allclose(after, before[True])


# --- the pyramid ------------------------------------------------------------------------------------------


def test_pyramid_strides():
    assert pyramid_strides(16, (4.0, 2.0, 1.0, 0.5)) == [4, 8, 16, 32, 64]
    assert pyramid_strides(8, (2.0, 1.0)) == [4, 8, 16]
    with pytest.raises(UserError, match="patch_size 14"):
        pyramid_strides(14, (4.0, 2.0, 1.0, 0.5))
    with pytest.raises(UserError, match="norm='BN'"):
        SimpleFeaturePyramid(16, 16, 8, (1.0,), "BN")


def test_layer_norm_2d_is_layer_norm_over_channels():
    norm, x = LayerNorm2d(6), torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7))
        norm.bias.fill_(0.5)
    by_hand = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), by_hand * torch.arange(1.0, 7).view(1, -1, 1, 1) + 0.5)


@needs_detectron2
def test_pyramid_equals_detectron2():
    from detectron2.modeling import SimpleFeaturePyramid as Reference
    from detectron2.modeling.backbone import Backbone
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool

    class Map(Backbone):
        _out_features, _out_feature_channels, _out_feature_strides = ["map"], {"map": 32}, {"map": 16}

        def forward(self, x):
            return {"map": x}

    scales = (4.0, 2.0, 1.0, 0.5)
    ours, theirs = (
        SimpleFeaturePyramid(32, 16, 8, scales, "LN"),
        Reference(Map(), "map", 8, scales, LastLevelMaxPool(), "LN"),
    )
    x = torch.randn(2, 32, 6, 4, generator=torch.Generator().manual_seed(0))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected = theirs(x)
        found = ours(x.contiguous(memory_format=torch.channels_last))
        assert list(found) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
        for name, level in expected.items():
            assert level.abs().max() > 0.05
            torch.testing.assert_close(found[name], level, atol=1e-5, rtol=1e-5)
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        ours.load_state_dict(theirs.state_dict())
        for name, level in theirs(x).items():
            torch.testing.assert_close(ours(x)[name], level, atol=1e-5, rtol=1e-5)


# --- boxes, anchors, pooling ------------------------------------------------------------------------------


def test_decode_inverts_encode_and_clamps():
    references, targets, coder = boxes(50), boxes(50, seed=1), BoxCoder((10.0, 10.0, 5.0, 5.0))
    (deltas,) = coder.encode([targets], [references])
    torch.testing.assert_close(coder.decode(deltas, [references])[:, 0], targets, atol=1e-3, rtol=1e-5)
    reference = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    huge = BoxCoder((1.0,) * 4).decode(torch.tensor([[0.0, 0.0, 100.0, 100.0]]), [reference])
    torch.testing.assert_close(huge[0, 0, 2:] - huge[0, 0, :2], torch.tensor([1000.0, 1000.0]))
    assert coder.decode(deltas, [references.bfloat16()]).dtype == torch.float32


@needs_detectron2
def test_boxes_equal_detectron2():
    from detectron2.modeling.box_regression import Box2BoxTransform

    references, targets, weights = boxes(50), boxes(50, seed=1), (10.0, 10.0, 5.0, 5.0)
    theirs, coder = Box2BoxTransform(weights), BoxCoder(weights)
    torch.testing.assert_close(
        coder.encode([targets], [references])[0], theirs.get_deltas(references, targets)
    )
    deltas = torch.randn(50, 12, generator=torch.Generator().manual_seed(2)) * 5
    torch.testing.assert_close(
        coder.decode(deltas, [references]).flatten(1), theirs.apply_deltas(deltas, references)
    )


def test_anchors_by_hand():
    anchors = Anchors((32, 64), (0.5, 1.0, 2.0), [4, 8])
    images = SquarePad(SMALL)([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2)[0]
    first, second = anchors(images, [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)])
    assert first is second and first.shape == (2 * 3 * 3 + 3, 4)
    w = math.sqrt(32 * 32 / 0.5)  # not rounded: 45.25
    assert first[0].tolist() == pytest.approx([-w / 2, -w / 4, w / 2, w / 4])
    assert first[1].tolist() == [-16, -16, 16, 16]
    assert first[4].tolist() == [4 - 16, -16, 4 + 16, 16]  # one stride to the right
    assert first[10].tolist() == [-16, 4 - 16, 16, 4 + 16]  # the next row
    assert first[19].tolist() == [-32, -32, 32, 32]


@needs_detectron2
def test_anchors_equal_detectron2():
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

    sizes, strides = SMALL.anchor_sizes_px, [4, 8, 16, 32, 64]
    maps = [torch.zeros(1, 1, 128 // s, 96 // s) for s in strides]
    theirs = DefaultAnchorGenerator(
        sizes=[[s] for s in sizes], aspect_ratios=[0.5, 1.0, 2.0], strides=strides, offset=0.0
    )
    images = SquarePad(SMALL)([torch.zeros(3, 8, 8, dtype=torch.uint8)])[0]
    found = Anchors(sizes, (0.5, 1.0, 2.0), strides)(images, maps)[0]
    torch.testing.assert_close(found, torch.cat([level.tensor for level in theirs(maps)]))


def test_levels_by_size():
    sizes = torch.tensor([10.0, 56, 111, 112, 223, 224, 447, 448, 4000])
    found = assign_levels(torch.stack([sizes * 0, sizes * 0, sizes, sizes], dim=1), 2, 5)
    assert found.tolist() == [2, 2, 2, 3, 3, 4, 4, 5, 5]


@needs_detectron2
def test_pooling_equals_detectron2():
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    rng = torch.Generator().manual_seed(0)
    strides = [4, 8, 16, 32]
    maps = [torch.randn(2, 5, 512 // s, 512 // s, generator=rng) for s in strides]
    images = [
        torch.cat([boxes(20, 300), boxes(5, 20) * 8]),
        boxes(7, 300, seed=3) * torch.tensor([0.1, 0.1, 1, 1]),
    ]
    theirs = ROIPooler(7, [1 / s for s in strides], sampling_ratio=0, pooler_type="ROIAlignV2")
    expected = theirs(maps, [Boxes(b) for b in images])
    torch.testing.assert_close(RoIPooler(7, strides)(maps, images), expected, atol=1e-5, rtol=1e-5)


# --- losses -----------------------------------------------------------------------------------------------


def test_proposal_losses_by_hand():
    """Both are divided by rpn_batch_per_image * images, however few anchors were sampled."""
    network = ProposalNetwork(SMALL, [4, 8, 16, 32, 64])
    labels = [torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, -1.0, -1.0])]
    logits = torch.tensor([2.0, -1.0, 9.0, 0.5, 9.0, 9.0]).view(-1, 1)
    deltas = torch.zeros(6, 4)
    targets = [torch.tensor([[1.0, -2.0, 0.5, 0.25]] * 3), torch.full((3, 4), 7.0)]
    loss_cls, loss_loc = network.compute_loss(logits, deltas, labels, targets)
    by_hand = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))
    assert loss_cls.item() == pytest.approx(by_hand / (256 * 2))
    assert loss_loc.item() == pytest.approx(3.75 / (256 * 2))  # L1 of the one object


def test_box_losses_by_hand():
    """The offsets' L1 is divided by all boxes, objects or not."""
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 2, 0, 0])
    offsets, targets = torch.zeros(4, 12), torch.full((4, 4), 2.0)
    offsets[1, 8:] = torch.tensor([1.0, 1.0, 1.0, 4.0])  # of class 2
    loss_cls, loss_box = box_losses(logits, offsets, labels, targets)
    assert loss_cls.item() == pytest.approx(math.log(3))
    assert loss_box.item() == pytest.approx((1 + 1 + 1 + 2) / 4)
    nothing = box_losses(
        logits[:0], offsets[:0], labels[:0], targets[:0]
    )  # of an empty image without a proposal
    assert [loss.item() for loss in nothing] == [0, 0]


def test_mask_loss_by_hand():
    logits, targets = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4)
    logits[0, 1], targets[0] = 3.0, 1.0  # class 2 stands in channel 1: there is no background
    expected = (math.log1p(math.exp(-3)) + math.log(2)) / 2
    assert mask_loss(logits, torch.tensor([2, 3]), targets).item() == pytest.approx(expected)
    nothing = torch.zeros(0, 3, 4, 4, requires_grad=True)
    assert mask_loss(nothing, torch.zeros(0, dtype=torch.long), torch.zeros(0, 4, 4)).item() == 0


def test_crop_masks_is_exact_where_box_and_grid_agree():
    mask = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (2, 30, 30)).astype(np.uint8))
    found = crop_masks(
        mask, torch.tensor([1, 0]), torch.tensor([[3.0, 5.0, 17.0, 19.0], [0.0, 0.0, 28.0, 28.0]]), 14
    )
    assert torch.equal(found[0], mask[1, 5:19, 3:17].float())  # a cell a pixel
    halves = F.avg_pool2d(mask[:1, :28, :28].float(), 2)[0] >= 0.5  # 2 x 2 pixels a cell
    assert torch.equal(found[1].bool(), halves)


@needs_detectron2
def test_filtering_at_test_time_equals_detectron2():
    """Also of boxes that nothing is left of at the image's edge: they take part in the NMS and count among
    the best."""
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference

    rng = torch.Generator().manual_seed(0)
    proposals = [boxes(80, 140), boxes(50, 60, seed=1)]
    shapes = [(90, 110), (100, 60)]
    logits, deltas = torch.randn(130, 4, generator=rng) * 2, torch.randn(130, 16, generator=rng)
    found = DetectionHeads(SMALL, [4, 8, 16, 32]).postprocess_detections(logits, deltas, proposals, shapes)
    decoded = (
        Box2BoxTransform(SMALL.box_weights).apply_deltas(deltas[:, 4:], torch.cat(proposals)).split([80, 50])
    )
    scores = logits.roll(-1, 1).softmax(-1).split([80, 50])  # background last
    expected, _ = fast_rcnn_inference(decoded, scores, shapes, SMALL.score_threshold, SMALL.nms, 100)
    for ours, scores, labels, reference in zip(*found, expected):
        torch.testing.assert_close(ours, reference.pred_boxes.tensor, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(scores, reference.scores)
        assert torch.equal(labels - 1, reference.pred_classes)
    assert not (found[0][0][:, 2:] > found[0][0][:, :2]).all()


@pytest.mark.parametrize("masks", ["auto", "off"])
def test_images_without_objects_train(batch, masks):
    """The losses of the background count, all others are zero, and so is every gradient of what they alone
    teach."""
    images, _ = batch
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    shapes = (Polygons([]), torch.zeros(0, *images[1].shape[1:], dtype=torch.uint8))
    targets = [{**empty, "masks": own} if masks == "auto" else empty for own in shapes]
    model = detector(with_overrides(SMALL, {"masks": masks})).train()
    losses = model(images, targets)
    zero = {name for name, loss in losses.items() if loss == 0}
    assert zero == {"loss_box_reg", "loss_rpn_loc", *["loss_mask"] * (masks == "auto")}
    assert losses["loss_cls"] > 0 and losses["loss_rpn_cls"] > 0
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    unmoved = {name for name, gradient in gradients.items() if not gradient.any()}
    taught_by_objects = ("bbox_pred", "mask_head")
    assert unmoved == {name for name in gradients if any(part in name for part in taught_by_objects)}


def test_padding_comes_after_normalization():
    image = torch.full((3, 5, 7), 200, dtype=torch.uint8)
    images, _ = SquarePad(SMALL)([image, image[:, :2]])
    assert images.tensors.shape == (2, 3, 128, 128) and images.image_sizes == [(5, 7), (2, 7)]
    expected = (200 - torch.tensor(SMALL.pixel_mean)) / torch.tensor(SMALL.pixel_std)
    torch.testing.assert_close(images.tensors[0, :, 4, 6], expected)
    outside = images.tensors[0, :, 5:], images.tensors[0, :, :, 7:], images.tensors[1, :, 2:]
    assert all(padding.abs().max() == 0 for padding in outside)


@needs_detectron2
@pytest.mark.parametrize("size", [96, 72])
def test_padded_batches_equal_detectron2(size):
    """Also where the size is no multiple of the coarsest map's stride: the square grows."""
    from detectron2.config import instantiate

    from det_plugin.detectron2_engine.lazy import config

    recipe, rng = with_overrides(SMALL, dict(image_size_px=size)), torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (3, *shape), generator=rng, dtype=torch.uint8)
        for shape in ((size, 50), (40, size))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = instantiate(config(recipe, TINY, device="cpu", model_kwargs=dict(depth=2)).model)
    expected, found = (
        theirs.preprocess_image([{"image": image} for image in images]),
        detector(recipe).transform(images)[0],
    )
    assert found.tensors.shape == (2, 3, 96, 96) and found.image_sizes == expected.image_sizes
    torch.testing.assert_close(found.tensors, expected.tensor)


# --- the whole detector -----------------------------------------------------------------------------------


def detectron2_names(state):
    """Our state dict under Detectron2's names; its background is the last class."""
    rules = [
        (r"^backbone\.vit\.", "backbone.net.vit."), (r"^backbone\.pyramid\.", "backbone."),
        (r"^rpn\.head\.conv\.(\d)\.0\.", r"proposal_generator.rpn_head.conv.conv\1."),
        (r"^rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
        (r"^rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
        (r"box_head\.convs\.0\.", "box_head.conv1."), (r"box_head\.convs\.1\.", "box_head.conv2."),
        (r"mask_head\.convs\.0\.", "mask_head.mask_fcn1."), (r"mask_head\.convs\.1\.", "mask_head.mask_fcn2."),
        (r"box_head\.fc\.", "box_head.fc1."), (r"box_head\.(cls_score|bbox_pred)", r"box_predictor.\1"),
    ]  # fmt: skip
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value.roll(-1, 0) if "cls_score" in name else value
    return renamed


@needs_detectron2
@pytest.mark.parametrize("masks", ["auto", "on", "off"])
def test_losses_gradients_and_detections_equal_detectron2(batch, masks):
    """Both engines, the same weights, images and random numbers: the same of everything, with masks, with
    masks of some objects, and without, an image without objects among the others."""
    from detectron2.config import instantiate
    from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
    from detectron2.utils.events import EventStorage

    from det_plugin.detectron2_engine.lazy import config

    images, targets = batch
    assert {type(target["masks"]) for target in targets} == {Polygons, torch.Tensor}
    noise = torch.randint(0, 256, (3, 90, 70), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": Polygons([])}
    images, targets = [*images, noise], [*targets, nothing]
    recipe = with_overrides(SMALL, {"masks": masks})
    if masks == "off":
        targets = [{key: target[key] for key in ("boxes", "labels")} for target in targets]
    if masks == "on":
        targets[1] = {**targets[1], "has_mask": torch.tensor([True, False])}
    ours = detector(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = instantiate(config(recipe, TINY, device="cpu", model_kwargs=dict(depth=2)).model)
    theirs.load_state_dict(detectron2_names(ours.state_dict()))
    inputs = []
    for image, target in zip(images, targets):
        objects = Instances(
            tuple(image.shape[1:]), gt_boxes=Boxes(target["boxes"]), gt_classes=target["labels"] - 1
        )
        if (own := target.get("masks")) is not None:
            objects.gt_masks = (
                PolygonMasks(own.objects) if isinstance(own, Polygons) else BitMasks(own.bool())
            )
        if "has_mask" in target:
            objects.gt_has_mask = target["has_mask"]
        inputs.append(dict(image=image, instances=objects, height=image.shape[1], width=image.shape[2]))

    torch.manual_seed(3)
    found = ours.train()(images, targets)
    torch.manual_seed(3)
    with EventStorage():
        expected = theirs.train()(inputs)
    assert found.keys() == expected.keys() and all(value > 0 for value in found.values())
    assert ("loss_mask" in found) == (masks != "off") and len(found) == 4 + (masks != "off")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    if masks == "on":
        torch.manual_seed(3)
        every = ours(images, [{key: t[key] for key in ("boxes", "labels", "masks")} for t in targets])
        assert {name for name in found if found[name] != every[name]} == {"loss_mask"}
    sum(found.values()).backward()
    sum(expected.values()).backward()
    gradients = detectron2_names({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)

    with torch.no_grad():
        detections, results = ours.eval()(images), theirs.eval()(inputs)
    for detection, result in zip(detections, results):
        reference = result["instances"]
        assert len(detection["boxes"]) == len(reference) == 100
        torch.testing.assert_close(detection["boxes"], reference.pred_boxes.tensor, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(detection["scores"], reference.scores, atol=1e-6, rtol=1e-5)
        assert torch.equal(detection["labels"] - 1, reference.pred_classes)
        if masks != "off":
            assert detection["masks"].shape == (100, 1, 28, 28)
        else:
            assert detection.keys() == {"boxes", "scores", "labels"} and not reference.has("pred_masks")


# --- optimization -----------------------------------------------------------------------------------------


def test_learning_rate_of_the_protocol():
    full = DetectionProtocol(lr=2.0)
    assert lr_at(0, full) == pytest.approx(2.0 * 0.001)
    assert lr_at(125, full) == pytest.approx(2.0 * 0.5005)
    assert [lr_at(it, full) for it in (250, 19_666)] == [2.0, 2.0]
    assert [lr_at(it, full) for it in (19_667, 21_305, 21_306, 22_127)] == pytest.approx(
        [0.2, 0.2, 0.02, 0.02]
    )


@pytest.mark.parametrize(
    "total, milestones, warmup", [(22_128, (19_667, 21_306), 250), (40, (10, 30), 20), (30, (29,), 0)]
)
@needs_detectron2
def test_learning_rate_equals_detectron2(total, milestones, warmup):
    from detectron2.solver import WarmupParamScheduler
    from fvcore.common.param_scheduler import MultiStepParamScheduler

    recipe = DetectionProtocol(max_iters=total, milestones=milestones, warmup_iters=warmup, lr=1.0)
    steps = MultiStepParamScheduler([0.1**k for k in range(len(milestones) + 1)], total, list(milestones))
    theirs = WarmupParamScheduler(steps, 0.001, warmup / total)
    for it in {0, 1, warmup // 2, warmup, *milestones, *(m - 1 for m in milestones), total - 1}:
        assert lr_at(it, recipe) == pytest.approx(theirs(it / total)), it


def test_optimizer_groups():
    model = detector(layerscale=1e-5, n_registers=2)
    optimizer = build_optimizer(model, SMALL)
    set_lr(optimizer, 0.5)
    of = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    named = {name: of[id(p)] for name, p in model.named_parameters()}
    assert len(named) == len(of)
    assert named["backbone.vit.reg_token"] == (0.5 * 0.7**3, 0.1)
    assert named["backbone.vit.pos_embed"] == (0.5 * 0.7**3, 0.0)
    assert named["backbone.vit.blocks.1.ls2.gamma"] == (0.5 * 0.7, 0.0)
    assert named["backbone.vit.blocks.0.attn.proj.bias"] == (0.5 * 0.7**2, 0.1)
    assert named["backbone.vit.norm.weight"] == (0.5, 0.0)
    assert {value for name, value in named.items() if ".vit." not in name} == {(0.5, 0.1)}


def test_unused_final_norm_is_not_trained():
    model = detector(with_overrides(SMALL, dict(final_norm=False)))
    assert not any(p.requires_grad for p in model.backbone.vit.norm.parameters())
    names = {id(p) for group in build_optimizer(model, SMALL).param_groups for p in group["params"]}
    assert id(model.backbone.vit.norm.weight) not in names
