"""NMI and MAD: closed forms, scikit-learn, and the streamed form against the plain one."""

import math
import weakref

import numpy as np
import pytest
import torch
from backbone_fixture import randomize
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.analysis.attention import (
    attention_statistics,
    distances_px,
    entropy,
    last_layer,
    over_patches,
    patch_at,
    query_attention,
    streamed_statistics,
)
from pretrain.backbones.vit import ViT

GRID = (3, 5)
N = GRID[0] * GRID[1]


def nmi(attention):
    return streamed_statistics([attention.clone()], (1, attention.shape[-1]), 1)[0]


def mad_px(attention, grid, patch_px):
    return streamed_statistics([attention.clone()], grid, patch_px)[1]


def plain_distances(grid, patch_px):
    """By two loops."""
    places = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    return torch.tensor([[patch_px * math.dist(a, b) for b in places] for a in places], dtype=torch.float64)


def plain_nmi(attention):
    """The definition, term by term."""
    n = len(attention)
    joint = attention / n
    p_q, p_k = joint.sum(1), joint.sum(0)
    information = sum(
        float(joint[q, k] * torch.log(joint[q, k] / (p_q[q] * p_k[k])))
        for q in range(n)
        for k in range(n)
        if joint[q, k] > 0
    )
    h_q, h_k = (-sum(float(p * torch.log(p)) for p in ps if p > 0) for ps in (p_q, p_k))
    return information / math.sqrt(h_q * h_k)


def random_attention(*shape, sharpness=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, dtype=torch.float64, generator=generator)).softmax(-1)


def test_uniform_attention():
    attention = torch.full((N, N), 1 / N, dtype=torch.float64)
    assert nmi(attention).item() == pytest.approx(0, abs=1e-12)
    assert mad_px(attention, GRID, 16).item() == pytest.approx(
        plain_distances(GRID, 16).mean().item(), rel=1e-6
    )


def test_uniform_attention_on_one_row_in_closed_form():
    """On 1 x n patches the mean distance of two patches is (n^2 - 1) / 3n."""
    n = 12
    attention = torch.full((n, n), 1 / n, dtype=torch.float64)
    assert mad_px(attention, (1, n), 14).item() == pytest.approx(14 * (n**2 - 1) / (3 * n), rel=1e-6)


def test_identity_attention():
    attention = torch.eye(N, dtype=torch.float64)
    assert nmi(attention).item() == pytest.approx(1, abs=1e-12)
    assert mad_px(attention, GRID, 16).item() == 0


def test_a_shifted_permutation():
    """Each patch looks at its right neighbor, the last of a row at the first."""
    attention = torch.eye(N, dtype=torch.float64).unflatten(1, GRID).roll(1, 2).flatten(1)
    width = GRID[1]
    assert nmi(attention).item() == pytest.approx(1, abs=1e-12)
    assert mad_px(attention, GRID, 16).item() == pytest.approx(16 * 2 * (width - 1) / width, rel=1e-6)


def test_block_diagonal_attention():
    """Even within m blocks: a key tells the block of its query, so I = log m of log N."""
    m, size = 3, 5
    attention = torch.block_diag(*[torch.full((size, size), 1 / size, dtype=torch.float64)] * m)
    assert nmi(attention).item() == pytest.approx(math.log(m) / math.log(m * size), abs=1e-12)


def test_nothing_to_know():
    collapsed = torch.zeros(N, N)
    collapsed[:, 4] = 1
    assert nmi(collapsed).item() == 0  # all look at one key: H(k) = 0
    assert nmi(torch.ones(1, 1)).item() == 0 and mad_px(torch.ones(1, 1), (1, 1), 16).item() == 0
    nearly = torch.full((N, N), 1e-30)
    nearly[:, 4] = 1
    assert 0 <= nmi(nearly).item() < 1e-6
    assert entropy(torch.tensor([0.0, 1.0])).item() == 0


def test_random_attention_by_the_definition():
    attention = random_attention(2, 3, N, N)
    attention[0, 1] *= attention[0, 1] > 0.02  # zeros among the weights
    attention /= attention.sum(-1, keepdim=True)
    expected = [[plain_nmi(head) for head in image] for image in attention]
    torch.testing.assert_close(
        nmi(attention), torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0
    )
    by_loops = (attention * plain_distances(GRID, 16)).sum(-1).mean(-1)
    torch.testing.assert_close(mad_px(attention, GRID, 16), by_loops, atol=1e-4, rtol=0)
    torch.testing.assert_close(distances_px(GRID, 16).double(), plain_distances(GRID, 16), atol=1e-4, rtol=0)
    torch.testing.assert_close(distances_px(GRID, 16, slice(4, 9)), distances_px(GRID, 16)[4:9])


def test_scikit_learn_finds_the_same():
    """Attention in whole shares of 20 is a table of counts: pairs of labels, as clusterings are compared."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(20, rng.dirichlet(np.full(N, 0.3), N))  # [N, N]
    attention = torch.from_numpy(counts / 20)
    queries, keys = np.nonzero(counts)
    repeats = counts[queries, keys]
    expected = normalized_mutual_info_score(
        queries.repeat(repeats), keys.repeat(repeats), average_method="geometric"
    )
    assert nmi(attention).item() == pytest.approx(expected, abs=1e-10) and 0.1 < expected < 0.9
    information = mutual_info_score(None, None, contingency=counts)
    h_k = entropy(attention.mean(0)).item()
    assert nmi(attention).item() == pytest.approx(information / math.sqrt(math.log(N) * h_k), abs=1e-10)


def test_rows_over_the_patches_alone():
    weights = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.9, 0.1, 0.0]])
    expected = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])  # a row that underflows says nothing
    torch.testing.assert_close(over_patches(weights, 1), expected)


VITS = {
    "plain": {},
    "registers": dict(n_registers=4, layerscale=0.5),
    "no cls": dict(has_cls=False, final_norm=False, pos_encoding="field", pos_grid=6),
    "relative": dict(relative_positions=True, pos_encoding="none"),
}


def tiny(depth=3, **model_kwargs):
    model = randomize(ViT(embed_dim=12, depth=depth, num_heads=3, patch_size=8, **model_kwargs)).double()
    for block in model.blocks:
        block.norm1.weight.data *= 10
        block.attn.qkv.weight.data *= 5  # attention far from uniform
    return model


def pixels(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def whole_attention(model, x):
    """Of every layer at once, rows over the patches renormalized: [B, L, heads, N, N]."""
    tokens, grid = model.embed(x)
    buckets, first, maps = model.geometry(grid), model.n_prefix, []
    for block in model.blocks:
        weights = block.attn.attention_map(block.norm1(tokens), geometry=buckets)[..., first:, first:]
        maps.append(weights / weights.sum(-1, keepdim=True))
        tokens = block(tokens, geometry=buckets)
    return torch.stack(maps, 1)


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_streamed_equals_plain(kind, block):
    model, x = tiny(**VITS[kind]), pixels(2, 3, 40, 24)
    whole = whole_attention(model, x)
    got = attention_statistics(model, x, block)
    assert got.nmi.shape == got.mad_px.shape == (2, 3, 3)
    torch.testing.assert_close(got.nmi, nmi(whole), atol=1e-10, rtol=0)
    torch.testing.assert_close(got.mad_px, mad_px(whole, (5, 3), 8), atol=1e-10, rtol=0)
    assert got.nmi.min() > 0.01 and got.nmi.max() < 0.99 and got.mad_px.std() > 0.1


@pytest.mark.parametrize("kind", VITS)
def test_single_precision_is_enough(kind):
    model, x = tiny(**VITS[kind]), pixels(2, 3, 40, 24)
    exact = attention_statistics(model, x)
    got = attention_statistics(model.float(), x.float(), 4)
    torch.testing.assert_close(got.nmi, exact.nmi, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.mad_px, exact.mad_px, atol=1e-3, rtol=0)


def test_under_autocast():
    model, x = tiny(), pixels(2, 3, 40, 24)
    exact = attention_statistics(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_statistics(model.float(), x.float(), 4)
    assert got.nmi.dtype == torch.float64
    torch.testing.assert_close(got.mad_px, exact.mad_px, atol=1.0, rtol=0)
    assert not torch.equal(got.nmi, exact.nmi)


class Memory(TorchDispatchMode):
    """Of the tensors made within: the largest, and the most that they held together, in bytes."""

    def __init__(self):
        super().__init__()
        self.alive, self.largest, self.most = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.alive = [a for a in self.alive if a() is not None]
        self.alive += [weakref.ref(t) for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        storages = [t.untyped_storage() for t in (a() for a in self.alive) if t is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.largest, self.most = max(self.largest, *sizes.values()), max(self.most, sum(sizes.values()))
        return made


def memory(depth, batch, block):
    model, x = tiny(depth).float(), torch.zeros(batch, 3, 128, 128)
    with Memory() as seen:
        attention_statistics(model, x, block)
    return seen


def test_memory_is_bounded_by_a_block_of_queries():
    """256 patches, 3 heads: the rows of a block and no more, whatever the depth; the network's own pass
    holds less than these."""
    of_block = 4 * 3 * 128 * 257
    for depth, batch in ((2, 1), (5, 1), (2, 3)):
        seen = memory(depth, batch, 128)
        assert seen.largest == batch * of_block
        assert 2 * batch * of_block < seen.most < 3.5 * batch * of_block  # 3, and the network's own
    assert memory(2, 1, 256).largest == 2 * of_block
    assert memory(2, 1, 1).most < of_block


@pytest.mark.parametrize("kind", VITS)
def test_query_attention_is_rows_of_the_last_layers(kind):
    model, x = tiny(**VITS[kind]), pixels(2, 3, 40, 24)
    got = query_attention(model, x, [(0.0, 0.0), (0.5, 0.3), (1.0, 1.0)])
    assert got.shape == (2, 3, 5, 3)
    rows = last_layer(model, x).patches[:, [0, 4, 14]]
    torch.testing.assert_close(got.flatten(2), rows.float(), atol=1e-6, rtol=1e-5)
    assert patch_at((0.5, 0.3), (5, 3)) == (1, 1) and patch_at((1.0, 1.0), (5, 3)) == (4, 2)
