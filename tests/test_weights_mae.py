"""MAE and DropPos: files of their layouts, against the restated encoders."""

import argparse

import pytest
import torch
from public_fixture import refusal
from reference_vit import DinoViT, DropPos, Mae, MaeEncoder, difference, filled, saved

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.weights import backbone_name, read_checkpoint
from pretrain.weights.common import is_fixed

SIZES = ((224, 224), (160, 272))


def run_of(model, **entries):
    """What MAE's training loop saves."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75, resume=""),
        **entries,
    }


def droppos_run(model, **entries):
    """What DropPos's training loop saves: DDP's names, and the name of the model under ``model``."""
    state = {"module." + key: value for key, value in model.state_dict().items()}
    return {
        "epoch": 800,
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
        "model": "DropPos_mae_vit",
        **entries,
    }


MAE = filled(MaeEncoder())
LAYOUTS = {
    "encoder": (MAE, {"model": MAE.state_dict()}, "mae"),
    "pre-training": (model := filled(Mae()), run_of(model), "mae"),
    "decoder alone": (model := filled(Mae()), {"model": model.state_dict()}, "mae"),
    "droppos run": (model := filled(DropPos()), droppos_run(model), "droppos"),
    "droppos multi-task": (model := filled(DropPos(multi_task=True)), droppos_run(model), "droppos"),
    "droppos model": (model := filled(DropPos()), {"model": model.state_dict()}, "droppos"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_encoder(layout, tmp_path):
    reference, content, source = LAYOUTS[layout]
    path = saved(tmp_path, content)
    found = read_checkpoint(path)
    assert (found.provenance["source"], found.provenance["method"]) == (
        source,
        {"mae": "MAE", "droppos": "DropPos"}[source],
    )
    assert found.provenance.get("epoch") == content.get("epoch")
    ours = build_backbone(backbone_name(None, path), path)
    assert max(difference(reference, ours, size) for size in SIZES) < 1e-5


def test_the_table_is_the_one_that_the_papers_give():
    assert is_fixed(MAE.state_dict())
    assert is_fixed({"pos_embed": MAE.pos_embed.half()})
    rolled = MAE.pos_embed.detach().clone()
    rolled[:, 1:] = (
        rolled[:, 1:].unflatten(1, (14, 14)).transpose(1, 2).flatten(1, 2)
    )  # rows first: MoCo v3's
    assert not is_fixed({"pos_embed": rolled})
    assert not is_fixed({"pos_embed": torch.rand(1, 197, 192)})
    assert not is_fixed({"pos_embed": torch.rand(197, 192)})
    assert not is_fixed({})


def test_without_marks_the_file_is_named_or_timms(tmp_path):
    state = MAE.state_dict()
    assert read_checkpoint(saved(tmp_path, state, "backbone.pth")).provenance["source"] == "timm"
    learned = {"model": filled(DinoViT()).state_dict()}
    assert read_checkpoint(saved(tmp_path, learned, "mae_tuned.pth")).provenance["source"] == "timm"
    encoder = {"state_dict": {"module." + key: value for key, value in state.items()}}
    found = read_checkpoint(saved(tmp_path, encoder, "DropPos_vit_base_patch16.pth"))
    assert found.provenance["method"] == "DropPos"


def test_droppos_moving_average(tmp_path):
    student, teacher = filled(DropPos()), filled(DropPos(), seed=1)
    ema = {"module." + key: value for key, value in teacher.state_dict().items()}
    path = saved(tmp_path, droppos_run(student, ema_state_dict=ema))
    assert read_checkpoint(path).provenance["subnet"] == "student"
    assert difference(student, build_backbone("vit_tiny_patch16", path), SIZES[1]) < 1e-5
    assert difference(teacher, build_backbone("vit_tiny_patch16", path, subnet="teacher"), SIZES[1]) < 1e-5


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    "content, options, says",
    [
        ({"model": MAE.state_dict()}, {"subnet": "teacher"}, "subnet teacher is not there"),
        (droppos_run(filled(DropPos())), {"subnet": "teacher"}, "subnet teacher is not there"),
        (
            {"model": filled(DinoViT()).state_dict()},
            {"source": "mae"},
            "pos_embed is not its fixed sin-cos table",
        ),
        ({"model": filled(DropPos()).state_dict()}, {"source": "mae"}, "mask_pos_token"),
        ({"model": filled(Mae()).state_dict()}, {"source": "droppos"}, "decoder_pos_embed"),
        ({"model": MAE.state_dict()}, {"source": "dino"}, "the first position in pos_embed is zero"),
        ({"model": without(filled(Mae()).state_dict(), "norm.weight")}, {}, "norm.weight"),
        ({"model": without(filled(Mae()).state_dict(), "pos_embed")}, {}, "pos_embed"),
        (
            {"model": without(filled(Mae()).state_dict(), "blocks.1.attn.qkv.bias")},
            {},
            "missing blocks.1.attn.qkv.bias",
        ),
        ({"model": {**MAE.state_dict(), "head.weight": torch.ones(9, 192)}}, {}, "left over head.weight"),
        (
            {"model": {**MAE.state_dict(), "blocks.0.attn.rpe_k.lookup_table_weight": torch.ones(1, 64, 50)}},
            {"source": "mae"},
            "rpe_k",
        ),
        (
            {"model": {**MAE.state_dict(), "cls_token": MAE.norm.weight, "norm.weight": MAE.cls_token}},
            {},
            "cls_token",
        ),
        ({"model": {**MAE.state_dict(), "pos_embed": MAE.norm.weight}}, {"source": "mae"}, "pos_embed"),
        (
            droppos_run(filled(DropPos()), ema_state_dict=filled(DinoViT(depth=1)).state_dict()),
            {},
            "they differ in blocks.1.",
        ),
        (
            droppos_run(filled(DropPos())) | {"state_dict": {"a": torch.ones(1)}},
            {"source": "droppos"},
            "cls_token",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(content, options, says, tmp_path):
    assert says in refusal(saved(tmp_path, content), **options)


@pytest.mark.parametrize("layout", ["encoder", "droppos run"])
def test_a_file_that_is_cut_off_is_refused(layout, tmp_path):
    path = saved(tmp_path, LAYOUTS[layout][1])
    data = path.read_bytes()
    for share in (0.3, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match=str(path)):
            read_checkpoint(path)
