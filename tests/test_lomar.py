"""LoMaR: contextual relative positions, held against the encoder of its public code, written again here
pair by pair."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from backbone_fixture import randomize
from torch import nn

from det_plugin import features as det
from det_plugin.features import FeatureOptions, detection_features, prepare
from det_plugin.windows import Windows, windowed_attention
from pretrain.analysis.attention import last_layer
from pretrain.backbones.relative import relative_buckets
from pretrain.backbones.vit import ViewGroup
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.export import export
from pretrain.layer_decay import lr_rate, no_decay
from pretrain.weights import read_checkpoint, save_backbone

TINY = "vit_tiny_patch16"
FLAGS = dict(depth=2, pos_encoding="none", relative_positions=True)
BARE = dict(final_norm=False, keep_special_tokens=False)
SPECIAL = 49


# --- the oracle


def bucket(dy, dx):
    """Of a key that lies dy rows above and dx columns left of its query, in patches."""

    def place(d):
        if abs(d) <= 1.9:
            return d
        index = round(1.9 + math.log(abs(d) / 1.9) / math.log(15.2 / 1.9) * (3.8 - 1.9))
        return int(math.copysign(min(index, 3), d))

    return (place(dy) + 3) * 7 + place(dx) + 3


def buckets_by_hand(grid, n_special):
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    patches = [[SPECIAL] * n_special + [bucket(y - v, x - u) for v, u in places] for y, x in places]
    return torch.tensor([[SPECIAL] * (n_special + len(places))] * n_special + patches)


class Table(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, width, 50))


class PublicAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpe_k = Table(dim // heads)

    def forward(self, x, buckets):
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in self.qkv(x).chunk(3, dim=-1))  # [B, N, heads, d]
        vectors = self.rpe_k.lookup_table_weight[0].T[buckets]  # [N, N, d]: one of every pair
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1]) + torch.einsum(
            "bihd,ijd->bhij", q, vectors
        )
        return self.proj(torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).flatten(2))


class PublicBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = PublicAttention(dim, heads), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, buckets):
        x = x + self.attn(self.norm1(x), buckets)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class PublicLoMaR(nn.Module):
    """The network that LoMaR pre-trains, with its names; the features of whole images."""

    def __init__(self, dim=192, depth=2, heads=3):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 16, 16)
        self.cls_token, self.mask_token = (
            nn.Parameter(torch.zeros(1, 1, dim)),
            nn.Parameter(torch.zeros(1, 1, dim)),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, dim), requires_grad=False)
        self.blocks = nn.ModuleList(PublicBlock(dim, heads) for _ in range(depth))
        self.norm, self.encoder_pred = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 768)

    def forward(self, x, with_cls=True):
        maps = self.patch_embed.proj(x)
        buckets = buckets_by_hand(maps.shape[2:], int(with_cls))
        tokens = maps.flatten(2).transpose(1, 2)
        if with_cls:
            tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens, buckets)
        return tokens


@pytest.fixture(scope="module")
def public():
    return randomize(PublicLoMaR())


def write(path, state):
    """A file as LoMaR's pre-training leaves it."""
    optimizer = {
        "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 1e-3, "params": [0]}],
    }
    torch.save(
        {
            "model": state,
            "optimizer": optimizer,
            "epoch": 399,
            "scaler": {},
            "args": argparse.Namespace(lr=1),
        },
        path,
    )
    return path


@pytest.fixture
def file(public, tmp_path):
    return write(tmp_path / "checkpoint-399.pth", public.state_dict())


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_vit(dtype=torch.float32, **model_kwargs):
    return randomize(build_backbone(TINY, **{**FLAGS, **model_kwargs})).to(dtype)


# --- buckets


@pytest.mark.parametrize("n_special", [0, 1, 5])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (3, 20), (17, 1), (1, 1)])
def test_buckets_equal_the_formula_pair_by_pair(grid, n_special):
    assert torch.equal(relative_buckets(grid, n_special), buckets_by_hand(grid, n_special))


def test_the_window_that_lomar_trains_on():
    """7 x 7 patches and [CLS]: what the public code gives for the first patch, and how far each bucket
    reaches."""
    buckets = relative_buckets((7, 7), 1)
    assert buckets.shape == (50, 50) and set(buckets.unique().tolist()) == set(range(50))
    assert buckets[0].unique().tolist() == buckets[:, 0].unique().tolist() == [49]
    first = [
        24,
        23,
        22,
        22,
        21,
        21,
        21,
        17,
        16,
        15,
        15,
        14,
        14,
        14,
        10,
        9,
        8,
        8,
        7,
        7,
        7,
        10,
        9,
        8,
        8,
        7,
        7,
        7,
    ]
    assert buckets[1, 1:].tolist() == first + 3 * [3, 2, 1, 1, 0, 0, 0]
    line = relative_buckets((1, 41), 0)[20] - 21  # a query in the middle of a line
    assert line.tolist() == [6] * 17 + [5, 5, 4, 3, 2, 1, 1] + [0] * 17


# --- the file


@pytest.mark.parametrize("size", [(224, 224), (64, 176), (50, 100)])
def test_features_equal_the_public_encoder(public, file, size):
    vit = build_backbone(TINY, file).eval()
    x = noise(2, 3, *size)
    with torch.no_grad():
        expected = public.norm(public(F.pad(x, (0, -size[1] % 16, 0, -size[0] % 16))))
        tokens = vit(x)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(
        torch.cat([tokens.cls[:, None], tokens.patches], 1), expected, rtol=0, atol=1e-5
    )


def test_what_is_read_and_what_is_dropped(public, file, tmp_path):
    found = read_checkpoint(file)
    assert found.provenance == {"source": "lomar", "method": "LoMaR"} and found.backbone == TINY
    assert set(public.state_dict()) - set(found.state) == {
        "pos_embed",
        "encoder_pred.weight",
        "encoder_pred.bias",
    }
    vit = build_backbone(TINY, file, mask_tokens=True).eval()
    assert vit.pos_encoding == "none" and torch.equal(vit.mask_token, public.mask_token[0])
    ours = save_backbone(
        tmp_path / "b.safetensors", vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs
    )
    again, x = build_backbone(TINY, ours).eval(), noise(1, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(again.feature_map(x), vit.feature_map(x))
    plain = build_backbone(TINY, depth=1)
    older = {key: value for key, value in plain.model_kwargs.items() if key != "relative_positions"}
    ours = save_backbone(tmp_path / "old.safetensors", plain.state_dict(), name=TINY, model_kwargs=older)
    assert build_backbone(TINY, ours).geometry((2, 2)) is None


KEY = "blocks.1.attn.rpe_k.lookup_table_weight"


@pytest.mark.parametrize(
    "edit, said",
    [
        (
            lambda s: s.update({"blocks.0.attn.rpe_q.lookup_table_weight": s[KEY]}),
            "blocks.0.attn.rpe_q.lookup.* on keys alone",
        ),
        (
            lambda s: s.update({"blocks.0.attn.rpe_v.lookup_table_weight": s[KEY].mT}),
            r"blocks.0.attn.rpe_v.*only LoMaR's",
        ),
        (
            lambda s: s.update({"blocks.1.attn.rpe_k.lookup_table_bias": s[KEY][:, 0]}),
            "rpe_k.lookup_table_bias.*only LoMaR's",
        ),
        (lambda s: s.update({"blocks.0.attn.rpe_k.rp_rows.lookup_table_weight": s[KEY]}), "rp_rows.*product"),
        (
            lambda s: s.update({KEY: s[KEY].repeat(3, 1, 1)}),
            r"blocks.1.* is \(3, 64, 50\).*one table for all heads",
        ),
        (lambda s: s.update({KEY: s[KEY][..., :49]}), r"blocks.1.* is \(1, 64, 49\).*7 x 7 \+ 1"),
        (
            lambda s: s.update({KEY: s[KEY][:, :32]}),
            r"rpe_k.lookup_table_weight is \(1, 32, 50\) in the file",
        ),
        (lambda s: s.pop(KEY), f"missing {KEY}"),
        (lambda s: s.pop("norm.bias"), "missing norm.bias"),
        (lambda s: s.update({"head.weight": torch.zeros(2, 192)}), "left over head.weight"),
        (lambda s: s.pop("encoder_pred.weight"), "no tensor encoder_pred.weight.*scales the query first"),
    ],
)
def test_other_variants_and_damaged_files_are_refused_by_name(public, tmp_path, edit, said):
    state = dict(public.state_dict())
    edit(state)
    with pytest.raises(UserError, match=f"x.pth.*{said}"):
        build_backbone(TINY, write(tmp_path / "x.pth", state))


def test_a_file_without_tables_is_not_lomars(tmp_path):
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 192)}}, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"read as lomar: no tensor blocks\.N\.attn\.rpe_k\.lookup_table_weight"
    ):
        read_checkpoint(tmp_path / "x.pth", source="lomar")


# --- one pass is another


def gradients(vit, run):
    vit.zero_grad()
    outputs = run(vit)
    sum((out * out.detach().cos()).sum() for out in outputs).backward()
    assert all(block.attn.rpe_k.lookup_table_weight.grad.abs().max() > 1e-4 for block in vit.blocks)
    return [*(out.detach() for out in outputs), *(p.grad for p in vit.parameters() if p.grad is not None)]


def groups(dtype):
    sizes = [(2, 3, 64, 64), (3, 3, 32, 80), (1, 3, 40, 20)]
    return [ViewGroup(noise(*size, seed=i, dtype=dtype)) for i, size in enumerate(sizes)]


def packed(vit):
    dtype = next(vit.parameters()).dtype
    return [t for tokens in vit.forward_views(groups(dtype)) for t in (tokens.cls, tokens.patches)]


def apart(vit):
    dtype = next(vit.parameters()).dtype
    return [t for group in groups(dtype) for tokens in [vit(*group)] for t in (tokens.cls, tokens.patches)]


@pytest.mark.parametrize("n_registers", [0, 2])
def test_packed_views_equal_a_pass_for_each_size(n_registers):
    vit = relative_vit(torch.float64, n_registers=n_registers)
    for one, two in zip(gradients(vit, packed), gradients(vit, apart)):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ["full", "selective"])
def test_checkpointed_blocks_give_the_same_gradients(rule):
    vit = relative_vit(drop_path=0.5).train()
    torch.manual_seed(5)
    plain = gradients(vit, packed)
    vit.checkpointing = rule
    torch.manual_seed(5)
    assert all(torch.equal(one, two) for one, two in zip(gradients(vit, packed), plain))


def test_bfloat16_autocast_rounds_and_no_more():
    """Here on the CPU; that a product's gradient, a sum over keys, is not added up in bfloat16 matters on
    a GPU."""
    vit, x = relative_vit(depth=1), noise(1, 3, 320, 240)
    expected = gradients(vit, lambda vit: [vit(x).patches])
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(vit, lambda vit: [vit(x).patches.float()])
    for one, two in zip(got, expected):
        assert (one - two).norm() <= 0.02 * two.norm()


def test_attention_maps_are_what_attention_does():
    vit, x = relative_vit(n_registers=2), noise(2, 3, 48, 80)
    attention = vit.blocks[0].attn
    with torch.no_grad():
        tokens, grid = vit.embed(x)
        buckets = vit.geometry(grid)
        maps = attention.attention_map(tokens, geometry=buckets)
        values = (maps @ attention.heads(tokens)[2]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(
            attention.proj(values), attention(tokens, None, buckets), rtol=0, atol=1e-5
        )
        assert torch.equal(attention.attention_map(tokens, slice(4, 9), buckets), maps[:, :, 4:9])
        torch.testing.assert_close(last_layer(vit, x).patches.sum(-1), torch.ones(2, 15))
    for call in (vit.blocks[0], attention, attention.attention_map):
        with pytest.raises(ValueError, match=r"relative positions; .* ViT\.geometry\(grid\)"):
            call(tokens)


def test_xformers_is_refused():
    with pytest.raises(UserError, match="'xformers' has no relative positions"):
        build_backbone(TINY, attention="xformers", **FLAGS)


# --- detection, segmentation, export


def test_detectors_take_it_with_and_without_special_tokens(public, file):
    vit, x = build_backbone(TINY, file).eval(), noise(2, 3, 64, 50)
    with torch.no_grad():
        assert torch.equal(detection_features(vit, x, FeatureOptions()), vit.feature_map(x))
        expected = public(F.pad(x, (0, 14)), with_cls=False).transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(
            detection_features(vit, x, FeatureOptions(**BARE)), expected, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("grid, size, n_special", [((6, 6), 3, 0), ((7, 5), 3, 2), ((2, 3), 4, 1)])
def test_windows_keep_the_distances_of_the_image(grid, size, n_special):
    """Against one softmax over all tokens, with a mask; padding written out as zeros, whose projection is
    the bias."""
    attention = relative_vit(torch.float64).blocks[0].attn
    height, width = (-(-side // size) * size for side in grid)
    x = noise(2, n_special + grid[0] * grid[1], 192, dtype=torch.float64)
    maps = F.pad(x[:, n_special:].unflatten(1, grid), (0, 0, 0, width - grid[1], 0, height - grid[0]))
    window = (torch.arange(height)[:, None] // size * width + torch.arange(width) // size).flatten()
    real = F.pad(torch.ones(grid, dtype=torch.bool), (0, width - grid[1], 0, height - grid[0])).flatten()
    sees = F.pad(window[:, None] == window, (n_special, 0, n_special, 0), value=True)
    sees[:n_special, n_special:] = real
    q, k, v = attention.heads(torch.cat([x[:, :n_special], maps.flatten(1, 2)], 1))
    vectors = attention.rpe_k.lookup_table_weight[0].T[buckets_by_hand((height, width), n_special)]
    logits = q @ k.mT / 8 + torch.einsum("bhid,ijd->bhij", q, vectors)
    full = (logits.masked_fill(~sees, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    kept = torch.cat([full[:, :n_special], full[:, n_special:][:, real]], 1)
    torch.testing.assert_close(windowed_attention(attention, x, Windows(grid, size)), attention.proj(kept))


@pytest.mark.parametrize("window_size", [0, 3])
def test_a_detectors_checkpointed_and_compiled_blocks(monkeypatch, window_size):
    monkeypatch.setattr(det, "COMPILER", "aot_eager")
    vit, x = relative_vit(torch.float64, drop_path=0.5).train(), noise(2, 3, 64, 80, dtype=torch.float64)
    plain = dict(window_size=window_size, global_blocks=1)
    prepare(vit, FeatureOptions(**plain))
    results = []
    for more in (dict(), dict(checkpointing=True), dict(checkpointing=True, compile=True)):
        torch.manual_seed(3)
        options = FeatureOptions(**plain, **more)
        results.append(gradients(vit, lambda vit, options=options: [detection_features(vit, x, options)]))
    for again in results[1:]:
        for one, two in zip(again, results[0]):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_a_table_learns_as_its_block_does_and_decays_as_in_irpe():
    name = "blocks.1.attn.rpe_k.lookup_table_weight"
    assert name in dict(relative_vit().named_parameters())
    assert lr_rate(name, 2, 0.7) == lr_rate("blocks.1.attn.qkv.weight", 2, 0.7) and not no_decay(name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_segmentation_takes_it(file, checkpointing):
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed (pip install 'posfield[seg]')")
    from seg_plugin.backbone import PosfieldViT
    from seg_plugin.optim import param_groups

    model, x = PosfieldViT(TINY, file, checkpointing=checkpointing).eval(), noise(1, 3, 64, 96)
    (got,) = model(x)
    torch.testing.assert_close(got, build_backbone(TINY, file).eval().feature_map(x), rtol=0, atol=1e-5)
    whole = nn.Module()
    whole.backbone = model
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in param_groups(whole, lr=1, weight_decay=0.1, layer_decay=0.5)
                for p in g["params"]}  # fmt: skip
    attention = model.vit.blocks[0].attn
    assert (
        settings[id(attention.rpe_k.lookup_table_weight)] == settings[id(attention.qkv.weight)] == (0.25, 0.1)
    )


@pytest.mark.parametrize("format, suffix", [("torch", "pt2"), ("onnx", "onnx")])
def test_a_program_does_what_it_does(tmp_path, format, suffix):
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason="ONNX is not installed (pip install 'posfield[export]')")
    assert export(relative_vit(), format, (48, 80), tmp_path / f"a.{suffix}") < 1e-5
