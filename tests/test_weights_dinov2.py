"""DINOv2's files, made by its layout: features equal timm's model of the same weights with DINOv2's
positions."""

import pytest
import timm
import torch
from public_fixture import NAME, antialiased, at_grid, by_scale, features, images, theirs, timm_vit

from pretrain.build import build_backbone, build_for_fine_tuning
from pretrain.errors import UserError
from pretrain.weights import read_checkpoint
from pretrain.weights.container import Container
from pretrain.weights.read import converted

GRIDS = [(7, 7), (5, 9)]
DEPTH = 2
GATED = dict(
    mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU, mlp_ratio=16 / 3
)  # timm counts both halves


def published(registers=0, seed=0, **gated):
    """The flat file of dinov2_vit*14(_reg4)_pretrain.pth, and the same weights under timm's names."""
    timm_state = timm_vit(registers=registers, init_values=1.0, seed=seed, **gated).state_dict()
    theirs = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."} if gated else {}
    state = {**timm_state, "mask_token": torch.randn(1, 192)}
    for ours, name in theirs.items():
        state = {key.replace(ours, name): value for key, value in state.items()}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        cls_position = torch.randn(1, 1, 192)  # DINOv2 adds it to [CLS]; timm's file has it inside
        state["cls_token"] = state["cls_token"] - cls_position
        state["pos_embed"] = torch.cat([cls_position, state["pos_embed"]], dim=1)
    return state, timm_state


def training(state, chunks=1):
    """What do_test of its training saves: blocks in chunks, numbered by the network, and one head or two."""
    chunked = {}
    for key, value in state.items():
        number = key.split(".")[1] if key.startswith("blocks.") else None
        chunk = None if number is None else int(number) * chunks // DEPTH
        chunked["backbone." + (key if chunk is None else key.replace("blocks.", f"blocks.{chunk}.", 1))] = (
            value
        )
    heads = {f"{head}.mlp.0.weight": torch.randn(4, 192) for head in ("dino_head", "ibot_head")[:chunks]}
    return {**chunked, **heads}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("gated", [{}, GATED])
@pytest.mark.parametrize("registers, rule", [(0, by_scale), (4, antialiased)])
def test_published(tmp_path, registers, rule, gated, grid):
    """ViT-g's MLPs are gated."""
    state, timm_state = published(registers, **gated)
    path = tmp_path / f"dinov2_vits14{'_reg4' if registers else ''}_pretrain.pth"
    torch.save(state, path)
    expected = theirs(at_grid(timm_state, grid, rule, init_values=1.0, **gated), images(grid))
    torch.testing.assert_close(features(path, images(grid)), expected, atol=1e-5, rtol=1e-5)
    checkpoint = read_checkpoint(path)
    method = "DINOv2-reg" if registers else "DINOv2"
    assert checkpoint.provenance == {"source": "dinov2", "method": method}
    assert checkpoint.model_kwargs["patch_size"] == 14 and checkpoint.model_kwargs["n_registers"] == registers
    assert checkpoint.backbone == ("vit_tiny_patch16_reg4" if registers else "vit_tiny_patch16")


def test_the_rules_of_positions_differ(tmp_path):
    state, timm_state = published()
    torch.save(state, tmp_path / "a.pth")
    expected = theirs(at_grid(timm_state, (5, 9), antialiased, init_values=1.0), images((5, 9)))
    assert (features(tmp_path / "a.pth", images((5, 9))) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("wrapped", ["tree", "keys", "ddp"])
def test_training(tmp_path, chunks, wrapped):
    networks = {name: published(seed=seed) for seed, name in enumerate(("teacher", "student"))}
    trained = {name: training(state, chunks) for name, (state, _) in networks.items()}
    if wrapped == "keys":
        trained = {
            "model": {f"{name}.{key}": v for name, state in trained.items() for key, v in state.items()},
            "iteration": 9,
        }
    if wrapped == "ddp":
        trained = {name: {f"module.{key}": v for key, v in state.items()} for name, state in trained.items()}
    torch.save(trained, tmp_path / "checkpoint.pth")
    for subnet, name in ((None, "teacher"), ("teacher", "teacher"), ("student", "student")):
        expected = theirs(at_grid(networks[name][1], (7, 7), by_scale, init_values=1.0), images((7, 7)))
        given = features(tmp_path / "checkpoint.pth", images((7, 7)), subnet=subnet)
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
        told = read_checkpoint(tmp_path / "checkpoint.pth", subnet=subnet).provenance
        assert (told["source"], told["subnet"]) == ("dinov2", name)


def test_a_tensor_that_no_head_owns_is_named(tmp_path):
    torch.save(
        {"teacher": {**training(published()[0]), "surprise.weight": torch.zeros(3)}},
        tmp_path / "checkpoint.pth",
    )
    with pytest.raises(UserError, match=r"left over surprise\.weight"):
        build_backbone(NAME, weights=tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="no backbone of a student"):
        read_checkpoint(tmp_path / "checkpoint.pth", subnet="student")


def shuffled(state):
    keys = [f"blocks.0.mlp.{layer}.weight" for layer in ("fc1", "fc2")]
    state.update({keys[0]: state[keys[1]], keys[1]: state[keys[0]]})


def gated(state):
    """ViT-g's MLP beside its own."""
    state["blocks.1.mlp.w12.weight"] = torch.zeros(1024, 192)


@pytest.mark.parametrize(
    "edit, named",
    [
        (lambda s: s.pop("blocks.1.ls2.gamma"), r"missing blocks\.1\.ls2\.gamma"),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.0.")],
            r"no tensor blocks\.0\.ls1\.gamma",
        ),
        (lambda s: s.pop("norm.weight"), r"no tensor norm\.weight"),
        (lambda s: s.update(pos_embed=s["pos_embed"][:, :-1]), "pos_embed has 49 positions"),
        (
            lambda s: s.update({"blocks.0.norm1.weight": torch.zeros(7)}),
            r"blocks\.0\.norm1\.weight is \(7,\)",
        ),
        (lambda s: s.update({"blocks.5.norm1.weight": torch.zeros(192)}), r"no tensor of blocks\.2"),
        (lambda s: s.update(cls_token=s["pos_embed"]), r"cls_token is \(1, 50, 192\)"),
        (shuffled, r"blocks\.0\.mlp\.fc1\.bias is \(768,\)"),
        (gated, r"left over blocks\.1\.mlp\.w12\.weight beside blocks\.1\.mlp\.fc1\.weight"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, edit, named):
    state, _ = published()
    edit(state)
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    with pytest.raises(UserError, match=named) as error:
        build_backbone(NAME, weights=tmp_path / "dinov2_vits14_pretrain.pth")
    assert "\n" not in str(error.value) and "dinov2_vits14" in str(error.value)


def test_patches_stay_unless_they_are_asked_for(tmp_path):
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(published()[0], path)
    stays = build_backbone(NAME, weights=path)
    assert (
        stays.patch_size == 14
        and stays.model_kwargs["pos_grid"] == 7
        and "mask_token" not in stays.state_dict()
    )
    for converts in (build_backbone(NAME, weights=path, patch_size=16), build_for_fine_tuning(NAME, path)):
        assert (
            converts.patch_embed.proj.weight.shape == (192, 3, 16, 16)
            and converts.model_kwargs["pos_grid"] == 7
        )
    assert build_for_fine_tuning(NAME, path, patch_size=14).patch_size == 14


def test_its_mask_token_is_for_pre_training(tmp_path):
    state, _ = published()
    torch.save(state, tmp_path / "a.pth")
    probed = build_backbone(NAME, weights=tmp_path / "a.pth", mask_tokens=True)
    assert torch.equal(probed.mask_token, state["mask_token"]) and "pos_mask_token" in probed.state_dict()


def franca(form, state):
    """Published with the prefixes of its training and heads, or a backbone alone."""
    if form == "alone":
        return {"teacher": {key.removeprefix("backbone."): v for key, v in training(state, 0).items()}}
    rasa = {"backbone.rasa_head.pos_pred.weight": torch.randn(2, 192)}
    heads = {
        f"{head}.matryoshka_projections.0.weight": torch.randn(4, 192) for head in ("dino_head", "ibot_head")
    }
    return {"teacher": {f"module.{key}": v for key, v in {**training(state, 2), **rasa, **heads}.items()}}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "form, name, method",
    [
        ("training", "franca_vitb14_In21K.pth", "Franca"),
        ("training", "a.pth", "Franca"),
        ("alone", "franca_vitl14_Laion_518.pth", "Franca"),
        ("alone", "a.pth", "Franca"),
        ("alone", "franca_vitb14_Dinov2_In21K.pth", "DINOv2 (Franca's run)"),
    ],
)
def test_franca(tmp_path, form, name, method, grid):
    """It is DINOv2's network with gated MLPs."""
    state, timm_state = published(**GATED)
    torch.save(franca(form, state), tmp_path / name)
    expected = theirs(at_grid(timm_state, grid, by_scale, init_values=1.0, **GATED), images(grid))
    torch.testing.assert_close(features(tmp_path / name, images(grid)), expected, atol=1e-5, rtol=1e-5)
    told = read_checkpoint(tmp_path / name).provenance
    assert (told["source"], told["method"], told["subnet"]) == ("franca", method, "teacher")


def test_dinov2s_own_training_with_gates_is_not_francas(tmp_path):
    torch.save({"teacher": training(published(**GATED)[0], 2)}, tmp_path / "checkpoint.pth")
    assert read_checkpoint(tmp_path / "checkpoint.pth").provenance["source"] == "dinov2"


def test_a_head_of_franca_alone_is_no_backbone(tmp_path):
    torch.save({"rasa_head.pos_pred.weight": torch.randn(2, 192)}, tmp_path / "franca_vitb14_In21K_rasa.pth")
    with pytest.raises(UserError, match="read as franca: no tensor cls_token"):
        read_checkpoint(tmp_path / "franca_vitb14_In21K_rasa.pth")


@pytest.mark.parametrize(
    "width, gated, name",
    [
        (768, False, "base"),
        (768, True, "base"),
        (1024, False, "large"),
        (1536, True, "giant"),
        (1280, False, None),
    ],
)
def test_sizes(tmp_path, width, gated, name):
    """Franca's ViT-B is gated, and no other public one; MAE's ViT-H is not, as the registered one is."""
    hidden = round(width * 8 / 3) if gated else 4 * width
    blocks = {"attn.qkv.weight": (3 * width, width), "ls1.gamma": (width,)}
    blocks |= (
        {"mlp.w12.weight": (2 * hidden, width), "mlp.w3.weight": (width, hidden)}
        if gated
        else {"mlp.fc1.weight": (hidden, width), "mlp.fc2.weight": (width, hidden)}
    )
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1370, width), "mask_token": (1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {f"blocks.0.{key}": shape for key, shape in blocks.items()}
    file = Container(tmp_path / "a.pth", {key: torch.randn(1).expand(shape) for key, shape in shapes.items()})
    found = converted(file)
    assert (
        found.backbone == (name and f"vit_{name}_patch16")
        and found.model_kwargs.get("swiglu", False) == gated
    )
