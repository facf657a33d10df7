"""What other methods' networks lack: [CLS], the final norm, positions. Each against the formulas, from the
tensors alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from backbone_fixture import randomize

from det_plugin.features import FeatureOptions, detection_features, prepare
from pretrain.backbones.vit import ViewGroup
from pretrain.build import build_backbone
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.export import export
from pretrain.methods.intertwined import Intertwined
from pretrain.weights import save_backbone

TINY = "vit_tiny_patch16"
EPS = 1e-6
VARIANTS = [
    dict(has_cls=cls, final_norm=norm, pos_encoding=positions)
    for cls, norm, positions in itertools.product((True, False), (True, False), ("none", "standard", "field"))
    if (cls, norm, positions) != (True, True, "standard")
]
EACH = pytest.mark.parametrize(
    "model_kwargs", VARIANTS, ids=lambda f: f"cls{f['has_cls']:d}-norm{f['final_norm']:d}-{f['pos_encoding']}"
)
BARE = dict(has_cls=False, final_norm=False, pos_encoding="none")


def variant(model_kwargs, **more):
    grid = {"none": {}, "standard": dict(pos_grid=4), "field": dict(pos_grid=9)}[model_kwargs["pos_encoding"]]
    return randomize(build_backbone(TINY, depth=2, **grid, **model_kwargs, **more))


def restated(state, model_kwargs, x):
    """Tokens after the last block, and norm if there is one: [B, (1 +) 16, D] of [B, 3, 64, 64]."""

    def norm(name, tokens):
        return F.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], EPS)

    def linear(name, tokens):
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    tokens = (
        F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16).flatten(2).mT
    )
    cls = state["cls_token"] if model_kwargs["has_cls"] else torch.zeros(1, 0, 192)
    if model_kwargs["pos_encoding"] == "standard":
        cls, tokens = (
            cls + state["pos_embed"][:, : cls.shape[1]],
            tokens + state["pos_embed"][:, cls.shape[1] :],
        )
    if (
        model_kwargs["pos_encoding"] == "field"
    ):  # 9 x 9 samples, of which each second lies at the center of one of 4 x 4 patches
        cls = cls + state["cls_pos"] if model_kwargs["has_cls"] else cls
        tokens = tokens + state["pos_field"][..., 1::2, 1::2].flatten(2).mT
    tokens = torch.cat([cls.expand(len(x), -1, -1), tokens], 1)
    for block in ("blocks.0", "blocks.1"):
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)).chunk(3, dim=-1)
        heads = [
            (q_ @ k_.mT / 8).softmax(-1) @ v_ for q_, k_, v_ in zip(*(t.split(64, -1) for t in (q, k, v)))
        ]
        tokens = tokens + linear(f"{block}.attn.proj", torch.cat(heads, -1))
        tokens = tokens + linear(
            f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", tokens)))
        )
    return norm("norm", tokens) if model_kwargs["final_norm"] else tokens


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@EACH
def test_features_equal_the_formulas_and_what_is_absent_has_no_tensor(model_kwargs):
    vit, x = variant(model_kwargs), images(64, 64)
    state = vit.state_dict()
    own = {
        "none": [],
        "standard": ["pos_embed"],
        "field": ["pos_field"] + ["cls_pos"] * model_kwargs["has_cls"],
    }[model_kwargs["pos_encoding"]]
    own += ["cls_token"] * model_kwargs["has_cls"] + ["norm"] * model_kwargs["final_norm"]
    assert {key.split(".")[0] for key in state} == {"patch_embed", "blocks", *own}
    with torch.no_grad():
        expected, got = restated(state, model_kwargs, x), vit(x)
        (packed,) = vit.forward_views([ViewGroup(x)])
        maps = vit.feature_map(x)
    assert vit.n_prefix == expected.shape[1] - 16 and got.registers.shape == (2, 0, 192)
    patches = expected[:, vit.n_prefix :]
    cls = expected[:, 0] if model_kwargs["has_cls"] else sum(patches[:, i] for i in range(16)) / 16
    assert patches.abs().max() > 0.5
    for tokens in (got, packed):
        torch.testing.assert_close(tokens.patches, patches, rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens.cls, cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(maps, patches.mT.unflatten(2, (4, 4)), rtol=0, atol=1e-5)


@EACH
def test_a_file_builds_the_same_network(tmp_path, model_kwargs):
    vit, x = variant(model_kwargs, n_registers=2), images(40, 70)
    file = save_backbone(
        tmp_path / "b.safetensors", vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs
    )
    again = build_backbone(TINY, file).eval()
    assert again.model_kwargs == vit.model_kwargs
    with torch.no_grad():
        assert all(torch.equal(one, two) for one, two in zip(again(x), vit(x)))
    with pytest.raises(
        UserError,
        match=f"has_cls={model_kwargs['has_cls']}, but has_cls={not model_kwargs['has_cls']} is asked for",
    ):
        build_backbone(TINY, file, has_cls=not model_kwargs["has_cls"])


@EACH
def test_detectors_take_it(model_kwargs):
    vit, x = variant(model_kwargs), images(64, 64)
    with torch.no_grad():
        assert torch.equal(detection_features(vit, x, FeatureOptions()), vit.feature_map(x))
        assert detection_features(vit, x, FeatureOptions(window_size=3, global_blocks=1)).shape == (
            2,
            192,
            4,
            4,
        )
    options = FeatureOptions(final_norm=False, keep_special_tokens=False)
    prepare(vit, options)
    with torch.no_grad():
        content = vit.embed(x)[0][:, vit.n_prefix :]
        for block in vit.blocks:
            content = block(content)
    got = detection_features(vit, x, options)
    torch.testing.assert_close(got, content.mT.unflatten(2, (4, 4)), rtol=0, atol=1e-6)
    # Every parameter that learns gets a gradient: DistributedDataParallel waits for each
    got.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in vit.parameters())


@pytest.mark.parametrize(
    "model_kwargs", [BARE, dict(BARE, has_cls=True), dict(BARE, pos_encoding="field")], ids=str
)
def test_segmentation_takes_it(tmp_path, model_kwargs):
    pytest.importorskip("mmseg", reason="MMSegmentation is not installed (pip install 'posfield[seg]')")
    from seg_plugin.backbone import PosfieldViT

    vit, x = variant(model_kwargs), images(48, 64)
    file = save_backbone(
        tmp_path / "b.safetensors", vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs
    )
    model = PosfieldViT(TINY, file, checkpointing=True)
    (got,) = model(x)
    torch.testing.assert_close(got, vit.feature_map(x), rtol=0, atol=1e-5)
    got.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "model_kwargs", [BARE, dict(BARE, has_cls=True), dict(BARE, pos_encoding="standard")], ids=str
)
def test_a_program_does_what_it_does(tmp_path, model_kwargs):
    assert export(variant(model_kwargs), "torch", (40, 64), tmp_path / "a.pt2") < 1e-5


def test_positions_that_are_not_there_have_no_grid():
    for given in (dict(pos_grid=14), dict(pos_interpolation="bicubic")):
        with pytest.raises(UserError, match="pos_encoding 'none' has neither"):
            build_backbone(TINY, pos_encoding="none", **given)


@pytest.mark.parametrize(
    "model_kwargs, said",
    [
        (
            dict(has_cls=False, layerscale=1e-5, pos_encoding="field", pos_grid=4),
            r"backbone\.weights: .*b\.safetensors has no \[CLS\] token",
        ),
        (
            dict(pos_encoding="none"),
            r"b\.safetensors has no absolute positions of which positions\.encoding=field could make a field",
        ),
    ],
    ids=["no-cls", "no-positions"],
)
def test_pretraining_cannot_start_from_such_a_file(tmp_path, model_kwargs, said):
    vit = build_backbone(TINY, depth=2, **model_kwargs)
    file = save_backbone(
        tmp_path / "b.safetensors", vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs
    )
    settings = [
        f"backbone.name={TINY}",
        "backbone.depth=2",
        "positions.grid=4",
        "data.root=x",
        f"backbone.weights={file}",
    ]
    with pytest.raises(UserError, match=said):
        Intertwined(load_config(None, settings))
