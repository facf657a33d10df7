"""How a detector runs its ViT: windows, checkpointing, freezing, compilation, and the learning rate of
every tensor."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from backbone_fixture import ROTARY, randomize

from det_plugin import features as det
from det_plugin.features import FeatureOptions, detection_features, prepare
from det_plugin.torchvision_engine.model import PyramidBackbone, SimpleFeaturePyramid
from det_plugin.windows import Windows, global_blocks, partition, unpartition, windowed_attention
from pretrain.backbones.attention import Attention
from pretrain.build import build_backbone, build_for_fine_tuning
from pretrain.errors import UserError
from pretrain.layer_decay import FINAL_NORMS, lr_rate, no_decay

TINY = "vit_tiny_patch16"
BARE = dict(final_norm=False, keep_special_tokens=False)
FULL = dict(pos_encoding="field", n_registers=2, layerscale=1e-2)
WINDOWED = FeatureOptions(window_size=3, global_blocks=1)


def gradients(vit, options, seed=0):
    """The map and every gradient of one training pass."""
    prepare(vit, options)
    x = torch.randn(2, 3, 112, 64, generator=torch.Generator().manual_seed(1)).to(vit.cls_token.dtype)
    torch.manual_seed(seed)
    out = detection_features(vit.train(), x, options)
    vit.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in vit.parameters())]


# --- windows


def detectron2s(vit, window_size, blocks):
    """Detectron2's own ViT with the weights of ours."""
    pytest.importorskip(
        "detectron2", reason="Detectron2 is not installed (it is optional: see its INSTALL guide)"
    )
    from detectron2.modeling.backbone.vit import ViT

    theirs = ViT(
        img_size=112, use_rel_pos=False, **{key: vit.model_kwargs[key] for key in ("embed_dim", "depth", "num_heads")},
        window_size=window_size, window_block_indexes=blocks, norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6),
    )  # fmt: skip
    theirs.load_state_dict(vit.state_dict(), strict=False)
    return theirs.double()


@pytest.mark.parametrize(
    "window_size, n_global, windowed", [(3, 2, [0, 2]), (4, 1, [0, 1, 2]), (0, 4, []), (9, 4, [])]
)
@pytest.mark.detectron2
def test_windows_are_detectron2s(window_size, n_global, windowed):
    vit = randomize(build_backbone(TINY, depth=4, pos_interpolation="bicubic")).double()
    theirs, options = (
        detectron2s(vit, window_size, windowed),
        FeatureOptions(window_size=window_size, global_blocks=n_global, **BARE),
    )
    results = []
    for run in (lambda x: detection_features(vit, x, options), lambda x: theirs(x)["last_feat"]):
        x = torch.randn(
            2, 3, 112, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        ).requires_grad_()
        out = run(x)
        (out * out.detach().cos()).sum().backward()
        results.append((out.detach(), x.grad))
    for ours, expected in zip(*results):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(vit.get_parameter(name).grad, parameter.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "grid, size, n_special", [((7, 5), 3, 0), ((7, 5), 3, 3), ((6, 4), 2, 1), ((2, 3), 4, 2)]
)
def test_who_sees_whom(grid, size, n_special):
    """Against one softmax over all tokens with a mask, the padding written out as tokens whose projection
    is the bias."""
    attention = randomize(Attention(12, 2)).double()
    height, width = (-(-side // size) * size for side in grid)
    n = grid[0] * grid[1]
    x = torch.randn(2, n_special + n, 12, dtype=torch.float64)
    maps = x[:, n_special:].unflatten(1, grid)
    padded = F.pad(maps, (0, 0, 0, width - grid[1], 0, height - grid[0])).flatten(
        1, 2
    )  # zeros: their projection is the bias
    row, column = (
        torch.arange(height).div(size, rounding_mode="floor"),
        torch.arange(width).div(size, rounding_mode="floor"),
    )
    window = (row[:, None] * width + column).flatten()
    sees = torch.ones(n_special + len(window), n_special + len(window), dtype=torch.bool)
    sees[n_special:, n_special:] = window[:, None] == window
    real = torch.ones(height, width, dtype=torch.bool)
    real[grid[0] :], real[:, grid[1] :] = False, False
    sees[:n_special, n_special:] = real.flatten()  # special tokens see all tokens, and padding is none
    q, k, v = attention.heads(torch.cat([x[:, :n_special], padded], 1))
    full = F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).flatten(2)
    kept = torch.cat([full[:, :n_special], full[:, n_special:][:, real.flatten()]], 1)
    torch.testing.assert_close(windowed_attention(attention, x, Windows(grid, size)), attention.proj(kept))


def test_partition_is_undone_and_row_major():
    maps = torch.arange(2.0 * 5 * 7).view(2, 5, 7, 1)
    parts = partition(maps, torch.tensor([-1.0]), 3)
    assert parts.shape == (2, 6, 9, 1) and parts[0, 1].flatten().tolist() == [3, 4, 5, 10, 11, 12, 17, 18, 19]
    assert (
        parts[0, 2].flatten().tolist() == [6, -1, -1, 13, -1, -1, 20, -1, -1]
        and (parts[1, 5] == -1).sum() == 7
    )
    assert torch.equal(unpartition(parts, Windows((5, 7), 3)), maps)


def test_global_blocks_end_equal_groups():
    assert (
        global_blocks(12, 4) == [2, 5, 8, 11]
        and global_blocks(24, 4) == [5, 11, 17, 23]
        and global_blocks(3, 3) == [0, 1, 2]
    )
    vit = build_backbone(TINY, depth=3)
    prepare(vit, FeatureOptions(global_blocks=2))  # without windows it says nothing
    with pytest.raises(UserError, match="global_blocks=2 .* 3 blocks"):
        prepare(vit, FeatureOptions(window_size=2, global_blocks=2))


# --- the same numbers for less memory


@pytest.mark.parametrize(
    "options", [FeatureOptions(), WINDOWED, FeatureOptions(**BARE)], ids=["global", "windows", "bare"]
)
def test_checkpointing_changes_no_gradient(options):
    vit = randomize(build_backbone(TINY, depth=2, drop_path=0.5, **FULL))
    plain, again = (
        gradients(vit, FeatureOptions(**{**vars(options), "checkpointing": on})) for on in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again) if a is not None)
    assert any(
        not torch.equal(a, b) for a, b in zip(plain, gradients(vit, options, seed=5)) if a is not None
    )  # paths are dropped


def saved_mib(vit, options):
    """MiB of the activations that a forward pass keeps for the backward one."""
    kept, owned = {}, {p.untyped_storage().data_ptr() for p in vit.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in owned:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    prepare(vit, options)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = detection_features(vit.train(), torch.randn(1, 3, 128, 128), options)
    return sum(kept.values()) / 2**20, out


@pytest.mark.parametrize("window_size", [0, 3])
def test_what_is_kept_for_the_backward_pass(window_size):
    options = FeatureOptions(window_size=window_size, global_blocks=1)
    vit = build_backbone(TINY, depth=4, drop_path=0.5, **FULL)
    plain, _ = saved_mib(vit, options)
    again, _ = saved_mib(vit, FeatureOptions(**{**vars(options), "checkpointing": True}))
    assert (
        0 < again < 0.5 * plain
    )  # all that is not in a block: pixels, norm (checkpoint holds the blocks' inputs itself)


@pytest.mark.parametrize("window_size", [0, 3])
def test_a_frozen_vit_keeps_nothing_and_drops_nothing(window_size):
    options = FeatureOptions(window_size=window_size, global_blocks=1, freeze=True, checkpointing=True)
    vit = build_backbone(TINY, depth=2, drop_path=0.9, **FULL)
    kept, out = saved_mib(vit, options)
    assert kept == 0 and not out.requires_grad and not any(p.requires_grad for p in vit.parameters())
    detector = PyramidBackbone(vit, SimpleFeaturePyramid(192, 16, 8, (1.0, 0.5), "LN"), options)
    x = torch.randn(2, 3, 64, 64)
    maps = [detector.train(mode)(x)["p4"] for mode in (True, True, False)]
    assert all(torch.equal(m, maps[0]) for m in maps)
    maps[0].sum().backward()
    assert {name.split(".")[0] for name, p in detector.named_parameters() if p.grad is not None} == {
        "pyramid"
    }


# --- compilation


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [FeatureOptions(), WINDOWED], ids=["global", "windows"])
def test_compiled_blocks_give_the_same_gradients(monkeypatch, options, checkpointing):
    monkeypatch.setattr(det, "COMPILER", "aot_eager")
    vit = randomize(build_backbone(TINY, depth=2, drop_path=0.5, **FULL)).double()
    compiled = FeatureOptions(**{**vars(options), "compile": True, "checkpointing": checkpointing})
    for plain, again in zip(gradients(vit, options), gradients(vit, compiled)):
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-9)


def test_blocks_are_compiled_whole_and_once_for_all(monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        det, "_compiled", lambda _: torch.compile(det.run_block, backend=backend, fullgraph=True)
    )
    vit = randomize(build_backbone(TINY, depth=6, drop_path=0.5, **FULL))
    options = FeatureOptions(window_size=3, global_blocks=2, compile=True)
    keys = list(vit.state_dict())
    gradients(vit, options)
    assert len(graphs) == 2  # a windowed block and a global one, each whole; the weights are their inputs
    assert list(vit.state_dict()) == keys
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert all(torch.equal(a, b) for a, b in zip(gradients(vit, options), gradients(other, options)))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("options", [FeatureOptions(), WINDOWED], ids=["global", "windows"])
def test_inductor_gives_the_same_gradients(options):
    vit = randomize(build_backbone(TINY, depth=2, drop_path=0.5, **FULL)).double()
    compiled = FeatureOptions(**{**vars(options), "compile": True, "checkpointing": True})
    for plain, again in zip(gradients(vit, options), gradients(vit, compiled)):
        assert (again - plain).abs().max() <= 1e-6 * plain.abs().max()


# --- learning rates


@pytest.mark.parametrize("model_kwargs", [FULL, dict(), ROTARY], ids=["field", "standard", "rotary"])
def test_every_tensor_has_its_learning_rate_and_weight_decay(model_kwargs):
    vit = build_backbone(TINY, **{"depth": 2, **model_kwargs})
    expected = {  # layer, whether weights decay
        **dict.fromkeys(
            ("cls_token", "reg_token", "patch_embed.proj.weight", "patch_embed.proj.bias"), (0, True)
        ),
        **dict.fromkeys(("pos_embed", "pos_field", "cls_pos"), (0, False)),
        **{f"{norm}.{kind}": (3, False) for norm in FINAL_NORMS for kind in ("weight", "bias")},
    }
    for name, _ in vit.named_parameters():
        if name.startswith("blocks."):
            is_linear = any(part in name for part in (".qkv.", ".proj.", ".fc1.", ".fc2."))
            expected[name] = int(name.split(".")[1]) + 1, is_linear
        layer, decays = expected[name]
        assert lr_rate(name, 2, 0.7) == pytest.approx(0.7 ** (3 - layer)), name
        assert no_decay(name) is not decays, name
    with pytest.raises(ValueError, match="head.weight"):
        lr_rate("head.weight", 2, 0.7)


def test_mask_tokens_are_of_no_use_to_a_detector():
    vit = build_backbone(TINY, depth=1, mask_tokens=True, **FULL)
    prepare(vit, FeatureOptions())
    assert {name for name, p in vit.named_parameters() if not p.requires_grad} == {
        "mask_token",
        "pos_mask_token",
    }


@pytest.mark.parametrize("keep_special_tokens", [True, False])
def test_what_gets_no_gradient_in_a_rotary_network_is_frozen(keep_special_tokens):
    vit = build_for_fine_tuning(TINY, **ROTARY)
    options = FeatureOptions(keep_special_tokens=keep_special_tokens)
    prepare(vit, options)
    detection_features(vit.train(), torch.randn(1, 3, 32, 48), options).sin().sum().backward()
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in vit.named_parameters() if p.grad is None}
    tokens = set() if keep_special_tokens else {"cls_token", "reg_token"}
    assert {name.partition(".")[0] for name in frozen} == {"cls_norm", "local_cls_norm"} | tokens
