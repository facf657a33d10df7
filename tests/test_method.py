"""Teacher and student: what each sees, and the step's total against its parts."""

import numpy as np
import pytest
import torch
from photos import TINY, write_photos

from pretrain.config import load_config
from pretrain.data.loader import build_dataset, build_loader
from pretrain.losses import cross_entropy, koleo_loss
from pretrain.methods.intertwined import Intertwined

BASELINE = ["positions.encoding=standard", "positions.grid=4", "positions.interpolation=dinov2", "positions.augment=false"]
BASELINE += ["masks.position_share=0.0", "losses.position=0.0"]


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos")


def first_batch(config):
    return next(iter(build_loader(config, build_dataset(config), 0, 1)))[0]


def double_method(config):
    torch.manual_seed(0)
    method = Intertwined(config).double()
    with torch.no_grad():  # teacher and student apart, LayerScale and mask tokens of a size that can be seen
        for i, p in enumerate(method.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) * 0.1)
    return method


def test_the_students_unmasked_input_is_the_teachers(folder):
    config = load_config(None, [*TINY, f"data.root={folder}", "backbone.n_registers=2"])
    batch = first_batch(config).to(torch.device("cpu"), torch.float64)
    method = double_method(config)
    method.teacher.load_state_dict(method.student.state_dict())
    boxes, flips = batch.views.globals
    teacher, grid = method.backbone_of("teacher").embed(batch.global_crops, boxes, flips)
    masks = batch.masks
    student, _ = method.backbone_of("student").embed(batch.global_crops, boxes, flips, masks.content, masks.position)
    assert grid == (4, 4) and masks.content.any() and masks.position.any()
    masked = masks.content | masks.position
    same = (student[:, 3:] == teacher[:, 3:]).all(-1)
    assert torch.equal(same, ~masked)  # bit for bit where nothing is masked, and only there
    assert torch.equal(student[:, :3], teacher[:, :3])


@pytest.mark.parametrize("extra", [[], BASELINE, ["losses.centering=sinkhorn_knopp"]], ids=["method", "baseline", "sinkhorn"])
def test_a_steps_loss_is_equation_6(folder, extra):
    """The terms restated with loops over views and patches from the networks' own outputs."""
    config = load_config(None, [*TINY, f"data.root={folder}", "run.precision=float64", "backbone.drop_path=0.0", *extra])
    batch = first_batch(config).to(torch.device("cpu"), torch.float64)
    method = double_method(config).eval()  # eval: the centres stay
    terms = method(batch)
    n_images, views = batch.n_images, batch.views
    student, teacher = method.student, method.teacher
    crops = list(batch.global_crops.split(n_images)) + list(batch.local_crops.split(n_images))
    tokens_s, tokens_t = [], []
    for v, pixels in enumerate(crops):
        boxes, flips = views.position_boxes[:, v], views.flips[:, v]
        rows = slice(v * n_images, (v + 1) * n_images)
        is_global = v < views.n_global
        masks = {f"{k}_mask": getattr(batch.masks, k)[rows] for k in method.patch_kinds} if is_global else {}
        tokens_s.append(student["backbone"](pixels, boxes, flips, **masks))
        if is_global:
            tokens_t.append(teacher["backbone"](pixels, boxes, flips))

    all_cls = method.distribution("image", teacher["image"](torch.cat([t.cls for t in tokens_t]))).split(n_images)
    pairs = [(t, s) for t in range(2) for s in range(len(crops)) if s != t]
    image = sum(cross_entropy(student["image"](tokens_s[s].cls), all_cls[t], 0.1).mean() for t, s in pairs) / len(pairs)
    torch.testing.assert_close(terms["image"], image)
    koleo = sum(koleo_loss(tokens_s[v].cls) for v in range(2))
    torch.testing.assert_close(terms["koleo"], koleo)
    total = image + koleo
    for kind in method.patch_kinds:
        mask = getattr(batch.masks, kind)
        probabilities = method.distribution(kind, teacher[kind](torch.cat([t.patches for t in tokens_t])[mask]))
        logits = student[kind](torch.cat([t.patches for t in tokens_s[:2]]))
        loss, row = 0.0, 0
        for crop in range(2 * n_images):
            for patch in mask[crop].nonzero().flatten().tolist():
                loss = loss + cross_entropy(logits[crop, patch], probabilities[row], 0.1) / mask[crop].sum() / (2 * n_images)
                row += 1
        torch.testing.assert_close(terms[kind], loss)
        total = total + loss
    torch.testing.assert_close(terms["loss"], total)
    assert method.patch_kinds == (["content"] if extra == BASELINE else ["content", "position"])


@pytest.mark.parametrize("extra", [[], BASELINE], ids=["method", "baseline"])
def test_every_trainable_parameter_has_a_gradient(folder, extra):
    config = load_config(None, [*TINY, f"data.root={folder}", *extra])
    method = Intertwined(config)
    batch = first_batch(config)
    method(batch)["loss"].backward()
    without = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    assert all(p.grad is None for p in method.teacher.parameters())
    assert (method.backbone_of("student").pos_mask_token.grad is None) == (extra == BASELINE)


def test_centres_follow_the_teacher_one_step_behind(folder):
    config = load_config(None, [*TINY, f"data.root={folder}"])
    method, batch = Intertwined(config), first_batch(config)
    boxes, flips = batch.views.globals
    with torch.no_grad():
        logits = method.teacher["image"](method.teacher["backbone"](batch.global_crops, boxes, flips).cls)
    first = method(batch)["image"]
    torch.testing.assert_close(method.center_image, 0.1 * logits.mean(0, keepdim=True))
    second = method(batch)["image"]
    assert not torch.equal(first, second)


def test_the_same_sample_is_drawn_at_a_position_whatever_the_order(folder):
    config = load_config(None, [*TINY, f"data.root={folder}"])
    a, b = build_dataset(config), build_dataset(config)
    for position in (7, 0, 3):
        one, two = a[position], b[position]
        assert torch.equal(one.global_crops, two.global_crops) and torch.equal(one.views.boxes, two.views.boxes)
    assert not torch.equal(a[1].views.boxes, a[7].views.boxes)
    order = [a.order.image(p) for p in range(12)]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6)) and order[:6] != order[6:]
    workers = load_config(None, [*TINY, f"data.root={folder}", "data.workers=2"])
    for (x, _), (y, _) in zip(build_loader(config, a, 1, 3), build_loader(workers, b, 1, 3)):
        assert torch.equal(x.global_crops, y.global_crops) and torch.equal(x.masks.content, y.masks.content)
    assert np.array_equal(x.views.flips, y.views.flips)
