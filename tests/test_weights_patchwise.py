"""SelfPatch and FLSL: files of their layouts, against the restated networks without a [CLS] token."""

from functools import cache

import pytest
import torch
from reference_vit import (
    DinoHead,
    DinoViT,
    FlslViT,
    SelfPatchViT,
    difference,
    filled,
    full_checkpoint,
    mlp,
    saved,
    wrapped,
)
from torch import nn

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.weights import backbone_name, read_checkpoint

SIZES = ((224, 224), (160, 272))


class ClassAttention(nn.Module):
    """Stands for SelfPatch's ``ca_head``: a [CLS] token, blocks and a norm of its own."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 192))
        self.cls_blocks = nn.ModuleList([mlp(192, 192)])
        self.norm = nn.LayerNorm(192)


def heads(source):
    if source == "selfpatch":
        return {"ca_head": ClassAttention(), "c_head": DinoHead(), "p_head": DinoHead()}
    return {"head": DinoHead(), **({"norm": nn.LayerNorm(192)} if source == "flsl on modes" else {})}


@cache
def full(source):
    """A full checkpoint, its student's and its teacher's backbone."""
    student, teacher = (SelfPatchViT() if source == "selfpatch" else FlslViT(source == "flsl") for _ in "st")
    wrappers = [wrapped(backbone, **heads(source)) for backbone in (student, teacher)]
    filled(teacher, seed=1)
    loss = "dino_loss" if source == "selfpatch" else "flsl_loss"
    return full_checkpoint(*wrappers, loss), student, teacher


@pytest.mark.parametrize("source", ["selfpatch", "flsl", "flsl without a norm", "flsl on modes"])
def test_full_checkpoints(source, tmp_path):
    content, student, teacher = full(source)
    path = saved(tmp_path, content)
    found = read_checkpoint(path)
    method = "SelfPatch" if source == "selfpatch" else "FLSL"
    assert dict(found.provenance) == {
        "source": method.lower(),
        "method": method,
        "subnet": "teacher",
        "epoch": 8,
    }
    assert (found.model_kwargs["has_cls"], found.model_kwargs["final_norm"]) == (False, source == "flsl")
    name = backbone_name(None, path)
    assert max(difference(teacher, build_backbone(name, path), size) for size in SIZES) < 1e-5
    assert (
        max(difference(student, build_backbone(name, path, subnet="student"), size) for size in SIZES) < 1e-5
    )


@pytest.mark.parametrize("source", ["selfpatch", "flsl"])
def test_a_teacher_or_a_backbone_alone(source, tmp_path):
    content, _, teacher = full(source)
    for state in (content["teacher"], teacher.state_dict()):
        path = saved(tmp_path, state)
        assert read_checkpoint(path).provenance["source"] == source
        assert difference(teacher, build_backbone("vit_tiny_patch16", path), SIZES[1]) < 1e-5


def test_learned_positions_of_patches_alone_are_no_proof_of_flsl(tmp_path):
    """Other networks leave [CLS] without a position, but use it."""
    state = {**full("flsl")[2].state_dict(), "pos_embed": torch.rand(1, 196, 192)}
    assert read_checkpoint(saved(tmp_path, state)).provenance["source"] == "timm"
    assert read_checkpoint(saved(tmp_path, state, "flsl_vits16.pth")).provenance["source"] == "flsl"


def dropped(source, key):
    content = full(source)[0]
    return {"teacher": {name: value for name, value in content["teacher"].items() if name != key}}


@pytest.mark.parametrize(
    "content, options, says",
    [
        (lambda: dropped("selfpatch", "backbone.pos_embed"), {}, "pos_embed"),
        (lambda: dropped("selfpatch", "backbone.blocks.1.norm2.weight"), {}, "missing blocks.1.norm2.weight"),
        (lambda: dropped("flsl", "backbone.norm.weight") | {"flsl_loss": {}}, {}, "norm.bias"),
        (lambda: full("selfpatch")[0], {"source": "dino"}, "ca_head."),
        (lambda: full("selfpatch")[0], {"source": "flsl"}, "ca_head."),
        (lambda: full("flsl")[0], {"source": "dino"}, "flsl_loss"),
        (lambda: full("flsl")[0], {"source": "selfpatch"}, "flsl_loss"),
        (lambda: full("flsl")[2].state_dict(), {"source": "dino"}, "pos_embed has 196 positions"),
        (lambda: full("flsl")[2].state_dict(), {"source": "selfpatch"}, "cls_token"),
        (lambda: filled(DinoViT()).state_dict(), {"source": "flsl"}, "pos_embed has 197 positions"),
        (
            lambda: {**full("selfpatch")[2].state_dict(), "blocks.1.attn.more": torch.ones(1)},
            {},
            "left over blocks.1.attn.more",
        ),
        (lambda: full("selfpatch")[0] | {"student": full("flsl")[0]["student"]}, {}, "left over head."),
        (
            lambda: full("flsl")[0] | {"student": full("flsl without a norm")[0]["student"]},
            {},
            "differ in norm.bias",
        ),
        (lambda: full("selfpatch")[2].state_dict(), {"subnet": "teacher"}, "subnet teacher is not there"),
        (
            lambda: {
                **(s := full("flsl")[2].state_dict()),
                "pos_embed": s["norm.bias"],
                "norm.bias": s["pos_embed"],
            },
            {"source": "flsl"},
            "pos_embed",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(content, options, says, tmp_path):
    path = saved(tmp_path, content())
    with pytest.raises(UserError) as error:
        build_backbone("vit_tiny_patch16", path, **options)
    assert says in str(error.value)
    assert str(path) in str(error.value)
