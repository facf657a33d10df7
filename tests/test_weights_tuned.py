"""NeCo, TimeT, Leopart: files of their layouts, against the restated networks."""

import pytest
import torch
from public_fixture import refusal
from reference_vit import DinoViT, LeopartViT, NecoOnDinov2, NecoViT, TimeT, difference, filled, saved

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.weights import backbone_name, read_checkpoint

SIZES = ((224, 224), (160, 272))


def behind(**networks):
    """Each network's tensors behind its name."""
    return {
        f"{name}.{key}": value
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }


def lightning(state):
    """What Lightning saves."""
    return {
        "epoch": 9,
        "global_step": 1234,
        "pytorch-lightning_version": "1.6.0",
        "state_dict": state,
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "lr_schedulers": [],
        "hyper_parameters": {"arch": "vit-small", "patch_size": 16},
    }


TIMET, AVERAGED = filled(TimeT()), filled(TimeT(teacher=True))
LEOPART, NECO, DINO, OTHER = (
    filled(kind(), seed) for seed, kind in enumerate((LeopartViT, NecoViT, DinoViT, LeopartViT))
)
NECO_TEACHER = filled(NecoViT(), 7)
LAYOUTS = {
    "timet": (TIMET.feature_extractor.backbone, TIMET.state_dict(), "TimeT"),
    "timet run": (
        AVERAGED.feature_extractor.backbone,
        {"model": AVERAGED.state_dict(), "epoch": 3, "optimizer": {}},
        "TimeT",
    ),
    "leopart": (LEOPART, behind(model=LEOPART), "Leopart"),
    "leopart run": (LEOPART, lightning(behind(teacher=OTHER, model=LEOPART)), "Leopart"),
    "neco": (NECO, NECO.state_dict(), "NeCo"),
    "neco run": (NECO, lightning(behind(teacher=NECO_TEACHER, model=NECO)), "NeCo"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_backbone(layout, tmp_path):
    reference, content, method = LAYOUTS[layout]
    path = saved(tmp_path, content)
    found = read_checkpoint(path)
    assert (found.provenance["source"], found.provenance["method"]) == (method.lower(), method)
    assert found.provenance.get("epoch") == content.get("epoch")
    ours = build_backbone(backbone_name(None, path), path)
    assert max(difference(reference, ours, size) for size in SIZES) < 1e-5


@pytest.mark.parametrize(
    "layout, teacher",
    [("timet run", AVERAGED.teacher.backbone), ("leopart run", OTHER), ("neco run", NECO_TEACHER)],
)
def test_the_moving_average_on_demand(layout, teacher, tmp_path):
    path = saved(tmp_path, LAYOUTS[layout][1])
    assert read_checkpoint(path, subnet="teacher").provenance["subnet"] == "teacher"
    assert difference(teacher, build_backbone("vit_tiny_patch16", path, subnet="teacher"), SIZES[0]) < 1e-5


@pytest.mark.parametrize("n_registers", [0, 4])
@pytest.mark.parametrize("with_head", [True, False])
def test_neco_on_dinov2(n_registers, with_head, tmp_path):
    reference = filled(NecoOnDinov2(n_registers))
    state = {
        key: value
        for key, value in reference.state_dict().items()
        if with_head or not key.startswith("projection_head.")
    }
    path = saved(tmp_path, state, "neco_on_dinov2_vit14_teacher.ckpt")
    found = read_checkpoint(path)
    assert (found.provenance["source"], found.model_kwargs["pos_interpolation"]) == ("neco", "dinov2")
    name = backbone_name(None, path)
    assert name == "vit_tiny_patch16" + ("_reg4" if n_registers else "")
    ours = build_backbone(name, path)
    assert max(difference(reference, ours, size) for size in ((126, 126), (98, 182))) < 1e-5


@pytest.mark.parametrize(
    "name, source",
    [
        ("neco_on_dino_vit16_model.ckpt", "neco"),
        ("neco_on_leopart_vit16_teacher.ckpt", "neco"),
        ("neco_on_timetuning_vit16_model.ckpt", "neco"),
        ("backbone.ckpt", "timm"),
        ("leopart_vits16.ckpt", "timm"),
    ],
)
def test_a_backbone_alone_is_known_by_the_files_name(name, source, tmp_path):
    path = saved(tmp_path, DINO.state_dict(), name)
    assert read_checkpoint(path).provenance["source"] == source
    assert difference(DINO, build_backbone("vit_tiny_patch16", path), SIZES[0]) < 1e-5


def test_leopart_without_its_head_is_known_by_the_files_name(tmp_path):
    path = saved(tmp_path, behind(model=DINO), "leopart_vits16.ckpt")
    assert read_checkpoint(path).provenance["source"] == "leopart"
    with pytest.raises(UserError, match="no supported layout"):
        read_checkpoint(saved(tmp_path, behind(model=DINO), "some.ckpt"))


def changed(state, **values):
    """Without the tensors whose new value is none."""
    merged = {**state, **{key.replace("__", "."): value for key, value in values.items()}}
    return {key: value for key, value in merged.items() if value is not None}


@pytest.mark.parametrize(
    "content, options, says",
    [
        (
            TIMET.state_dict(),
            {"subnet": "teacher"},
            "subnet teacher is not there; the file holds only the student",
        ),
        (NECO.state_dict(), {"subnet": "student"}, "subnet student is not there"),
        (behind(model=LEOPART), {"subnet": "teacher"}, "subnet teacher is not there"),
        (TIMET.state_dict(), {"source": "leopart"}, "no network under the names of its files"),
        (behind(model=LEOPART), {"source": "timet"}, "no network under the names of its files"),
        (behind(model=LEOPART), {"source": "neco"}, "prototypes"),
        (DINO.state_dict(), {"source": "timet"}, "no network under the names of its files"),
        (changed(TIMET.state_dict(), feature_extractor__backbone__cls_token=None), {}, "cls_token"),
        (changed(TIMET.state_dict(), feature_extractor__backbone__norm__bias=None), {}, "norm.bias"),
        (
            changed(TIMET.state_dict(), feature_extractor__norm__weight=torch.ones(192)),
            {},
            "left over norm.weight",
        ),
        (changed(TIMET.state_dict(), stray=torch.ones(1)), {}, "stray"),
        (changed(behind(model=LEOPART), model__pos_embed=None), {}, "pos_embed"),
        (
            changed(behind(model=LEOPART), model__blocks__1__mlp__fc1__bias=None),
            {},
            "missing blocks.1.mlp.fc1.bias",
        ),
        (changed(behind(model=LEOPART), model__relation=torch.ones(1)), {}, "left over relation"),
        (
            changed(
                behind(model=LEOPART),
                model__pos_embed=torch.ones(192),
                model__norm__bias=torch.ones(1, 197, 192),
            ),
            {},
            "pos_embed",
        ),
        (changed(AVERAGED.state_dict(), teacher__backbone__norm__bias=None), {}, "they differ in norm.bias"),
        (
            changed(behind(teacher=OTHER, model=LEOPART), teacher__cls_token=torch.ones(1, 1, 9)),
            {},
            "they differ in cls_token",
        ),
        (changed(NECO.state_dict(), blocks__1__norm1__weight=None), {}, "missing blocks.1.norm1.weight"),
        (changed(NECO.state_dict(), blocks__5__norm1__weight=torch.ones(192)), {}, "blocks.2"),
        (changed(NECO.state_dict(), cls_token=None), {}, "cls_token"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(content, options, says, tmp_path):
    assert says in refusal(saved(tmp_path, content), **options)
