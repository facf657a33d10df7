"""DINOv3's files of all layouts, made by its layouts: features equal transformers' and timm's of the same weights."""

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from backbone_fixture import sharp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import format_utils
from transformers import DINOv3ViTBackbone, DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils import logging

from det_plugin.protocol import PROTOCOLS
from pretrain.backbones.vit import SIZES
from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.jobs.compare import find_weights, prepare
from pretrain.jobs.compare_config import load_comparison
from pretrain.registry import BACKBONES
from pretrain.train import metadata
from pretrain.views.pixels import MEAN, STD
from pretrain.weights import check_fit, license_of, origin_of, read_checkpoint, save_backbone
from pretrain.weights.container import Container
from pretrain.weights.read import _check_flags, converted

LVD, SAT = "dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
NAME = "vit_small_plus_patch16_reg4"
MODERN = Path(__file__).parents[1] / "configs" / "compare" / "modern_vits16.yaml"
SAT_PIXELS = ([0.430, 0.411, 0.296], [0.213, 0.156, 0.143])
SMALL = dict(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, num_register_tokens=4)
GATED = dict(use_gated_mlp=True, hidden_act="silu", intermediate_size=1536)
UNBIASED = dict(query_bias=False, value_bias=False)
LAYER = {  # DINOv3's names of a block, and transformers'
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
GATED_LAYER = {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}


def model_of(seed=0, cls=DINOv3ViTModel, **config):
    torch.manual_seed(seed)
    return sharp(cls(DINOv3ViTConfig(**{**SMALL, **config})))


def image(*size, seed=3):
    return torch.randn(2, 3, *(size or (48, 80)), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def theirs(model, x):
    return model(x).last_hidden_state


@torch.no_grad()
def features(path, x, **options):
    return torch.cat([t if t.ndim == 3 else t[:, None] for t in build_backbone(path, **options).eval()(x)], 1)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def published(model, masked="training"):
    """The file of the same weights. ``masked``: ``training`` masks the keys' bias, which is any; ``released`` all, which are
    zero; none: the network has no bias."""
    state, own = {k.removeprefix("model."): v for k, v in model.state_dict().items()}, model.config
    head_dim = own.hidden_size // own.num_attention_heads
    file = {
        "cls_token": state["embeddings.cls_token"],
        "storage_tokens": state["embeddings.register_tokens"],
        "mask_token": state["embeddings.mask_token"][0],
        "rope_embed.periods": (100 ** torch.arange(0, 1, 4 / head_dim)).bfloat16(),
    }
    file |= {f"norm.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        file[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.{kind}"]
    for i in range(own.num_hidden_layers):
        here, there = f"blocks.{i}.", f"layer.{i}."
        names = {k: v for k, v in LAYER.items() if not (own.use_gated_mlp and "mlp" in k)}
        for mine, name in (names | (GATED_LAYER if own.use_gated_mlp else {})).items():
            file |= {f"{here}{mine}.{kind}": state[f"{there}{name}.{kind}"] for kind in ("weight", "bias")}
        for k in (1, 2):
            file[f"{here}ls{k}.gamma"] = state[f"{there}layer_scale{k}.lambda1"]
        weights = [state[f"{there}attention.{letter}_proj.weight"] for letter in "qkv"]
        file[f"{here}attn.qkv.weight"] = torch.cat(weights)
        if masked:
            q, v = (state[f"{there}attention.{letter}_proj.bias"] for letter in "qv")
            mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(len(q))
            bias = torch.cat([q, torch.randn(len(q)), v])
            file[f"{here}attn.qkv.bias"] = bias if masked == "training" else bias * 0
            file[f"{here}attn.qkv.bias_mask"] = mask if masked == "training" else mask * 0
    return file


def saved(folder, content, name=LVD):
    torch.save(content, folder / name)
    return folder / name


# --- its own files


@pytest.mark.parametrize("config", [{}, GATED])
@pytest.mark.parametrize("size", [(48, 80), (224, 224)])
def test_features_equal_transformers(tmp_path, config, size):
    model, x = model_of(**config), image(*size)
    path = saved(tmp_path, published(model))
    assert_equal(features(path, x), theirs(model, x))
    found = read_checkpoint(path)
    assert found.backbone == ("vit_small_plus_patch16_reg4" if config else "vit_small_patch16_reg4")
    assert found.provenance == {"source": "dinov3", "method": "DINOv3", "license": "DINOv3 License"}
    assert found.model_kwargs["qkv_bias"] == "no_key" and found.model_kwargs["ln_eps"] == 1e-5
    assert origin_of(path)["method"] == "DINOv3"


def test_its_positions_and_its_bias_count(tmp_path):
    """What the tests here would not see if it were small: features without rotation, and with the keys' bias."""
    model, x = model_of(), image()
    vit = build_backbone(saved(tmp_path, published(model))).eval()
    expected = theirs(model, x)[:, 5:]
    with torch.no_grad():
        tokens, _ = vit.embed(x)
        for block in vit.blocks:
            tokens = block(tokens, geometry=None)
        assert (vit.norm(tokens)[:, 5:] - expected).abs().max() > 0.1
        for block in vit.blocks:
            block.attn.qkv.bias_mask.fill_(1.0)
            block.attn.qkv.bias[384:768] = 1.0
        assert (vit(x).patches - expected).abs().max() > 0.1


def test_published_biases_are_zero_and_masked(tmp_path):
    model, x = model_of(), image()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "v_proj.bias")):
                parameter.zero_()
    file = published(model, "released")
    file["blocks.0.attn.qkv.bias"] = torch.randn(3 * 384)  # its mask is zero
    path = saved(tmp_path, {key: value.bfloat16() if "mask" in key else value for key, value in file.items()})
    assert_equal(features(path, x), theirs(model, x))


def test_heads_are_those_of_the_periods(tmp_path):
    """As the 7B: heads 128 wide, no bias, and norms of local crops' [CLS]."""
    model, x = model_of(**GATED, **UNBIASED, num_attention_heads=3), image()
    own = {f"local_cls_norm.{kind}": torch.randn(384) for kind in ("weight", "bias")}
    path = saved(tmp_path, published(model, None) | own)
    assert_equal(features(path, x), theirs(model, x))
    vit = build_backbone(path)
    assert vit.model_kwargs["num_heads"] == 3 and vit.model_kwargs["qkv_bias"] == "none"
    assert torch.equal(vit.local_cls_norm.weight, own["local_cls_norm.weight"])


def test_a_norm_of_the_special_tokens(tmp_path):
    model, x = model_of(), image()
    own = {"cls_norm.weight": torch.randn(384), "cls_norm.bias": torch.randn(384)}
    found = features(saved(tmp_path, published(model) | own), x)
    norm, model.norm = model.norm, torch.nn.Identity()
    tokens = theirs(model, x)
    special = torch.nn.functional.layer_norm(tokens[:, :5], (384,), *own.values(), eps=1e-5)
    assert_equal(found, torch.cat([special, norm(tokens[:, 5:])], 1).detach())


def test_without_a_mask_every_bias_counts(tmp_path):
    """``mask_k_bias: false`` of its training."""
    model, x = model_of(key_bias=True), image()
    state = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    file = {k: v for k, v in published(model).items() if not k.endswith("bias_mask")}
    for i in range(2):
        biases = [state[f"layer.{i}.attention.{letter}_proj.bias"] for letter in "qkv"]
        file[f"blocks.{i}.attn.qkv.bias"] = torch.cat(biases)
    path = saved(tmp_path, file)
    assert_equal(features(path, x), theirs(model, x))
    assert read_checkpoint(path).model_kwargs["qkv_bias"] == "all"


def test_its_mask_token_is_for_pre_training(tmp_path):
    file = published(model_of())
    path = saved(tmp_path, file)
    vit = build_backbone(path, mask_tokens=True)
    assert torch.equal(vit.mask_token, file["mask_token"]) and vit.mask_token.shape == (1, 384)
    assert "mask_token" not in build_backbone(path).state_dict()


def test_ours_of_it(tmp_path):
    vit = build_backbone(saved(tmp_path, published(model_of(**GATED)))).eval()
    path = save_backbone(
        tmp_path / "ours.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs
    )
    again = build_backbone(path).eval()
    assert again.model_kwargs == vit.model_kwargs
    assert torch.equal(again(image()).patches, vit(image()).patches)


def test_a_comparison_reads_it(tmp_path):
    """The entry of ``modern_vits16``, which names no source, and a file of the released size."""
    comparison = load_comparison(MODERN, detections=PROTOCOLS)
    entry = next(e for e in comparison.entries if e.method == "DINOv3")
    model = model_of(num_hidden_layers=12)
    saved(tmp_path, published(model, masked="released"), entry.file)
    comparison = comparison.model_copy(update={"weights": str(tmp_path)})
    weights = find_weights(comparison, entry, tmp_path)
    prepare(entry, weights)
    assert weights.is_ready and origin_of(weights.file)["method"] == "DINOv3"
    assert license_of(read_checkpoint(weights.file).provenance) == "DINOv3 License"
    for layer in model.model.layer:
        for part in "qv":
            torch.nn.init.zeros_(getattr(layer.attention, f"{part}_proj").bias)
    assert_equal(features(weights.file, image()), theirs(model, image()))


def test_its_license_goes_on(tmp_path):
    path, own = saved(tmp_path, published(model_of(**GATED))), {"license": "DINOv3 License"}
    start = metadata(str(path))
    assert (start["method"], start["license"]) == ("DINOv3", "DINOv3 License")
    vit = build_backbone(path)
    trained = tmp_path / "trained.safetensors"
    told = {"method": "intertwined", "started_from": start}
    save_backbone(trained, vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs, provenance=told)
    assert metadata(str(trained))["license"] == license_of(own) == "DINOv3 License"
    assert license_of({"started_from": {"license": 3}}) is None


@pytest.mark.parametrize("form", ["evaluation", "distributed", "without registers"])
def test_training(tmp_path, form):
    """``teacher_checkpoint.pth`` of its evaluations, and a distributed checkpoint as one file."""
    bare = {"num_register_tokens": 0} if form == "without registers" else {}
    models = {name: model_of(seed, **bare) for seed, name in enumerate(("teacher", "student"))}
    heads = {f"{head}.mlp.0.weight": torch.randn(4, 384) for head in ("dino_head", "ibot_head")}
    networks = {
        name: {f"backbone.{key}": v for key, v in published(m).items() if v.numel()} | heads
        for name, m in models.items()
    }
    path = saved(tmp_path, {"teacher": networks["teacher"]}, "teacher_checkpoint.pth")
    if form == "distributed":
        flat = {f"{name}.{key}": value for name, state in networks.items() for key, value in state.items()}
        tree = {
            "iteration": 9,
            "model": {**flat, "dino_loss.center": torch.zeros(1)},
            "optimizer": {"lr": 1.0},
        }
        torch.distributed.checkpoint.save(tree, checkpoint_id=tmp_path / "99", no_dist=True)
        with pytest.raises(
            UserError, match="a distributed checkpoint of torch's; make one file of it: python -m"
        ):
            read_checkpoint(tmp_path / "99")
        format_utils.dcp_to_torch_save(tmp_path / "99", path)
    for name in ("teacher", "student") if form == "distributed" else ("teacher",):
        assert_equal(features(path, image(), subnet=name), theirs(models[name], image()))
        told = read_checkpoint(path, subnet=name).provenance
        assert (told["method"], told["subnet"]) == ("DINOv3", name)
    if form == "evaluation":
        with pytest.raises(UserError, match="no backbone of a student"):
            read_checkpoint(path, subnet="student")


def sized(name):
    """The names and shapes of a published file, of no memory."""
    own = SIZES[name]
    width, depth = own["embed_dim"], own["depth"]
    hidden = round(width * own.get("mlp_ratio", 4))
    shapes = {"cls_token": (1, 1, width), "storage_tokens": (1, 4, width), "mask_token": (1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    gates = {"mlp.w1": (hidden, width), "mlp.w2": (hidden, width), "mlp.w3": (width, hidden)}
    layers |= gates if "swiglu" in own else {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    file = {"rope_embed.periods": (100 ** torch.arange(0, 1, 4 * own["num_heads"] / width)).bfloat16()}
    for i in range(depth):
        for key, shape in layers.items():
            shapes |= {f"blocks.{i}.{key}.weight": shape, f"blocks.{i}.{key}.bias": shape[:1]}
        for k in (1, 2):
            shapes |= {f"blocks.{i}.norm{k}.{kind}": (width,) for kind in ("weight", "bias")}
            shapes[f"blocks.{i}.ls{k}.gamma"] = (width,)
        bias = shapes.pop(f"blocks.{i}.attn.qkv.bias")
        if name != "7b":
            file |= {f"blocks.{i}.attn.qkv.{kind}": torch.zeros(bias) for kind in ("bias", "bias_mask")}
    if name == "7b":
        shapes |= {f"local_cls_norm.{kind}": (width,) for kind in ("weight", "bias")}
    return file | {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", ["small", "small_plus", "base", "large", "large_plus", "huge_plus", "7b"])
def test_every_size(tmp_path, name):
    file = Container(tmp_path / "dinov3_pretrain_lvd1689m.pth", sized(name))
    found = converted(file)
    assert found.backbone == f"vit_{name}_patch16_reg4"
    own = {key: found.model_kwargs.get(key) for key in SIZES[name]}
    assert own == SIZES[name]
    with torch.device("meta"):
        vit = BACKBONES.get(found.backbone)(**{**found.model_kwargs, "mask_tokens": False})
    given = {key: value for key, value in found.state.items() if key != "mask_token"}
    check_fit("", vit.state_dict(), given)
    _check_flags(found, sum(value.numel() for value in given.values()))


def without(key):
    return lambda file: file.pop(key)


def changed(key, value):
    return lambda file: file.update({key: value(file[key])})


MASK = "blocks.1.attn.qkv.bias_mask"


@pytest.mark.parametrize(
    "edit, named",
    [
        *((without(key), f"no tensor {key}") for key in ("cls_token", "mask_token", "norm.bias", MASK)),
        (without("storage_tokens"), "no tensor reg_token"),
        (without("rope_embed.periods"), r"no tensor rope_embed\.periods"),
        (without("blocks.0.ls1.gamma"), r"no tensor blocks\.0\.ls1\.gamma"),
        (without("blocks.1.ls1.gamma"), r"missing blocks\.1\.ls1\.gamma"),
        (without("blocks.1.attn.qkv.bias"), r"no tensor blocks\.1\.attn\.qkv\.bias"),
        (without("blocks.1.mlp.w2.bias"), r"no tensor blocks\.1\.mlp\.w2\.bias"),
        (without("blocks.1.mlp.w3.bias"), r"missing blocks\.1\.mlp\.fc2\.bias"),
        (lambda f: f.update(surprise=torch.zeros(1)), "left over surprise"),
        (lambda f: f.update(pos_embed=torch.zeros(1, 10, 384)), "left over pos_embed"),
        (lambda f: f.update({"local_cls_norm.bias": torch.zeros(384)}), r"left over local_cls_norm\.bias"),
        (changed("rope_embed.periods", lambda p: p * 1.01), "periods are others"),
        (changed("rope_embed.periods", lambda p: 10_000 ** (torch.arange(16) / 16)), "from 1 to 5623.4"),
        (changed("rope_embed.periods", lambda p: p[:8]), "periods are others"),
        (changed("rope_embed.periods", lambda p: p[None]), r"periods is \(1, 16\)"),
        (changed("rope_embed.periods", lambda p: p * float("nan")), "periods are others"),
        (changed("rope_embed.periods", lambda p: 100 ** (torch.arange(20) / 20)), "heads of 80 channels"),
        (changed(MASK, torch.ones_like), r"blocks\.1\.attn\.qkv\.bias_mask is neither 0 nor 0 for the keys"),
        (changed(MASK, lambda m: m * float("nan")), "bias_mask is neither"),
        (changed(MASK, lambda m: m / 2), "bias_mask is neither"),
        (changed(MASK, lambda m: m[:-3]), r"bias_mask is \(1149,\)"),
        (changed("blocks.1.attn.qkv.bias", lambda b: b / 0), r"attn\.qkv\.bias holds NaN"),
        (changed("blocks.1.mlp.w1.weight", lambda w: w[:-1]), "of several shapes"),
        (changed("blocks.1.norm1.weight", lambda w: w[:-1]), r"blocks\.1\.norm1\.weight is \(383,\)"),
        (changed("storage_tokens", lambda t: t[0]), "reg_token is"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, edit, named):
    file = published(model_of(**GATED))
    edit(file)
    path = saved(tmp_path, file)
    with pytest.raises(UserError, match=named) as error:
        build_backbone(path)
    assert "\n" not in str(error.value) and LVD in str(error.value)


# --- pixels of satellite images


def seen(pixels, mean=MEAN, std=STD):
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("name, source", [(SAT, None), ("model.pth", "dinov3_sat")])
def test_satellite_images(tmp_path, name, source):
    model, pixels = model_of(), torch.rand(2, 3, 48, 80)
    path = saved(tmp_path, published(model), name)
    expected = theirs(model, seen(pixels, *SAT_PIXELS))
    torch.testing.assert_close(features(path, seen(pixels), source=source), expected, rtol=0, atol=2e-5)
    told = read_checkpoint(path, source).provenance
    assert (told["source"], told["method"]) == ("dinov3_sat", "DINOv3-SAT")
    assert told["pixel_mean_before"] == SAT_PIXELS[0] and told["license"] == "DINOv3 License"


def test_a_vit_l_without_its_name_is_known_by_its_norm(tmp_path):
    model = model_of(hidden_size=1024, num_attention_heads=16, num_hidden_layers=1, intermediate_size=64)
    own = {f"local_cls_norm.{kind}": torch.ones(1024) for kind in ("weight", "bias")}
    assert (
        read_checkpoint(saved(tmp_path, published(model) | own, "a.pth")).provenance["source"] == "dinov3_sat"
    )
    assert read_checkpoint(saved(tmp_path, published(model), "b.pth")).provenance["source"] == "dinov3"


def test_others_without_their_name_are_told(tmp_path):
    own = {f"local_cls_norm.{kind}": torch.ones(384) for kind in ("weight", "bias")}
    file = published(model_of()) | own
    with pytest.warns(
        UserWarning, match="read with ImageNet's pixels; for SAT-493M's give source=dinov3_sat"
    ):
        read_checkpoint(saved(tmp_path, file, "a.pth"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_checkpoint(saved(tmp_path, file, LVD))
        read_checkpoint(saved(tmp_path, published(model_of()), "b.pth"))


# --- Hugging Face's


def hub(folder, model, **options):
    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {},
        GATED,
        {**GATED, **UNBIASED, "num_attention_heads": 3},
        {"key_bias": True},
        {"hidden_act": "gelu_pytorch_tanh", "num_register_tokens": 0},
    ],
)
def test_folders(tmp_path, config):
    model, x = model_of(**config, layer_norm_eps=1e-2), image()
    folder = hub(tmp_path / "hub", model)
    expected = theirs(model, x)
    for path in (folder, folder / "model.safetensors"):
        assert_equal(features(path, x), expected)
    found = read_checkpoint(folder)
    assert found.provenance == {"source": "huggingface", "method": "DINOv3", "license": "DINOv3 License"}
    bias = "all" if "key_bias" in config else "none" if "query_bias" in config else "no_key"
    assert found.model_kwargs["qkv_bias"] == bias
    vit = build_backbone(folder, mask_tokens=True)
    assert torch.equal(vit.mask_token, model.embeddings.mask_token[0])


@pytest.mark.parametrize("config", [{}, GATED])
def test_names_in_memory_and_parts(tmp_path, config):
    model, x = model_of(**config), image()
    expected = theirs(model, x)
    torch.save(model.state_dict(), tmp_path / "a.pth")  # model.layer.N
    assert "model.layer.0.norm1.weight" in model.state_dict()
    assert_equal(features(tmp_path / "a.pth", x), expected)
    parts = hub(tmp_path / "parts", model, max_shard_size="5MB")
    assert len(list(parts.glob("model-*.safetensors"))) > 1
    assert_equal(features(parts, x), expected)


def test_its_backbone_class(tmp_path):
    model, x = model_of(cls=DINOv3ViTBackbone, apply_layernorm=True), image()
    with torch.no_grad():
        expected = model(x).feature_maps[-1]
        found = build_backbone(hub(tmp_path / "hub", model)).eval().feature_map(x)
    assert_equal(found, expected)


@pytest.mark.parametrize("told", [dict(rope_theta=100), dict(pos_embed_jitter=2.0, pos_embed_shift=0.5)])
def test_what_changes_nothing_at_inference(tmp_path, told):
    model = model_of()
    folder = hub(tmp_path / "hub", model)
    edit_config(folder, **told)
    assert_equal(features(folder, image()), theirs(model, image()))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(rope_theta=10_000), "rope_theta 10000; ours are of 100"),
        (dict(rope_theta=None), "rope_theta None"),
        (dict(use_gated_mlp=True, hidden_act="silu"), "activation 'silu'"),
        (dict(use_gated_mlp=True), "has no gated MLPs .SwiGLU., its config.json says use_gated_mlp True"),
        (dict(hidden_act="silu"), "activation 'silu'"),
        (dict(query_bias=False), "has such tensors, its config.json says query_bias False"),
        (dict(key_bias=True), "has no such tensors, its config.json says key_bias True"),
        (dict(mlp_bias=False), "mlp_bias False"),
        (dict(proj_bias=False), "proj_bias False"),
        (dict(model_type="dinov2"), "tensors of dinov3_vit, its config.json says dinov2"),
        (dict(model_type="dinov3_convnext"), "type 'dinov3_convnext'"),
        (dict(patch_size=14), "config.json says 14"),
        (dict(hidden_size=768), "hidden_size 384, its config.json says 768"),
        (dict(intermediate_size=768), "intermediate_size 1536, its config.json says 768"),
        (dict(num_hidden_layers=3), "num_hidden_layers 2, its config.json says 3"),
        (dict(num_register_tokens=5), "num_register_tokens 4, its config.json says 5"),
        (dict(layer_norm_eps="small"), "ln_eps of 'small'"),
        (dict(num_attention_heads=5), "5 heads"),
        (dict(num_attention_heads=64), "multiple of 4"),
    ],
)
def test_configs_that_contradict_are_refused(tmp_path, changes, named):
    folder = hub(tmp_path / "hub", model_of())
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=named):
        build_backbone(folder)


@pytest.mark.parametrize(
    "edit, named",
    [
        *((without(f"embeddings.{key}"), f"no tensor {key}") for key in ("cls_token", "mask_token")),
        (without("embeddings.register_tokens"), "no tensor reg_token"),
        (without("norm.weight"), r"no tensor norm\.weight"),
        (without("layer.1.attention.k_proj.weight"), r"no tensor blocks\.1\.attn\.key\.weight"),
        (without("layer.1.attention.q_proj.bias"), r"no tensor blocks\.1\.attn\.query\.bias"),
        (without("layer.1.mlp.gate_proj.weight"), r"no tensor blocks\.1\.mlp\.gate_proj\.weight"),
        (without("layer.1.layer_scale2.lambda1"), r"missing blocks\.1\.ls2\.gamma"),
        (changed("layer.1.mlp.up_proj.bias", lambda b: b[:-1]), "of several shapes"),
        (
            lambda f: f.update({"layer.1.attention.k_proj.bias": torch.zeros(384)}),
            r"left over blocks\.1\.attn\.key\.bias",
        ),
        (lambda f: f.update(surprise=torch.zeros(1)), "left over surprise"),
    ],
)
def test_damaged_folders_are_refused_by_name(tmp_path, edit, named):
    folder = hub(tmp_path / "hub", model_of(**GATED))
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")
    for _ in range(2):
        with pytest.raises(UserError, match=named):
            build_backbone(folder)
        (folder / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("told", [True, False])
def test_a_folder_of_satellite_images(tmp_path, told):
    """By its preprocessor_config.json, or without it by its name."""
    model, pixels = model_of(), torch.rand(2, 3, 48, 80)
    folder = hub(tmp_path / ("hub" if told else "dinov3-vitl16-pretrain-sat493m"), model)
    if told:
        mean, std = SAT_PIXELS
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    expected = theirs(model, seen(pixels, *SAT_PIXELS))
    torch.testing.assert_close(features(folder, seen(pixels)), expected, rtol=0, atol=2e-5)
    assert read_checkpoint(folder).provenance["method"] == "DINOv3-SAT"


# --- timm's


def timms(name="vit_small_patch16_dinov3"):
    torch.manual_seed(0)
    return sharp(timm.create_model(name, num_classes=0, depth=2))


@torch.no_grad()
def of_timm(model, x):
    return model.forward_features(x)


TIMM = [f"vit_small{plus}_patch16_dinov3{bias}" for plus in ("", "_plus") for bias in ("", "_qkvb")]


@pytest.mark.parametrize("name", TIMM)
def test_timm(tmp_path, name):
    model, x = timms(name), image()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert_equal(features(tmp_path / "a.pth", x), of_timm(model, x))
    found = read_checkpoint(tmp_path / "a.pth")
    assert found.model_kwargs["qkv_bias"] == ("no_key" if "qkvb" in name else "none")
    assert found.provenance == {"source": "timm", "method": "a", "license": "DINOv3 License"}


def timms_folder(folder, model, architecture="vit_small_patch16_dinov3", tag="sat493m", **told):
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    mean, std = SAT_PIXELS if tag == "sat493m" else (list(MEAN), list(STD))
    described = {
        "architecture": architecture,
        "pretrained_cfg": {"tag": tag, "mean": mean, "std": std},
        **told,
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_a_folder_of_timms_hub(tmp_path):
    model, pixels = timms(), torch.rand(2, 3, 48, 80)
    folder = timms_folder(tmp_path / "hub", model)
    expected = of_timm(model, seen(pixels, *SAT_PIXELS))
    torch.testing.assert_close(features(folder, seen(pixels)), expected, rtol=0, atol=2e-5)
    told = read_checkpoint(folder).provenance
    assert (told["method"], told["license"]) == ("vit_small_patch16_dinov3.sat493m", "DINOv3 License")
    other = read_checkpoint(timms_folder(tmp_path / "eupe", model, tag="eupe_lvd1689m")).provenance
    assert "license" not in other


@pytest.mark.parametrize(
    "told, named",
    [
        (dict(architecture="vit_small_patch16_lingbot"), "is no vit_small_patch16_lingbot by its tensors"),
        (dict(model_args={"rope_temperature": 10_000}), "of no network of ours: rope_temperature"),
    ],
)
def test_other_networks_of_timm_are_refused(tmp_path, told, named):
    with pytest.raises(UserError, match=named):
        build_backbone(timms_folder(tmp_path / "hub", timms(), **told))


@pytest.mark.parametrize(
    "edit, named",
    [
        (without("norm.weight"), r"no tensor norm\.weight"),
        (without("blocks.1.attn.v_bias"), r"no tensor blocks\.1\.attn\.value\.bias"),
        (without("blocks.1.attn.q_bias"), r"no tensor blocks\.1\.attn\.query\.bias"),
        (without("blocks.1.mlp.fc1_g.weight"), r"no tensor blocks\.1\.mlp\.fc1_g\.weight"),
        (without("blocks.1.gamma_2"), r"missing blocks\.1\.ls2\.gamma"),
        (lambda f: f.update(surprise=torch.zeros(1)), "left over surprise"),
    ],
)
def test_damaged_files_of_timm_are_refused_by_name(tmp_path, edit, named):
    state = timms("vit_small_plus_patch16_dinov3_qkvb").state_dict()
    edit(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=named):
        build_backbone(tmp_path / "a.pth")


def test_a_position_field_cannot_be_made_of_it(tmp_path):
    from pretrain.weights.adapt import with_position_field

    found = read_checkpoint(saved(tmp_path, published(model_of())))
    with pytest.raises(UserError, match="has rotary positions; set positions.encoding=rotary"):
        with_position_field(found, 50)
