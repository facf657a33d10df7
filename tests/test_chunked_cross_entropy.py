"""The chunked cross-entropy equals the plain one, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F

from pretrain import cpu_tuning, precision
from pretrain.heads import HeadOutput, ProjectionHead, unit_rows
from pretrain.losses import image_loss, patch_loss, sinkhorn_center
from pretrain.losses.chunked_cross_entropy import cross_entropy_sum, distribution

TEMPERATURES = (0.1, 0.04)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def unit(*shape, dtype=torch.float64, seed=0):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    ).to(dtype)


def inputs(n_student, n_teacher, n_samples, dtype, width=8, n_prototypes=50):
    student = HeadOutput(
        unit(n_student, n_samples, width, dtype=dtype, seed=1), unit(n_prototypes, width, dtype=dtype, seed=2)
    )
    teacher = HeadOutput(
        unit(n_teacher, n_samples, width, dtype=dtype, seed=3), unit(n_prototypes, width, dtype=dtype, seed=4)
    )
    center = 0.1 * unit(1, n_prototypes, dtype=dtype, seed=5)
    generator = torch.Generator().manual_seed(6)
    pairs = torch.rand(n_student, n_teacher, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(n_samples, generator=generator, dtype=torch.float64).to(dtype)
    return student, teacher, center, pairs, weights


def value_and_gradients(student, teacher, center, pairs, weights, n_rows):
    leaves = HeadOutput(*(t.clone().requires_grad_() for t in student))
    loss = cross_entropy_sum(leaves, teacher, center, pairs, weights, TEMPERATURES, n_rows)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n_rows", [1, 7, 12, 1000])
@pytest.mark.parametrize("views", [(10, 2), (1, 1), (2, 2)], ids=str)
def test_chunks_equal_the_plain_form(dtype, n_rows, views):
    given = inputs(*views, 7, dtype)
    plain = value_and_gradients(*given, 0)
    for one, two in zip(value_and_gradients(*given, n_rows), plain):
        assert one.dtype == dtype
        torch.testing.assert_close(
            one, two, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * two.abs().max().item()
        )


def test_under_bf16_autocast_the_two_forms_differ_by_its_rounding():
    """Stated tolerance: 1 % of the value, 5 % of the largest gradient (bfloat16 has 8 bits; logits reach
    10)."""
    given = inputs(4, 2, 5, torch.float32, width=32)
    exact = value_and_gradients(*given, 0)
    for n_rows in (0, 6):
        with torch.autocast("cpu", torch.bfloat16):
            rounded = value_and_gradients(*given, n_rows)
        assert all(r.dtype == torch.float32 for r in rounded)
        torch.testing.assert_close(rounded[0], exact[0], rtol=0.01, atol=0)
        for one, two in zip(rounded[1:], exact[1:]):
            assert (one - two).abs().max() < 0.05 * two.abs().max()


def test_logits_are_float16_under_bf16_autocast_where_that_is_fast(monkeypatch):
    """Of a sharp teacher and of patches of 1e-5: the distribution's error falls sixty times, that of the value
    and of both gradients too, and nothing underflows; without autocast not a bit changes."""
    rows, table = unit(24, 64, dtype=torch.float32, seed=1), unit(4096, 64, dtype=torch.float32, seed=2)
    table = F.normalize(table + unit(24, 64, dtype=torch.float32, seed=3).repeat(171, 1)[:4096], dim=-1)
    head = HeadOutput(rows[None], table)
    teacher = HeadOutput(
        F.normalize(rows + 0.5 * unit(24, 64, dtype=torch.float32, seed=3), dim=-1)[None], table
    )
    center, pairs, weights = torch.zeros(1, 4096), torch.ones(1, 1), torch.full((24,), 1e-5)

    def measured(autocast, fast):
        monkeypatch.setattr(precision, "FLOAT16_IS_FAST", fast)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            p = distribution(HeadOutput(teacher.bottleneck[0], table), center, 0.04)
            return [p, *value_and_gradients(head, teacher, center, pairs, weights, 7)]

    exact, ours, theirs = measured(False, ()), measured(True, ("cpu",)), measured(True, ("cuda",))
    assert all(torch.equal(a, b) for a, b in zip(exact, measured(False, ("cpu",))))
    kl = [(exact[0] * (exact[0] / x[0]).log()).sum(1).mean().item() for x in (ours, theirs)]
    assert 30 < kl[1] / kl[0] < 120 and kl[1] > 1e-4, kl
    errors = [[((a - b).norm() / b.norm()).item() for a, b in zip(x[1:], exact[1:])] for x in (ours, theirs)]
    assert all(mine < 0.6 * before for mine, before in zip(*errors)), errors
    assert max(errors[0]) < 0.01
    assert [x.dtype for x in ours] == [torch.float32] * 4


def test_the_chunked_gradient_is_the_numerical_one():
    student, *rest = inputs(3, 2, 2, torch.float64, width=3, n_prototypes=6)
    _, *gradients = value_and_gradients(student, *rest, 3)
    for which, gradient in enumerate(gradients):
        for place in range(gradient.numel()):
            values = []
            for sign in (1, -1):
                moved = [t.clone() for t in student]
                moved[which].view(-1)[place] += sign * 1e-5
                values.append(cross_entropy_sum(HeadOutput(*moved), *rest, TEMPERATURES, 3))
            slope = 3 * (values[0] - values[1]) / 2e-5
            torch.testing.assert_close(gradient.flatten()[place], slope, rtol=1e-6, atol=1e-8)


def test_no_masked_patch_is_no_loss_and_no_gradient():
    student, teacher, center, *_ = inputs(1, 1, 4, torch.float64)
    rows = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    table = student.prototypes.clone().requires_grad_()
    none = HeadOutput(teacher.bottleneck[0, :0], teacher.prototypes)
    loss = patch_loss(HeadOutput(rows, table), none, center, torch.zeros(0), 6, TEMPERATURES, 5)
    loss.backward()
    assert loss.item() == 0 and not table.grad.any()


def test_never_more_rows_than_asked_for_exist(monkeypatch):
    """The largest table that is made has n_rows rows: what bounds the memory."""
    made = []
    table = cpu_tuning._table

    def watched(name, n_rows, width, like):
        made.append((name, n_rows))
        return table(name, n_rows, width, like)

    monkeypatch.setattr(cpu_tuning, "_table", watched)
    value_and_gradients(*inputs(10, 2, 9, torch.float64), 20)
    rows = {name: [n for key, n in made if key == name] for name in ("teacher", "student", "probabilities")}
    assert max(n for _, n in made) == 20
    assert sum(rows["teacher"]) == 9 * 2 and sum(rows["student"]) == sum(rows["probabilities"]) == 9 * 10


def test_image_and_patch_loss_in_chunks(dtype=torch.float64):
    student, teacher, center, *_ = inputs(5, 2, 4, dtype)
    whole = image_loss(student, teacher, center, TEMPERATURES, 0)
    torch.testing.assert_close(
        image_loss(student, teacher, center, TEMPERATURES, 6), whole, rtol=1e-12, atol=0
    )
    rows = (
        HeadOutput(student.bottleneck[0], student.prototypes),
        HeadOutput(teacher.bottleneck[0], teacher.prototypes),
    )
    weights = torch.tensor([0.5, 0.5, 1.0, 0.25], dtype=dtype)
    plain, chunked = (patch_loss(*rows, center, weights, 3, TEMPERATURES, n) for n in (0, 3))
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n_rows", [0, 1, 4])
def test_sinkhorn_as_a_center_is_sinkhorn(n_rows):
    """softmax((logits - center) / t) equals the alternation on the whole table, whatever the chunks."""
    teacher = HeadOutput(unit(9, 8, seed=7), unit(6, 8, seed=8))
    q = torch.exp(teacher.logits / 0.1)
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / 6
        q = q / q.sum(1, keepdim=True) / 9
    got = distribution(teacher, sinkhorn_center(teacher, 0.1, 3, n_rows), 0.1)
    torch.testing.assert_close(got, q * 9, rtol=1e-10, atol=0)


def test_prototypes_have_norm_one_and_the_gradient_of_normalization():
    weight = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit_rows(weight), F.normalize(weight, dim=1))
    upstream = torch.randn(20, 4, dtype=torch.float64)
    ours, torchs = (
        torch.autograd.grad(f(weight), weight, upstream)[0]
        for f in (unit_rows, lambda w: F.normalize(w, dim=1))
    )
    torch.testing.assert_close(ours, torchs)
    head = ProjectionHead(8, 20, hidden_dim=16, bottleneck_dim=4, n_layers=3).double()
    bottleneck, prototypes = head(torch.randn(7, 8, dtype=torch.float64))
    assert bottleneck.shape == (7, 4) and prototypes.shape == (20, 4)
    torch.testing.assert_close(bottleneck.norm(dim=1), torch.ones(7, dtype=torch.float64))
