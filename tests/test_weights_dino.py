"""DINO, iBOT, Mugs, CrIBo, CrOC: files of their layouts, against the restated networks."""

import pickle
from functools import cache

import pytest
import torch
from public_fixture import refusal
from reference_vit import (
    DinoHead,
    DinoViT,
    IbotStudent,
    MugsViT,
    difference,
    filled,
    full_checkpoint,
    mlp,
    saved,
    wrapped,
)

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.weights import backbone_name, read_checkpoint

SIZES = ((224, 224), (160, 272))
QUEUES = {
    "centroids_queue_cpu": torch.rand(2, 6, 192),
    "cls_queue_cpu": torch.rand(2, 3, 192),
    "cpv_queue_cpu": torch.ones(3, dtype=torch.int),
}
MEMORY = {
    "student_mem": {"block.queue_q": torch.rand(4, 192)},
    "teacher_mem": None,
    "group-sup.": {"center": torch.zeros(1, 8)},
}


def mugs_heads(student):
    return {
        name: mlp(192, 64, *([16] if student else []), 32)
        for name in ("instance_head", "local_group_head", "group_head")
    }


@cache
def full(source):
    """A full checkpoint, its student's and its teacher's backbone."""
    scaled = {"layerscale": "ibot"} if source == "ibot_scaled" else {}
    kinds = {
        "ibot": (IbotStudent, DinoViT),
        "ibot_scaled": (IbotStudent, DinoViT),
        "mugs": (MugsViT, MugsViT),
    }
    student, teacher = (kind(**scaled) for kind in kinds.get(source, (DinoViT, DinoViT)))
    heads = (
        [mugs_heads(True), mugs_heads(False)]
        if source == "mugs"
        else [{"head": DinoHead(source in ("cribo", "croc"))} for _ in "st"]
    )
    wrappers = wrapped(student, **heads[0]), wrapped(teacher, **heads[1])
    filled(teacher, seed=1)
    loss = {
        "ibot": "ibot_loss",
        "ibot_scaled": "ibot_loss",
        "croc": "croc_loss",
        "mugs": "local-group-sup.",
    }.get(source, "dino_loss")
    entries = {"cribo": QUEUES, "mugs": MEMORY}.get(source, {})
    return full_checkpoint(*wrappers, loss, **entries), student, teacher


@pytest.mark.parametrize("source", ["dino", "ibot", "ibot_scaled", "mugs", "cribo", "croc"])
def test_full_checkpoints_give_the_teacher_or_the_student(source, tmp_path):
    content, student, teacher = full(source)
    path = saved(tmp_path, content)
    name = backbone_name(None, path)
    assert name == "vit_tiny_patch16"
    ours = build_backbone(name, path)
    assert max(difference(teacher, ours, size) for size in SIZES) < 1e-5
    assert difference(student, ours, SIZES[0]) > 0.1
    assert (
        max(difference(student, build_backbone(name, path, subnet="student"), size) for size in SIZES) < 1e-5
    )


@pytest.mark.parametrize(
    "source, method",
    [("dino", "DINO"), ("ibot", "iBOT"), ("mugs", "Mugs"), ("cribo", "CrIBo"), ("croc", "CrOC")],
)
def test_full_checkpoints_are_recognized_by_what_they_hold(source, method, tmp_path):
    found = read_checkpoint(saved(tmp_path, full(source)[0]))
    assert dict(found.provenance) == {"source": source, "method": method, "subnet": "teacher", "epoch": 8}
    assert found.model_kwargs["pos_interpolation"] == "dinov2"


def test_a_full_checkpoint_without_its_loss_is_dinos_where_nothing_speaks_against(tmp_path):
    teacher = full("dino")[0]["teacher"]
    assert read_checkpoint(saved(tmp_path, {"teacher": teacher})).provenance["source"] == "dino"
    with pytest.raises(UserError, match="no supported layout"):  # CrIBo's or CrOC's, nobody knows
        read_checkpoint(saved(tmp_path, {"teacher": full("croc")[0]["teacher"]}))
    assert (
        read_checkpoint(saved(tmp_path, {"teacher": full("croc")[0]["teacher"]}, "croc_800.pth")).provenance[
            "method"
        ]
        == "CrOC"
    )


@pytest.mark.parametrize(
    "name, wrapper, source",
    [
        ("dino_deitsmall16_pretrain.pth", None, "dino"),
        ("ibot_vits16_teacher.pth", "state_dict", "ibot"),
        ("vit_small_backbone_800ep.pth", "state_dict", "mugs"),
        ("backbone.pth", None, "timm"),
        ("paladino_vits16.pth", None, "timm"),
        (
            "checkpoint_teacher.pth",
            "state_dict",
            "ibot",
        ),  # what iBOT's published backbones of all sizes are called
        ("checkpoint_teacher.pth", None, "timm"),
    ],
)
def test_a_backbone_alone_is_known_by_the_files_name_only(name, wrapper, source, tmp_path):
    teacher = full("dino")[2]
    state = teacher.state_dict()
    path = saved(tmp_path, {wrapper: state} if wrapper else state, name)
    assert read_checkpoint(path).provenance["source"] == source
    for forced in ("dino", "ibot", "mugs", "cribo", "croc"):
        found = read_checkpoint(path, forced)
        assert (found.provenance["source"], found.model_kwargs["pos_interpolation"]) == (forced, "dinov2")
    ours = build_backbone("vit_tiny_patch16", path, source="dino")
    assert max(difference(teacher, ours, size) for size in SIZES) < 1e-5


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_a_wrapper_alone_is_nobodys(prefix, tmp_path):
    state = {prefix + key: value for key, value in full("dino")[2].state_dict().items()}
    path = saved(tmp_path, {"state_dict": state})
    assert "no supported layout" in refusal(path)
    assert read_checkpoint(path, "ibot").provenance["method"] == "iBOT"


def test_mugs_relation_blocks_tell_and_are_dropped(tmp_path):
    teacher = full("mugs")[2]
    path = saved(tmp_path, {"state_dict": teacher.state_dict()})
    assert read_checkpoint(path).provenance["method"] == "Mugs"
    assert max(difference(teacher, build_backbone("vit_tiny_patch16", path), size) for size in SIZES) < 1e-5


def test_ibots_students_mask_token(tmp_path):
    content, student, _ = full("ibot")
    path = saved(tmp_path, content)
    built = build_backbone("vit_tiny_patch16", path, subnet="student", mask_tokens=True)
    assert torch.equal(built.mask_token, student.masked_embed)
    alone = saved(tmp_path, {"state_dict": student.state_dict()}, "checkpoint_student.pth")
    assert read_checkpoint(alone).provenance["source"] == "ibot"
    assert difference(student, build_backbone("vit_tiny_patch16", alone), SIZES[1]) < 1e-5


def test_a_subnet_that_is_absent_is_named(tmp_path):
    content = full("dino")[0]
    path = saved(tmp_path, {key: value for key, value in content.items() if key != "student"})
    assert "subnet student is not there; the file holds only the teacher" in refusal(path, subnet="student")
    path = saved(tmp_path, content["teacher"], "dino.pth")
    assert "subnet student" in refusal(path, subnet="student", source="dino")


@pytest.mark.parametrize(
    "held, forced, says",
    [
        ("ibot", "dino", "ibot_loss is found in files of ibot"),
        ("croc", "cribo", "croc_loss is found in files of croc"),
        ("cribo", "croc", "centroids_queue_cpu is found in files of cribo"),
        ("mugs", "ibot", "student_mem is found in files of mugs"),
        ("dino", "mae", "no network under the names of its files"),
        ("dino", "leopart", "no network under the names of its files"),
        ("dino", "selfpatch", "left over head."),
    ],
)
def test_the_wrong_source_is_refused(held, forced, says, tmp_path):
    assert says in refusal(saved(tmp_path, full(held)[0]), source=forced)


def edited(source, subnet, change):
    """A full checkpoint with one network's tensors changed."""
    content = dict(full(source)[0])
    content[subnet] = dict(content[subnet])
    change(content[subnet])
    return content


def swap(first, second):
    def change(state):
        state[first], state[second] = state[second], state[first]

    return change


@pytest.mark.parametrize(
    "change, says",
    [
        (swap("backbone.blocks.0.mlp.fc1.weight", "backbone.blocks.0.mlp.fc2.weight"), "mlp.fc1.weight"),
        (swap("backbone.pos_embed", "backbone.norm.weight"), "pos_embed"),
        (swap("backbone.cls_token", "backbone.blocks.1.norm1.bias"), "cls_token"),
        (
            swap("backbone.patch_embed.proj.weight", "backbone.blocks.0.attn.qkv.weight"),
            "patch_embed.proj.weight",
        ),
        (lambda state: state.pop("backbone.blocks.1.attn.proj.bias"), "blocks.1.attn.proj.bias"),
        (lambda state: state.pop("backbone.norm.weight"), "norm.weight"),
        (lambda state: state.pop("backbone.pos_embed"), "pos_embed"),
        (lambda state: state.pop("backbone.cls_token"), "cls_token"),
        (lambda state: state.update({"backbone.blocks.7.norm1.weight": torch.ones(192)}), "blocks.2"),
        (lambda state: state.update({"backbone.blocks.1.attn.extra": torch.ones(3)}), "blocks.1.attn.extra"),
        (lambda state: state.update({"norm.weight": torch.ones(192)}), "norm.weight"),
        (lambda state: state.update({"backbone.reg_token": torch.ones(1, 4, 192)}), "reg_token"),
        (lambda state: state.update({"ca_head.cls_token": torch.ones(1, 1, 192)}), "ca_head."),
    ],
)
@pytest.mark.parametrize("alone", [True, False], ids=["teacher", "both"])
def test_damaged_teachers_are_refused_by_name(change, says, alone, tmp_path):
    content = edited("dino", "teacher", change)
    if alone:
        del content["student"]
    assert says in refusal(saved(tmp_path, content), source="dino")


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda state: state.update({"module.backbone.relation_blocks.0.norm1.bias": torch.ones(192)}),
            "relation_blocks.",
        ),
        (lambda state: state.update({"module.backbone.masked_embed": torch.ones(1, 192)}), "masked_embed"),
        (lambda state: state.pop("module.backbone.blocks.1.norm2.bias"), "blocks.1.norm2.bias"),
        (lambda state: state.update({"module.projector.weight": torch.ones(3)}), "projector.weight"),
        (lambda state: state.update({"module.backbone.pos_embed": torch.ones(1, 145, 192)}), "pos_embed"),
    ],
)
def test_students_of_another_network_are_refused_by_name(change, says, tmp_path):
    assert says in refusal(saved(tmp_path, edited("dino", "student", change)), source="dino")


@pytest.mark.parametrize("key", ["cls_token", "norm.weight", "blocks.0.attn.qkv.weight"])
def test_a_damaged_checkpoint_is_known_by_its_loss_so_that_the_tensor_is_named(key, tmp_path):
    content = edited("dino", "teacher", lambda state: state.pop("backbone." + key))
    assert f"read as dino: no tensor {key}" in refusal(saved(tmp_path, content))


ENTRIES = ("ibot_loss", "student_mem", "centroids_queue_cpu", "croc_loss", "flsl_loss")
TENSORS = (
    *(
        "masked_embed",
        "blocks.0.gamma_1",
        "relation_blocks.0.norm1.bias",
        "blocks.0.ls1.gamma",
        "register_tokens",
        "mask_token",
    ),
    *(
        "reg_token",
        "pos_mask_token",
        "projection_head.0.bias",
        "decoder_embed.bias",
        "mask_pos_token",
        "blocks.0.attn.rpe_k.x",
    ),
)
HEADS = ("head.last_layer_c.weight_g", "ca_head.norm.bias", "dino_head.mlp.0.bias")


@pytest.mark.parametrize("mark", [*ENTRIES, *TENSORS, *HEADS])
def test_what_other_methods_leave_is_not_taken_for_dinos(mark, tmp_path):
    content = edited("dino", "teacher", lambda state: None)
    if mark in ENTRIES:
        content[mark] = {}
    else:
        content["teacher"][mark if mark in HEADS else "backbone." + mark] = torch.ones(1, 192)
    said = refusal(saved(tmp_path, content), source="dino")
    assert " is found in files of " in said
    assert mark.startswith(said.split("read as dino: ")[1].split(" is found")[0])


def test_shuffled_flat_files_are_refused_by_name(tmp_path):
    state = dict(full("dino")[2].state_dict())
    swap("pos_embed", "blocks.1.mlp.fc1.bias")(state)
    assert "pos_embed" in refusal(saved(tmp_path, state, "dino.pth"), source="dino")
    other = filled(DinoViT(depth=3)).state_dict()
    mixed = {**full("dino")[2].state_dict(), "blocks.2.norm1.weight": other["blocks.2.norm1.weight"]}
    assert "missing blocks.2.norm1.bias" in refusal(saved(tmp_path, mixed, "dino.pth"))


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = saved(tmp_path, full("ibot")[0])
    data = path.read_bytes()
    for share in (0.1, 0.5, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        assert refusal(path).startswith("weights: ")


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_code_runs(tmp_path):
    trap = Trap(tmp_path / "sprung")
    path = saved(tmp_path, {**full("dino")[0], "args": trap})
    refusal(path)
    path.write_bytes(pickle.dumps({"teacher": trap}))
    refusal(path)
    assert not trap.path.exists()
