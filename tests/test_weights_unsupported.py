"""Networks that are none of ours: recognized by their files' names, and refused with the reason."""

import re

import pytest
import timm
import torch

from pretrain.errors import UserError
from pretrain.weights import read_checkpoint, source_names
from pretrain.weights.common import Match
from pretrain.weights.container import Container
from pretrain.weights.read import converted
from pretrain.weights.sources import SOURCES, unsupported

D = 8
FROM_TIMM = {
    "vit_medium_patch16_rope_reg1_gap_256": "timm's ViT with rotary positions",
    "eva02_tiny_patch14_224": "EVA",
    "beit_base_patch16_224": "BEiT",
    "vit_base_patch16_clip_224": "CLIP",
    "vit_base_patch16_siglip_224": "SigLIP",
    "samvit_base_patch16": "SAM",
    "swin_tiny_patch4_window7_224": "Swin",
    "convnext_tiny": "ConvNeXt",
    "resnet18": "ResNet",
    "deit_tiny_distilled_patch16_224": "DeiT",
}
ViT_KEYS = (
    "cls_token",
    "patch_embed.proj.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.mlp.fc1.weight",
    "norm.weight",
)
NAMES = {  # of files of other libraries, as far as they are told apart
    "BEiT": [
        ("blocks.0.attn.relative_position_bias_table", *ViT_KEYS, "blocks.0.gamma_1"),
        ("rel_pos_bias.relative_position_bias_table", *ViT_KEYS),
        (
            "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table",
            "beit.layernorm.weight",
        ),
    ],
    "CLIP": [
        ("visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight", "positional_embedding"),
        ("vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.self_attn.k_proj.weight"),
    ],
    "EVA": [("blocks.0.mlp.ffn_ln.weight", "rope.freqs_cos", *ViT_KEYS)],
    "SAM": [
        ("image_encoder.blocks.0.attn.rel_pos_h", "image_encoder.pos_embed", "mask_decoder.iou_token.weight")
    ],
    "Swin": [("layers.0.blocks.0.attn.relative_position_bias_table", "patch_embed.proj.weight")],
    "DeiT": [("deit.embeddings.distillation_token", "deit.embeddings.patch_embeddings.projection.weight")],
    "ConvNeXt": [
        ("stages.0.0.dwconv.weight", "downsample_layers.0.0.weight"),
        (
            "stages.0.layers.0.depthwise_conv.weight",
            "stages.1.downsample_layers.0.weight",
        ),  # DINOv3's in transformers
    ],
}


def names_of(architecture):
    with torch.device("meta"):
        return list(timm.create_model(architecture).state_dict())


def refusal(path):
    """What a user is told of a file."""
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    return str(error.value)


def refused_as(method, name="model.pth"):
    """One line that names the file, the method and the reason."""
    return rf"weights: .*{re.escape(name)}.*{method}.* which has .*none of ours.*"


@pytest.mark.parametrize("architecture", FROM_TIMM)
def test_timms(tmp_path, architecture):
    torch.save({name: torch.zeros(D) for name in names_of(architecture)}, tmp_path / "model.pth")
    assert re.fullmatch(refused_as(FROM_TIMM[architecture]), refusal(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    "method, names", [(method, names) for method, files in NAMES.items() for names in files]
)
@pytest.mark.parametrize("wrapper", [None, "model", "teacher"])
def test_others(tmp_path, method, names, wrapper):
    state = {f"{'backbone.' if wrapper == 'teacher' else ''}{name}": torch.zeros(D) for name in names}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "model.pth")
    assert re.fullmatch(refused_as(method), refusal(tmp_path / "model.pth"))


def test_no_plain_vit_is_refused(tmp_path):
    plain = (
        "vit_tiny_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "deit3_small_patch16_224",
    )
    for architecture in plain:
        torch.save({name: torch.zeros(D) for name in names_of(architecture)}, tmp_path / "model.pth")
        with pytest.raises(UserError) as error:
            read_checkpoint(tmp_path / "model.pth")  # these tensors are of no network
        assert "which has" not in str(error.value)


def test_the_table():
    assert len({refusal.name for refusal in unsupported.REFUSED}) == len(unsupported.REFUSED)
    assert not {refusal.name for refusal in unsupported.REFUSED} & set(source_names())
    assert all(isinstance(source.match.args[0].reason, str) for source in unsupported.SOURCES)
    assert {source.name for source in SOURCES} >= {
        "convnext",
        "posfield",
        "timm",
    } and Match.MARKED == max(Match)


@pytest.mark.parametrize("name", ["convnext", "rope_vit"])
def test_asked_for_by_name(tmp_path, name):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="none of ours"):
        read_checkpoint(tmp_path / "a.pth", source=name)


def test_unknown_files_are_told_what_they_hold(tmp_path):
    torch.save({f"tensor{i}": torch.zeros(1) for i in range(9)}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"it holds 'tensor0', .*'tensor5' and 3 more; source= takes posfield, .*timm"
    ):
        read_checkpoint(tmp_path / "a.pth")
    torch.save({"generator": {"conv.weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"it holds 'generator': \{conv\.weight, \.\.\.\}, 'epoch'; source="):
        read_checkpoint(tmp_path / "b.pth")
    with pytest.raises(UserError, match="source 'dino9' is none of posfield"):
        read_checkpoint(tmp_path / "b.pth", source="dino9")


def layouts():
    """State dicts of several layouts, whole and with tensors of the wrong number of dimensions."""
    timm_names, torch_names = names_of("vit_tiny_patch16_224"), ("conv1.weight", "fc.bias")
    huggingface = (
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.attention.attention.query.weight",
    )
    dinov3 = tuple(n for n in timm_names if n != "pos_embed") + (
        "mask_token",
        "storage_tokens",
        "rope_embed.periods",
    )
    dinov3 += ("blocks.0.ls1.gamma", "blocks.0.attn.qkv.bias_mask", "blocks.0.mlp.w1.weight")
    rotary = (*names_of("vit_small_plus_patch16_dinov3_qkvb"), "blocks.0.mlp.w12.weight")
    huggingface_dinov3 = (
        "embeddings.patch_embeddings.weight",
        "embeddings.cls_token",
        "embeddings.mask_token",
    )
    huggingface_dinov3 += (
        "embeddings.register_tokens",
        "norm.weight",
        "norm.bias",
        "layer.0.layer_scale1.lambda1",
    )
    huggingface_dinov3 += tuple(
        f"layer.0.attention.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")
    )
    loca = {"ToTokenSequence_0": {"embedding": {"kernel": 0}}, "encoderblock_0": {}}
    for shape in ((), (0,), (D,), (1, D), (1, 1, D), (1, D, D, D)):
        for names in (
            timm_names,
            (*timm_names, "mask_token", "register_tokens", "reg_token"),
            torch_names,
            huggingface,
            dinov3,
            rotary,
            huggingface_dinov3,
        ):
            state = {name: torch.zeros(shape) for name in names}
            yield state
            yield {"model": state, "epoch": 3}
            yield {
                "teacher": {f"backbone.{name}": value for name, value in state.items()},
                "student": {"module.a": torch.zeros(shape)},
            }
            yield {
                "teacher": {f"backbone.{name}": v for name, v in state.items()}
                | {"dino_head.a": torch.zeros(shape)}
            }
        yield {
            "teacher_weights": {**loca, "encoder_norm": {"scale": torch.zeros(shape)}},
            "student_weights": None,
        }
    yield {"epoch": 3, "args": {"a": [1]}}


@pytest.mark.parametrize("name", [None, *(source.name for source in SOURCES)])
def test_any_source_on_any_file(tmp_path, name):
    """A mixed-up file is an error of the user's, whatever it is read as."""
    for tree in layouts():
        file = Container(tmp_path / "mixed.pth", tree)
        with pytest.raises(UserError, match=r"mixed\.pth"):
            converted(file, name)
            pytest.fail(f"{name} read {list(tree)[:3]}")
