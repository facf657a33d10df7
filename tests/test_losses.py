"""Every loss against a plain float64 restatement with loops."""

import math

import pytest
import torch

from pretrain.heads import HeadOutput, ProjectionHead
from pretrain.losses import (
    explained_share,
    image_loss,
    koleo_loss,
    patch_loss,
    sinkhorn_center,
    teacher_entropies,
    updated_center,
)
from pretrain.losses.chunked_cross_entropy import distribution
from pretrain.optim import decays, ema_update, parameter_groups, set_schedules
from pretrain.schedules import cosine, effective_epochs, scaled_lr, warmup_cosine


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def log_softmax(row):
    peak = max(row)
    total = math.log(sum(math.exp(v - peak) for v in row)) + peak
    return [v - total for v in row]


def plain_cross_entropy(student, teacher, temperature):
    return -sum(t * s for t, s in zip(teacher, log_softmax([v / temperature for v in student])))


def random_head(rng, *shape, k=6, d=5):
    return HeadOutput(*(torch.randn(*s, d, generator=rng, dtype=torch.float64) for s in (shape, (k,))))


@pytest.mark.parametrize("n_rows", [0, 4])
def test_image_loss_is_dinos(rng, n_rows):
    """Every global teacher view against every other student view; means over the images and over the 2 + 2
    * 3 pairs."""
    student, teacher = random_head(rng, 5, 4), random_head(rng, 2, 4)
    center = torch.randn(1, 6, generator=rng, dtype=torch.float64)
    p = distribution(HeadOutput(teacher.bottleneck.flatten(0, 1), teacher.prototypes), center, 0.3).unflatten(
        0, (2, 4)
    )
    total, pairs = 0.0, [(t, s) for t in range(2) for s in range(5) if s != t]
    for t, s in pairs:
        rows = [plain_cross_entropy(student.logits[s, b].tolist(), p[t, b].tolist(), 0.1) for b in range(4)]
        total += sum(rows) / 4
    assert image_loss(student, teacher, center, (0.1, 0.3), n_rows).item() == pytest.approx(
        total / len(pairs), rel=1e-12
    )
    globals_ = HeadOutput(student.bottleneck[:2], student.prototypes)
    rows = [
        plain_cross_entropy(student.logits[1 - t, b].tolist(), p[t, b].tolist(), 0.1)
        for t in range(2)
        for b in range(4)
    ]
    assert image_loss(globals_, teacher, center, (0.1, 0.3), n_rows).item() == pytest.approx(
        sum(rows) / 8, rel=1e-12
    )


@pytest.mark.parametrize("n_rows", [0, 2])
def test_patch_loss_weighs_each_crop_alike(rng, n_rows):
    """Of four crops two have masked patches, 2 and 5; the others have none of this kind and still count."""
    student, teacher = random_head(rng, 7), random_head(rng, 7)
    center = torch.randn(1, 6, generator=rng, dtype=torch.float64)
    p = distribution(teacher, center, 0.3)
    rows = [plain_cross_entropy(s.tolist(), t.tolist(), 0.1) for s, t in zip(student.logits, p)]
    expected = (sum(rows[:2]) / 2 + sum(rows[2:]) / 5) / 4
    weights = torch.tensor([1 / 2] * 2 + [1 / 5] * 5, dtype=torch.float64)
    assert patch_loss(student, teacher, center, weights, 4, (0.1, 0.3), n_rows).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_centering(rng):
    teacher = random_head(rng, 3, k=4)
    center = torch.randn(1, 4, generator=rng, dtype=torch.float64)
    got = distribution(teacher, center, 0.04)
    for row, probabilities in zip(teacher.logits, got):
        scores = [(v - c) / 0.04 for v, c in zip(row.tolist(), center[0].tolist())]
        assert probabilities.tolist() == pytest.approx([math.exp(v) for v in log_softmax(scores)], rel=1e-9)
    moved = updated_center(center, teacher, 0.9)
    for k in range(4):
        assert moved[0, k].item() == pytest.approx(
            0.9 * center[0, k].item() + 0.1 * teacher.logits[:, k].mean().item(), rel=1e-12
        )
    assert torch.equal(
        updated_center(center, HeadOutput(teacher.bottleneck[:0], teacher.prototypes), 0.9), center
    )


def test_sinkhorn_is_the_plain_alternation(rng):
    teacher = random_head(rng, 6, k=4)
    teacher = HeadOutput(teacher.bottleneck * 0.1, teacher.prototypes)
    n, k = teacher.logits.shape
    q = [[math.exp(v / 0.04) for v in row] for row in teacher.logits.tolist()]
    for _ in range(3):
        columns = [sum(row[j] for row in q) for j in range(k)]
        q = [[v / columns[j] / k for j, v in enumerate(row)] for row in q]
        q = [[v / sum(row) / n for v in row] for row in q]
    got = distribution(teacher, sinkhorn_center(teacher, 0.04, 3), 0.04)
    torch.testing.assert_close(got, torch.tensor(q, dtype=torch.float64) * n, rtol=1e-10, atol=0)


def test_entropies_tell_the_two_collapses():
    """Uniform distributions: both ln K. One prototype for all: both 0. Each its own: 0, and ln of how
    many."""
    prototypes, zero = torch.eye(4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    for rows, expected in [
        (torch.zeros(4, 4), (math.log(4), math.log(4))),
        (torch.eye(4)[[0, 0, 0, 0]], (0.0, 0.0)),
        (torch.eye(4), (0.0, math.log(4))),
    ]:
        got = teacher_entropies(HeadOutput(rows.double(), prototypes), zero, 0.01)
        assert [value.item() for value in got] == pytest.approx(expected, abs=1e-9)


def test_the_share_explained_is_between_the_mean_prediction_and_the_teacher(rng):
    """By its definition, with loops: 0 for the teacher's mean, 1 for the teacher, negative for worse; chunks
    change nothing; of a teacher that says one thing everywhere nothing is left to explain."""
    teacher, center = random_head(rng, 7), torch.randn(1, 6, generator=rng, dtype=torch.float64)
    weights = torch.rand(7, generator=rng, dtype=torch.float64)
    p = distribution(teacher, center, 0.3)
    share = weights / weights.sum()
    mean = (share.unsqueeze(1) * p).sum(0)
    entropy = sum(-w * math.fsum(v * math.log(v) for v in row) for w, row in zip(share.tolist(), p.tolist()))

    def found(q, n_rows=2, teacher=teacher):
        loss = -(weights @ (distribution(teacher, center, 0.3) * q.log()).sum(1))
        return [float(x) for x in explained_share(teacher, center, 0.3, weights, loss, n_rows)]

    assert found(p) == pytest.approx([entropy, 1], rel=1e-12)
    assert found(mean) == pytest.approx([entropy, 0], abs=1e-12)
    q = torch.softmax(torch.randn(7, 6, generator=rng, dtype=torch.float64), -1)
    kl = [float(share @ (p * (p / prediction).log()).sum(1)) for prediction in (q, mean)]
    assert found(q)[1] == pytest.approx(1 - kl[0] / kl[1], rel=1e-12) and found(q)[1] < 0
    assert found(q, 0) == pytest.approx(found(q), rel=1e-12)
    same = HeadOutput(teacher.bottleneck[:1].expand(7, -1), teacher.prototypes)
    assert found(q, teacher=same)[1] == 0
    assert [float(x) for x in explained_share(
        HeadOutput(teacher.bottleneck[:0], teacher.prototypes), center, 0.3, weights[:0], q.new_zeros(()), 2
    )] == [0, 0]  # fmt: skip


def test_koleo_is_the_mean_log_distance_to_the_nearest(rng):
    x = torch.randn(5, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    unit = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in x.tolist()]
    total = 0.0
    for i, a in enumerate(unit):
        nearest = max((j for j in range(5) if j != i), key=lambda j: sum(p * q for p, q in zip(a, unit[j])))
        total -= math.log(math.sqrt(sum((p - q + 1e-8) ** 2 for p, q in zip(a, unit[nearest]))) + 1e-8)
    loss = koleo_loss(x)
    assert loss.item() == pytest.approx(total / 5, rel=1e-9)
    assert torch.autograd.gradcheck(koleo_loss, (x,), atol=1e-5)
    assert koleo_loss(x[:1]).item() == 0.0


def test_head_gives_cosines_with_unit_prototypes(rng):
    head = ProjectionHead(8, 20, hidden_dim=16, bottleneck_dim=4, n_layers=3).double()
    assert [type(m).__name__ for m in head.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    x = torch.randn(7, 8, generator=rng, dtype=torch.float64)
    z = head.mlp(x)
    expected = (z / z.norm(dim=1, keepdim=True)) @ (
        head.last_layer.weight / head.last_layer.weight.norm(dim=1, keepdim=True)
    ).T
    torch.testing.assert_close(head(x).logits, expected)
    doubled = ProjectionHead(8, 20, 16, 4, 3).double()
    doubled.load_state_dict({k: v * 2 if "last" in k else v for k, v in head.state_dict().items()})
    torch.testing.assert_close(doubled(x).logits, head(x).logits)  # the prototypes' norm is fixed


def test_schedules_are_dinov2s():
    lr = [warmup_cosine(it, 10, 4, 1.0, 0.1) for it in range(11)]
    assert lr[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1.0])
    assert lr[4:10] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    assert lr[10] == 0.1
    assert [cosine(it, 100, 0.04, 0.4) for it in (0, 50, 100, 500)] == pytest.approx([0.04, 0.22, 0.4, 0.4])
    assert (
        scaled_lr(2e-3, 512, "sqrt_1024") == pytest.approx(2e-3 * math.sqrt(0.5))
        and scaled_lr(1.0, 64, "none") == 1.0
    )
    assert effective_epochs(100, 2, 8, 224, 96) == pytest.approx(346.94, abs=0.01)  # the paper's "350"


def test_optimizer_groups_and_ema():
    model = torch.nn.ModuleDict({"head": ProjectionHead(4, 6, 5, 3, 2), "norm": torch.nn.LayerNorm(4)})
    model["backbone"] = torch.nn.Linear(4, 4)
    groups = parameter_groups(model, 10.0, lambda name: 2 if "last_layer" in name else 0)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(groups)
    set_schedules(optimizer, lr=0.5, weight_decay=0.3, epoch=1)
    of = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    named = {name: of[id(p)] for name, p in model.named_parameters()}
    assert named["head.last_layer.weight"] == (0.0, 0.3) and named["head.mlp.0.weight"] == (5.0, 0.3)
    assert named["head.mlp.0.bias"] == named["norm.weight"] == named["norm.bias"] == (5.0, 0.0)
    assert named["backbone.weight"] == (0.5, 0.3) and named["backbone.bias"] == (0.5, 0.0)
    set_schedules(optimizer, lr=0.5, weight_decay=0.3, epoch=2)  # the last layer waited for two epochs
    assert {g["lr"] for g in optimizer.param_groups} == {0.5, 5.0}
    assert (
        not decays("backbone.blocks.0.ls1.gamma")
        and decays("backbone.cls_token")
        and decays("backbone.pos_field")
    )
    teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = teacher.weight.detach().clone()
    ema_update(teacher, student, 0.75)
    torch.testing.assert_close(teacher.weight, 0.75 * before + 0.25 * student.weight)
