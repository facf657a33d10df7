"""Teacher and student: what each sees, and the step's total against its parts."""

import numpy as np
import pytest
import torch
from photos import TINY, last, write_photos

from pretrain.config import load_config
from pretrain.data.loader import build_dataset, build_loader
from pretrain.heads import HeadOutput
from pretrain.losses import koleo_loss
from pretrain.losses.chunked_cross_entropy import distribution
from pretrain.methods.intertwined import Intertwined
from pretrain.methods.method import Progress
from pretrain.trainer import Length, Trainer

BASELINE = [
    "positions.encoding=standard",
    "positions.grid=4",
    "positions.interpolation=dinov2",
    "positions.augment=false",
]
BASELINE += ["masks.position_share=0.0", "losses.position=0.0"]


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos")


def settings(folder, *words):
    return load_config(None, last([*TINY, f"data.root={folder}", *words]))


def first_batch(config, dtype=torch.float32):
    return next(iter(build_loader(config, build_dataset(config), 0, 1)))[0].to(torch.device("cpu"), dtype)


def cross_entropy(logits, probabilities, temperature):
    return -(probabilities * torch.log_softmax(logits / temperature, -1)).sum(-1)


def progress_at(iteration=0):
    return Progress(iteration, total_iters=100, epoch_iters=10, seed=0)


def loss_of(method, batch):
    """The loss of a batch that comes in one piece."""
    return method.loss(batch, method.prepare([batch], progress_at()), 0)


def double_method(config):
    torch.manual_seed(0)
    method = Intertwined(config).double()
    with torch.no_grad():  # teacher and student apart, LayerScale and mask tokens of a size that can be seen
        for i, p in enumerate(method.parameters()):
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) * 0.1
            )
    return method


def test_the_students_unmasked_input_is_the_teachers(folder):
    config = settings(folder, "backbone.n_registers=2")
    batch = first_batch(config, torch.float64)
    method = double_method(config)
    method.teacher.load_state_dict(method.student.state_dict())
    boxes, flips = batch.views.globals
    teacher, grid = method.teacher["backbone"].embed(batch.global_crops, boxes, flips)
    masks = batch.masks
    student, _ = method.student["backbone"].embed(
        batch.global_crops, boxes, flips, masks.content, masks.position
    )
    assert grid == (4, 4) and masks.content.any() and masks.position.any()
    masked = masks.content | masks.position
    same = (student[:, 3:] == teacher[:, 3:]).all(-1)
    assert torch.equal(same, ~masked)  # bit for bit where nothing is masked, and only there
    assert torch.equal(student[:, :3], teacher[:, :3])


@pytest.mark.parametrize(
    "extra", [[], BASELINE, ["losses.centering=sinkhorn_knopp"]], ids=["method", "baseline", "sinkhorn"]
)
def test_a_steps_loss_is_equation_6(folder, extra):
    """The terms restated with loops over views and patches from the networks' own outputs."""
    config = settings(folder, "run.precision=float64", "backbone.drop_path=0.0", *extra)
    batch = first_batch(config, torch.float64)
    method = double_method(config).eval()
    prepared = method.prepare([batch], progress_at())
    loss_terms = method.loss(batch, prepared, 0)
    terms = loss_terms.terms
    n_images, views = batch.n_images, batch.views
    student, teacher = method.student, method.teacher
    crops = list(batch.global_crops.split(n_images)) + list(batch.local_crops.split(n_images))
    tokens_s, tokens_t = [], []
    for v, pixels in enumerate(crops):
        boxes, flips = views.position_boxes[:, v], views.flips[:, v]
        rows = slice(v * n_images, (v + 1) * n_images)
        is_global = v < views.n_global
        masks = {f"{k}_mask": getattr(batch.masks, k)[rows] for k in method.kinds} if is_global else {}
        tokens_s.append(student["backbone"](pixels, boxes, flips, **masks))
        if is_global:
            tokens_t.append(teacher["backbone"](pixels, boxes, flips))

    centers = prepared.centers
    all_cls = teacher["image"](torch.cat([t.cls for t in tokens_t]))
    all_cls = distribution(all_cls, centers["image"], 0.04).split(n_images)
    pairs = [(t, s) for t in range(2) for s in range(len(crops)) if s != t]
    image = sum(
        cross_entropy(student["image"](tokens_s[s].cls).logits, all_cls[t], 0.1).mean() for t, s in pairs
    ) / len(pairs)
    torch.testing.assert_close(terms["image"], image)
    koleo = sum(koleo_loss(tokens_s[v].cls) for v in range(2))
    torch.testing.assert_close(terms["koleo"], koleo)
    total = image + koleo
    for kind in method.kinds:
        mask = getattr(batch.masks, kind)
        masked = teacher[kind](torch.cat([t.patches for t in tokens_t])[mask])
        probabilities = distribution(HeadOutput(*masked), centers[kind], 0.04)
        logits = student[kind](torch.cat([t.patches for t in tokens_s[:2]])).logits
        loss, row = 0.0, 0
        for crop in range(2 * n_images):
            for patch in mask[crop].nonzero().flatten().tolist():
                loss = loss + cross_entropy(logits[crop, patch], probabilities[row], 0.1) / mask[
                    crop
                ].sum() / (2 * n_images)
                row += 1
        torch.testing.assert_close(terms[kind], loss)
        total = total + loss
    torch.testing.assert_close(loss_terms.total, total)
    assert terms.keys() == {"image", "koleo", *method.kinds}
    assert method.kinds == (["content"] if extra == BASELINE else ["content", "position"])


@pytest.mark.parametrize("extra", [[], BASELINE], ids=["method", "baseline"])
def test_every_trainable_parameter_has_a_gradient(folder, extra):
    config = settings(folder, *extra)
    method = Intertwined(config)
    batch = first_batch(config)
    loss_of(method, batch).total.backward()
    without = [
        name
        for name, p in method.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert without == []
    assert all(p.grad is None for p in method.teacher.parameters())
    assert (method.student["backbone"].pos_mask_token.grad is None) == (extra == BASELINE)


def test_centers_follow_the_teacher_one_step_behind(folder):
    config = settings(folder)
    method, batch = Intertwined(config), first_batch(config)
    boxes, flips = batch.views.globals
    with torch.no_grad():
        logits = method.teacher["image"](
            method.teacher["backbone"](batch.global_crops, boxes, flips).cls
        ).logits
    first = loss_of(method, batch).terms["image"]
    assert not method.center_image.any()  # until the step is done
    assert method.after_step(progress_at()) == {"teacher_momentum": config.optim.teacher_momentum}
    torch.testing.assert_close(method.center_image, 0.1 * logits.mean(0, keepdim=True))
    second = loss_of(method, batch).terms["image"]
    assert not torch.equal(first, second)


def trainer_of(config):
    """A trainer whose networks are no start of a run: everything has a size that can be seen."""
    trainer = Trainer(config, Length(10, 100, 0))
    trainer.method.load_state_dict(double_method(config).state_dict())
    return trainer


@pytest.mark.parametrize(
    "extra",
    [[], BASELINE, ["losses.centering=sinkhorn_knopp"], ["step.checkpointing=full"], ["crops.n_local=0"]],
    ids=["method", "baseline", "sinkhorn", "checkpointed", "globals"],
)
def test_parts_of_a_batch_equal_the_whole(folder, extra):
    """Gradient accumulation: losses, centers and every parameter after two steps."""
    common = ["run.precision=float64", "optim.batch_size=6", "backbone.drop_path=0.0", *extra]
    whole, parts = (settings(folder, *common, *a) for a in ([], ["step.accumulate=3"]))
    one, two = trainer_of(whole), trainer_of(parts)
    data = build_dataset(whole)
    for it in range(2):
        batches = [batch for batch, _ in build_loader(parts, data, it, it + 1)]
        assert len(batches) == 3
        (all_at_once,) = [batch for batch, _ in build_loader(whole, data, it, it + 1)]
        a, b = one.step([all_at_once], examine=True).losses, two.step(batches, examine=True).losses
        assert a.keys() == b.keys() and ("position_explained" in a) == (extra != BASELINE)
        # of a batch in parts these are of the first
        for name in a.keys() - {"teacher_entropy", "mean_entropy", "feature_std", "effective_rank"}:
            torch.testing.assert_close(b[name], a[name], rtol=1e-9, atol=1e-9)
    for (name, x), y in zip(one.tensors().items(), two.tensors().values()):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("parts", [1, 2])
def test_l_pos_is_logged_beside_what_the_mean_prediction_costs(folder, parts):
    """From the logged L_pos and all of the teacher's rows in one table."""
    words = ["run.precision=float64", "losses.position=2.0", "optim.batch_size=4", "step.loss_rows=5"]
    config = settings(folder, *words, f"step.accumulate={parts}")
    trainer = trainer_of(config)
    batches = [batch for batch, _ in build_loader(config, build_dataset(config), 0, 1)]
    here = [batch.to(trainer.device, trainer.dtype) for batch in batches]
    prepared, p, weights = trainer.method.prepare(here, progress_at()), [], []
    for batch, targets in zip(here, prepared.targets):
        p.append(distribution(targets["position"], prepared.centers["position"], 0.04))
        weights.append(batch.masks.position_weight.double())
    p, weights = torch.cat(p), torch.cat(weights)
    share, n_crops = weights / weights.sum(), sum(len(batch.global_crops) for batch in here)
    losses = trainer.step(batches, examine=True).losses
    entropy, mean = share @ -torch.xlogy(p, p).sum(1), share @ p
    of_mean = -torch.xlogy(mean, mean).sum()
    torch.testing.assert_close(losses["position_entropy"], entropy, rtol=1e-9, atol=0)
    loss = losses["position"] / 2 * n_crops / weights.sum()  # a mean over masked patches
    explained = (of_mean - loss) / (of_mean - entropy)
    torch.testing.assert_close(losses["position_explained"], explained, rtol=1e-9, atol=0)


def test_koleo_sees_the_same_dropped_paths_in_both_of_its_passes(folder):
    """The pass without gradient, over the global crops alone, gives the [CLS] of the packed pass over all
    crops."""
    config = settings(folder, "run.precision=float64", "backbone.drop_path=0.5")
    trainer, batch = trainer_of(config), first_batch(config, torch.float64)

    def global_cls(seed, with_locals):
        progress_at().seed_micro_batch(seed)
        return trainer.method.student_tokens(batch, with_locals)[0].cls.unflatten(0, (2, -1))

    alone, packed = global_cls(1, with_locals=False), global_cls(1, with_locals=True)
    torch.testing.assert_close(alone, packed, rtol=1e-12, atol=0)
    assert not torch.equal(global_cls(2, with_locals=False), alone)


@pytest.mark.parametrize("extra", [[], BASELINE], ids=["method", "baseline"])
def test_chunked_losses_train_as_the_plain_ones(folder, extra):
    common = ["run.precision=float64", *extra]
    plain, chunked = (trainer_of(settings(folder, *common, f"step.loss_rows={n}")) for n in (0, 5))
    for it in range(2):
        batch = next(iter(build_loader(plain.config, build_dataset(plain.config), it, it + 1)))[0]
        a, b = plain.step([batch]).losses, chunked.step([batch]).losses
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-9, atol=1e-9)
    for (name, x), y in zip(plain.tensors().items(), chunked.tensors().values()):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_a_step_that_is_not_finite_can_be_skipped(folder):
    config = settings(folder, "step.on_nan=skip")
    trainer, batch = Trainer(config, Length(10, 100, 0)), first_batch(config)
    trainer.step([batch])
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    broken = first_batch(config)
    broken.global_crops[0, 0, 0, 0] = torch.nan
    logs = trainer.step([broken])
    assert trainer.n_skipped == 1 and trainer.iteration == 2 and logs.losses["loss"].isnan()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.tensors().items())
    assert logs.scheduled.keys() == {"lr", "weight_decay"}  # nothing followed the step: no teacher moved
    trainer.step([batch])
    assert trainer.n_skipped == 1 and not torch.equal(
        trainer.tensors()["method.center_image"], before["method.center_image"]
    )


def test_the_same_sample_is_drawn_at_a_position_whatever_the_order(folder):
    config = settings(folder)
    a, b = build_dataset(config), build_dataset(config)
    for position in (7, 0, 3):
        one, two = a[position], b[position]
        assert torch.equal(one.global_crops, two.global_crops) and torch.equal(
            one.views.boxes, two.views.boxes
        )
    assert not torch.equal(a[1].views.boxes, a[7].views.boxes)
    order = [a.order.image(p) for p in range(12)]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6)) and order[:6] != order[6:]
    workers = settings(folder, "data.workers=2")
    for (x, _), (y, _) in zip(build_loader(config, a, 1, 3), build_loader(workers, b, 1, 3)):
        assert torch.equal(x.global_crops, y.global_crops) and torch.equal(x.masks.content, y.masks.content)
    assert np.array_equal(x.views.flips, y.views.flips)
