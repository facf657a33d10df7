"""The losses of dense post-training against closed forms, restatements in float64, and features that have
no size."""

import math

import numpy as np
import pytest
import torch

from pretrain.losses.alignment import alignment, alignment_loss, centered_kernel, gram_distance

LOSSES = ("cka", "frobenius", "gram")
KERNELS = ("linear", "rbf")

OPTIONS = [
    ("cka", "linear"),
    ("cka", "rbf"),
    ("frobenius", "linear"),
    ("frobenius", "rbf"),
    ("gram", "linear"),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cka(a, b, kernel="linear", bandwidth=1.0):
    return 1 - alignment_loss("cka", a, b, kernel, bandwidth)


def patches(*shape, dtype=torch.float32):
    """Features as backbones give them: a common part, larger than what tells the patches apart."""
    return torch.randn(*shape, dtype=dtype) + 3 * torch.randn(*shape[:-2], 1, shape[-1], dtype=dtype)


def plain_kernel(x, kernel, bandwidth=1.0, of=None):
    """A region's centered kernel in NumPy's float64, with the matrix H written out."""
    x, of = (np.asarray(y, np.float64) for y in (x, x if of is None else of))
    n = len(x)
    if kernel == "linear":
        k = np.array([[np.dot(a, b) for b in x] for a in x])
    else:
        rms = math.sqrt(np.mean([np.sum((a - b) ** 2) for a in of for b in of]))
        k = np.array([[math.exp(-np.sum((a - b) ** 2) / (2 * (bandwidth * rms) ** 2)) for b in x] for a in x])
    h = np.eye(n) - np.ones((n, n)) / n
    return h @ k @ h


def plain_loss(name, s, t, kernel, bandwidth):
    k, l = (
        plain_kernel(s, kernel, bandwidth, of=t if name == "frobenius" else None),
        plain_kernel(t, kernel, bandwidth),
    )
    if name == "cka":
        return 1 - np.sum(k * l) / math.sqrt(np.sum(k * k) * np.sum(l * l))
    return np.sum((k - l) ** 2) / np.sum(l * l)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e-2, 1.0, 1e4, 1e12])
def test_cka_of_turned_and_scaled_features_is_1(scale, kernel):
    x = patches(6, 49, 32)
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0].float()
    wide = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))[0][:32].float()  # into more dimensions
    for same in (scale * x, scale * x @ turn, x @ (scale * wide), -scale * x):
        torch.testing.assert_close(cka(same, x, kernel), torch.ones(6), atol=2e-5, rtol=0)
        torch.testing.assert_close(cka(x, same, kernel), torch.ones(6), atol=2e-5, rtol=0)
    torch.testing.assert_close(cka(scale * x, scale * x, kernel), torch.ones(6), atol=2e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_scale_changes_neither_the_loss_nor_the_direction_of_its_gradient(scale, kernel):
    s, t = patches(4, 25, 8), patches(4, 25, 8)
    grads = []
    for factor in (1.0, scale):
        x = (factor * s).requires_grad_()
        loss = alignment_loss("cka", x, factor * t, kernel)
        loss.sum().backward()
        grads.append((loss.detach(), x.grad * factor))
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)
    assert grads[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("n, d, e", [(49, 16, 16), (49, 256, 256), (16, 64, 64), (49, 256, 32)])
def test_cka_of_independent_gaussian_features(n, d, e):
    """Centering costs one of n samples: E<K, L> = d e (n - 1) and E|K|^2 = d (n - 1) (d + n), so CKA = d / (d
    + n) for d = e.

    That is the ratio of expectations. A region's CKA scatters around it by std, the mean of 800 by std /
    sqrt(800); the expectation of the ratio lies beside it by less than 1 / n^2.
    """
    a, b = (
        torch.randn(800, n, d) + 5,
        torch.randn(800, n, e) - 3,
    )  # uncentered, the means would be all that the kernels see
    seen, expected = cka(a, b), math.sqrt(d * e / ((d + n) * (e + n)))
    error = seen.std().item() / math.sqrt(800)
    assert error < 0.01 * expected
    assert abs(seen.mean().item() - expected) < 4 * error + 1 / n**2
    k, l = (centered_kernel(x, unit=x[:1].expand_as(x)) for x in (a, b))  # of one size for all
    of_means = (k * l).sum((1, 2)).mean() / ((k * k).sum((1, 2)).mean() * (l * l).sum((1, 2)).mean()).sqrt()
    assert abs(of_means.item() - expected) < 4 * error


@pytest.mark.parametrize("name, kernel", OPTIONS[:4])
def test_a_shift_of_all_patches_changes_nothing(name, kernel):
    s, t = patches(3, 25, 8, dtype=torch.float64), patches(3, 25, 8, dtype=torch.float64)
    shifted = (
        s + 100 * torch.randn(3, 1, 8, dtype=torch.float64),
        t + torch.randn(3, 1, 8, dtype=torch.float64),
    )
    torch.testing.assert_close(alignment_loss(name, *shifted, kernel), alignment_loss(name, s, t, kernel))


@pytest.mark.parametrize("name, kernel", OPTIONS)
def test_the_order_of_the_patches_does_not_matter(name, kernel):
    s, t = patches(3, 25, 8, dtype=torch.float64), patches(3, 25, 8, dtype=torch.float64)
    order = torch.randperm(25)
    loss = alignment_loss(name, s, t, kernel)
    torch.testing.assert_close(alignment_loss(name, s[:, order], t[:, order], kernel), loss)
    assert alignment_loss(name, t[:, order], t, kernel).min() > 1e-4  # but they belong together


@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 300.0])
@pytest.mark.parametrize("name, kernel", OPTIONS[:4])
def test_losses_equal_a_plain_restatement(name, kernel, bandwidth):
    s = patches(3, 10, 6, dtype=torch.float64)
    t = 2 * s[..., :5] + patches(3, 10, 5, dtype=torch.float64)
    expected = torch.tensor(
        [plain_loss(name, a, b, kernel, bandwidth) for a, b in zip(s.numpy(), t.numpy())]
    ).double()
    torch.testing.assert_close(alignment_loss(name, s, t, kernel, bandwidth), expected)
    single = alignment_loss(name, s.float(), t.float(), kernel, bandwidth)
    torch.testing.assert_close(
        single, expected.float(), atol=1e-4, rtol=1e-4
    )  # wide kernels differ from 1 by little
    k = centered_kernel(t, kernel, bandwidth)
    plain = np.stack([plain_kernel(b, kernel, bandwidth) for b in t.numpy()])
    scale = (
        np.sum((t - t.mean(1, keepdim=True)).numpy() ** 2, axis=(1, 2), keepdims=True)
        if kernel == "linear"
        else 1
    )
    torch.testing.assert_close(k, torch.from_numpy(plain / scale))
    torch.testing.assert_close(alignment(k, k), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("kernel", KERNELS)
def test_frobenius_sees_the_scale_that_cka_does_not(kernel):
    t = patches(4, 25, 8, dtype=torch.float64)
    assert alignment_loss("frobenius", t, t, kernel).abs().max() < 1e-20
    for factor in (0.5, 2.0):
        loss = alignment_loss("frobenius", factor * t, t, kernel)
        assert (cka(factor * t, t, kernel) - 1).abs().max() < 1e-12 and loss.min() > 0.02
        if kernel == "linear":
            torch.testing.assert_close(loss, torch.full_like(loss, (factor**2 - 1) ** 2))
        for both in (1e-4, 1e4):  # a scale of both is none
            torch.testing.assert_close(alignment_loss("frobenius", both * factor * t, both * t, kernel), loss)


@pytest.mark.parametrize("name, kernel", OPTIONS)
def test_gradients_are_the_numerical_ones(name, kernel):
    s = patches(2, 6, 4, dtype=torch.float64).requires_grad_()
    t = patches(2, 6, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: alignment_loss(name, a, b, kernel, 0.8), (s, t))


def test_gram_is_a_plain_loop_over_pairs():
    s, t = patches(2, 7, 5, dtype=torch.float64), patches(2, 7, 4, dtype=torch.float64)
    expected = []
    for a, b in zip(s.numpy(), t.numpy()):
        cosines = [
            [[np.dot(x, y) / math.sqrt(np.dot(x, x) * np.dot(y, y)) for y in z] for x in z] for z in (a, b)
        ]
        expected.append(np.mean((np.array(cosines[0]) - np.array(cosines[1])) ** 2))
    torch.testing.assert_close(gram_distance(s, t), torch.tensor(expected))
    norms = (
        torch.rand(2, 7, 1, dtype=torch.float64) * 1e6 + 1e-6
    )  # a patch's norm is not seen, so none needs to be divided out
    torch.testing.assert_close(alignment_loss("gram", s * norms, t / norms), torch.tensor(expected))
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(
            alignment_loss("gram", (scale * s).float(), t.float()), torch.tensor(expected).float()
        )


@pytest.mark.parametrize("name, kernel", OPTIONS)
def test_a_region_is_compared_with_itself_alone(name, kernel):
    s, t = patches(5, 9, 6), patches(5, 9, 6)
    before = alignment_loss(name, s, t, kernel)
    changed = s.clone()
    changed[2] = 7 * torch.randn(9, 6)
    after = alignment_loss(name, changed, t, kernel)
    assert torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]]) and before[2] != after[2]
    torch.testing.assert_close(
        torch.cat([alignment_loss(name, s[i : i + 1], t[i : i + 1], kernel) for i in range(5)]), before
    )
    x = s.clone().requires_grad_()
    alignment_loss(name, x, t, kernel)[2].backward()
    assert not x.grad[[0, 1, 3, 4]].any() and x.grad[2].any()


def degenerate():
    """Features [1, 49, 24] without a spread, or nearly."""
    constant = torch.randn(1, 1, 24).expand(-1, 49, -1).clone()  # its mean is not exactly itself in float32
    single = torch.zeros(1, 49, 24)
    single[0, 3, 5] = 1e-3
    return {"constant": constant, "large": 1e6 * constant, "zero": torch.zeros(1, 49, 24), "single": single}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", degenerate())
@pytest.mark.parametrize("name, kernel", OPTIONS)
def test_features_without_a_spread_are_finite(name, kernel, kind, dtype):
    odd, x = degenerate()[kind].to(dtype), patches(1, 49, 24).to(dtype)
    for pair in ((odd, x), (x, odd), (odd, odd)):
        s, t = (y.clone().requires_grad_() for y in pair)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = alignment_loss(name, s, t, kernel)
        loss.sum().backward()
        assert loss.dtype == torch.float32 and loss.isfinite().all()
        assert s.grad.isfinite().all() and t.grad.isfinite().all() and s.grad.dtype == dtype
        if name == "cka" and kind != "single":
            assert loss.item() == 1 and not s.grad.any() and not t.grad.any()  # rounding has no geometry
        if name != "cka" and pair[0] is pair[1]:
            assert loss.item() == 0


def test_a_small_spread_is_no_rounding():
    """A thousandth of the features' size is seen, in float32 and far from the origin."""
    x = torch.randn(3, 49, 24)
    far = 1e3 + x  # exact sums, but for x's last places
    torch.testing.assert_close(cka(far, x), torch.ones(3), atol=1e-4, rtol=0)
    x = x.double()
    torch.testing.assert_close(
        cka(1e9 + x, x), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0
    )  # float64 sees further


@pytest.mark.parametrize("name, kernel", OPTIONS)
def test_autocast_changes_nothing(name, kernel):
    s, t = patches(3, 25, 16).bfloat16(), patches(3, 25, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = alignment_loss(name, s, t, kernel)
    assert torch.equal(under, alignment_loss(name, s.float(), t.float(), kernel))
    assert alignment_loss(name, s.double(), t.double(), kernel).dtype == torch.float64


@pytest.mark.parametrize("name", LOSSES)
def test_no_number_stays_none(name):
    """The guards must not hide a NaN from the training, which stops at one."""
    s, t = patches(3, 9, 6), patches(3, 9, 6)
    s[1, 4, 2] = math.nan
    assert alignment_loss(name, s, t).isnan().tolist() == [False, True, False]
    assert alignment_loss(name, t, s).isnan().tolist() == [False, True, False]


def test_one_patch_has_no_geometry():
    for name in LOSSES:
        x = torch.randn(2, 1, 8, requires_grad=True)
        loss = alignment_loss(name, x, torch.randn(2, 1, 8))
        loss.sum().backward()
        assert loss.isfinite().all() and x.grad.abs().max() < 1e-6
