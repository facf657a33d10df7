"""MAE: its loss against the paper's formulas, what its encoder sees, its run and what that leaves."""

import math
import shutil
import warnings

import pytest
import torch
from photos import last, write_photos
from runs_fixture import ROOT, differences, lines_of, tensors_of, torchrun
from torch import nn

from det_plugin.features import FeatureOptions, detection_features, prepare
from pretrain.backbones.block import Block
from pretrain.backbones.vit import ViewGroup
from pretrain.build import build_backbone, build_for_fine_tuning
from pretrain.config import load_config, run_protocol
from pretrain.data.loader import build_dataset, build_loader
from pretrain.errors import UserError
from pretrain.losses.pixels import masked_pixel_loss, normalized, patchify
from pretrain.methods import find_method
from pretrain.methods.mae import MAE, initialize
from pretrain.results.schema import read_result
from pretrain.schedules import effective_epochs, scaled_lr
from pretrain.settings import flat
from pretrain.train import train
from pretrain.views.batch import Batch
from pretrain.views.boxes import Views
from pretrain.views.masks import draw_masks
from pretrain.weights import read_checkpoint

SIDE, PATCH, ENCODER, DECODER = 4, 16, 192, 32
TINY = [
    *("method=mae", "backbone.name=vit_tiny_patch16", "backbone.depth=2", "crops.global_px=64"),
    *("mae.decoder_width=32", "mae.decoder_depth=1", "mae.decoder_heads=4"),
    *("data.workers=0", "optim.batch_size=4", "optim.epochs=3", "optim.warmup_epochs=1", "run.device=cpu"),
    *("log.every=1", "log.checkpoint_every=100", "log.tensorboard=false"),
]


def tiny(*words):
    """:data:`TINY`, changed by some words."""
    return last([*TINY, *words])


def method_of(*words, dtype=torch.float64):
    """A small method, every weight of ordinary size."""
    torch.manual_seed(0)
    method = MAE(load_config(None, tiny(*words)))
    for parameter in learned(method):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return method.to(dtype)


def learned(method):
    return [p for p in method.parameters() if p.requires_grad]


def batch_of(method, n=3, dtype=torch.float64):
    """Crops of noise with the masks that the loader would draw."""
    crops = torch.randn(
        n, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1), dtype=dtype
    )
    boxes, flips = torch.tensor([0.0, 0, 1, 1]).expand(n, 1, 4), torch.zeros(n, 1, dtype=torch.bool)
    masks = draw_masks(n, 1, (SIDE, SIDE), method.settings.view_settings().masks, (0, 3, 0))
    return Batch(crops, crops[:0], Views(boxes, flips, boxes, 1), masks)


def masked_in(batch):
    """The masked patches of each image, rising."""
    return [row.nonzero().flatten().tolist() for row in batch.masks.content]


# --- the paper's formulas, one image, one patch, one head at a time ---------------------------------------


def sines(row, column, width):
    """Half of the channels for the column, half for the row: sines, then cosines, of place / 10000^(k /
    (width / 4))."""
    values = []
    for place in (column, row):
        angles = [place / 10000 ** (k / (width / 4)) for k in range(width // 4)]
        values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(values, dtype=torch.float32).double()  # the networks hold their tables in float32


def layer_norm(x, state, name):
    return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-6).sqrt() * state[f"{name}.weight"] + state[
        f"{name}.bias"
    ]


def linear(x, state, name):
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def transformer(tokens, state, depth, heads):
    """Pre-norm blocks on a list of vectors."""
    for i in range(depth):
        name, size = f"blocks.{i}", len(tokens[0]) // heads
        qkv = [
            linear(layer_norm(t, state, f"{name}.norm1"), state, f"{name}.attn.qkv").view(3, heads, size)
            for t in tokens
        ]
        mixed = []
        for q in qkv:
            of_heads = []
            for h in range(heads):
                weights = torch.stack([q[0, h] @ k[1, h] / size**0.5 for k in qkv]).softmax(0)
                of_heads.append(sum(w * v[2, h] for w, v in zip(weights, qkv)))
            mixed.append(linear(torch.cat(of_heads), state, f"{name}.attn.proj"))
        tokens = [t + m for t, m in zip(tokens, mixed)]
        hidden = [linear(layer_norm(t, state, f"{name}.norm2"), state, f"{name}.mlp.fc1") for t in tokens]
        hidden = [h * (1 + torch.erf(h / 2**0.5)) / 2 for h in hidden]
        tokens = [t + linear(h, state, f"{name}.mlp.fc2") for t, h in zip(tokens, hidden)]
    return tokens


def pixels_of(image, patch):
    """A patch's pixels in reading order, the three colors of each side by side."""
    row, column = divmod(patch, SIDE)
    square = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    return torch.stack(
        [square[color, y, x] for y in range(PATCH) for x in range(PATCH) for color in range(3)]
    )


def restated_loss(encoder, decoder, images, masked):
    """MAE's loss (section 3): the mean over masked patches of the squared error of their normalized pixels.

    Args:
        encoder, decoder: state dicts, float64; 3 and 4 heads, 2 blocks and 1.
        masked: the masked patches of each image.
    """
    kernel = encoder["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)  # [D, p * p * 3]
    errors = []
    for image, hidden in zip(images, masked):
        visible = [patch for patch in range(SIDE**2) if patch not in hidden]
        tokens = [encoder["cls_token"][0, 0]]
        for patch in visible:
            projected = kernel @ pixels_of(image, patch) + encoder["patch_embed.proj.bias"]
            tokens.append(projected + sines(*divmod(patch, SIDE), ENCODER))
        tokens = [layer_norm(t, encoder, "norm") for t in transformer(tokens, encoder, 2, 3)]
        seen = dict(zip(visible, tokens[1:]))
        full = [linear(tokens[0], decoder, "embed")]
        for patch in range(SIDE**2):  # in reading order, as the paper unshuffles them
            token = linear(seen[patch], decoder, "embed") if patch in seen else decoder["mask_token"][0, 0]
            full.append(token + sines(*divmod(patch, SIDE), DECODER))
        full = transformer(full, decoder, 1, 4)
        for patch in hidden:
            predicted = linear(layer_norm(full[1 + patch], decoder, "norm"), decoder, "pixels")
            target = pixels_of(image, patch)
            variance = ((target - target.mean()) ** 2).sum() / (len(target) - 1)
            errors.append(((predicted - (target - target.mean()) / (variance + 1e-6).sqrt()) ** 2).mean())
    return sum(errors) / len(errors)


def restated(method, batch):
    """:func:`restated_loss` of a method's own parameters, so that it can be differentiated."""
    networks = (dict(method.student[name].named_parameters()) for name in ("backbone", "decoder"))
    return restated_loss(*networks, batch.global_crops, masked_in(batch))


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_the_loss_is_the_papers(checkpointing):
    """Value and gradients, in float64."""
    method = method_of(f"step.checkpointing={checkpointing}")
    batch = batch_of(method)
    loss, expected = method.loss(batch, None, 0), restated(method, batch)
    assert list(loss.terms) == ["pixels"] and loss.terms["pixels"] is loss.total and expected > 0.5
    assert abs(loss.total - expected) < 1e-12
    theirs, ours = (torch.autograd.grad(x, learned(method)) for x in (expected, loss.total))
    assert all((a - b).abs().max() <= 1e-9 * b.abs().max() for a, b in zip(ours, theirs, strict=True))


def test_patches_and_their_normal_form():
    images = batch_of(method_of()).global_crops
    patches = patchify(images, PATCH)
    assert patches.shape == (3, SIDE**2, 3 * PATCH**2)
    assert all(torch.equal(patches[1, patch], pixels_of(images[1], patch)) for patch in range(16))
    x, variance = normalized(patches), patches.var(-1)
    torch.testing.assert_close(x.mean(-1), torch.zeros_like(variance))
    torch.testing.assert_close(x.var(-1), variance / (variance + 1e-6))
    assert torch.equal(normalized(torch.full((2, 192), 3.0)), torch.zeros(2, 192))  # a flat patch
    assert normalized(patches.bfloat16()).dtype == torch.float32


def test_plain_pixels_as_targets():
    generator = torch.Generator().manual_seed(2)
    images = batch_of(method_of()).global_crops
    masked = torch.rand(3, 16, generator=generator).argsort(1)[:, :5]
    predictions = torch.randn(3, 5, 768, generator=generator, dtype=torch.float64)
    errors = [
        ((predictions[i, j] - pixels_of(images[i], patch)) ** 2).mean()
        for i, row in enumerate(masked.tolist())
        for j, patch in enumerate(row)
    ]
    loss = masked_pixel_loss(predictions, images, masked, PATCH, normalize=False)
    torch.testing.assert_close(loss, sum(errors) / 15)


def test_the_encoder_runs_on_the_visible_patches_alone(monkeypatch):
    """What enters the decoder is our ViT on a sequence of these patches; what is masked changes none of
    it."""
    method = method_of()
    batch, seen = batch_of(method), []
    decoder, encoder = method.student["decoder"], method.backbone
    monkeypatch.setattr(
        decoder, "forward", lambda x, order: seen.append(x) or torch.zeros(3, 12, 768, dtype=x.dtype)
    )
    with torch.no_grad():
        method.loss(batch, None, 0)
        for image, hidden in enumerate(masked_in(batch)):
            content = encoder.patch_embed(batch.global_crops[image : image + 1]).flatten(2)[0].T  # [N, D]
            visible = [patch for patch in range(16) if patch not in hidden]
            sequence = torch.cat(
                [encoder.cls_input()[0], content[visible] + encoder.positions((SIDE, SIDE))[0, visible]]
            )
            for block in encoder.blocks:
                sequence = block(sequence.unsqueeze(0))[0]
            torch.testing.assert_close(seen[0][image], encoder.norm(sequence), rtol=0, atol=1e-10)
        for image, hidden in zip(batch.global_crops, masked_in(batch)):
            for row, column in (divmod(patch, SIDE) for patch in hidden):
                image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 99.0
        method.loss(batch, None, 0)
        assert torch.equal(*seen)


def test_gradients_flow_into_all_that_learns_and_nothing_else():
    method = method_of()
    batch = batch_of(method)
    method.loss(batch, None, 0).total.backward()
    bare = {name for name, p in method.student.named_parameters() if p.grad is None or not p.grad.any()}
    assert (
        bare
        == {"backbone.pos_embed"}
        == {n for n, p in method.student.named_parameters() if not p.requires_grad}
    )
    x = batch.global_crops.requires_grad_()
    masked = batch.masks.content
    (tokens,) = method.backbone.forward_views([ViewGroup(x, visible=(~masked).nonzero()[:, 1].view(3, 4))])
    (gradient,) = torch.autograd.grad((tokens.patches * torch.randn_like(tokens.patches)).sum(), x)
    assert torch.equal(patchify(gradient, PATCH).abs().sum(-1) == 0, masked)
    groups = [p for group in method.parameter_groups() for p in group["params"]]
    assert {id(p) for p in groups} == {id(p) for p in learned(method)}


def test_predictions_do_not_depend_on_the_order_of_the_patches():
    decoder, generator = method_of().student["decoder"], torch.Generator().manual_seed(2)
    order = torch.rand(3, 16, generator=generator).argsort(1)
    tokens = torch.randn(3, 5, ENCODER, generator=generator, dtype=torch.float64)
    visible, masked = torch.randperm(4, generator=generator), torch.randperm(12, generator=generator)
    again = torch.cat([order[:, :4][:, visible], order[:, 4:][:, masked]], 1)
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, visible]], 1)
    torch.testing.assert_close(
        decoder(shuffled, again), decoder(tokens, order)[:, masked], atol=1e-12, rtol=0
    )


def test_positions_are_fixed_sines_with_zero_for_cls():
    method = method_of()
    for width, positions in (
        (ENCODER, method.backbone.pos_embed[0, 1:]),
        (DECODER, method.student["decoder"].positions),
    ):
        table = torch.stack([sines(*divmod(patch, SIDE), width) for patch in range(16)])
        torch.testing.assert_close(positions, table, atol=1e-7, rtol=0)
    assert (
        not method.backbone.pos_embed[0, 0].any() and "student.decoder.positions" not in method.state_dict()
    )


def test_linear_layers_start_as_xaviers():
    """Uniform within sqrt(6 / (fan in + fan out)), the patch projection as a linear layer; biases zero."""
    torch.manual_seed(0)
    student = MAE(load_config(None, TINY)).student
    layers = [m for m in student.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 2 * 4 + 1 * 4 + 2
    for weight in [layer.weight for layer in layers] + [
        student["backbone"].patch_embed.proj.weight.flatten(1)
    ]:
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.97 * bound < weight.abs().max() <= bound
    assert not any(layer.bias.any() for layer in layers)
    for token in (student["backbone"].cls_token, student["decoder"].mask_token):
        assert 0.01 < token.std() < 0.03
    before = student["decoder"].pixels.weight.clone()
    initialize(student["decoder"])
    assert not torch.equal(before, student["decoder"].pixels.weight)


# --- recipe -----------------------------------------------------------------------------------------------

RECIPE = {  # MAE's Table 8 and A.1, and its code (PRETRAIN.md, main_pretrain.py, models_mae.py)
    "optim.epochs": 800,
    "optim.warmup_epochs": 40,
    "optim.batch_size": 4096,
    "optim.base_lr": 1.5e-4,
    "optim.lr_rule": "linear_256",
    "optim.min_lr": 0.0,
    "optim.weight_decay": 0.05,
    "optim.weight_decay_end": 0.05,
    "optim.betas": [0.9, 0.95],
    "optim.clip_grad": 0.0,
    "optim.head_lr_factor": 1.0,
    "backbone.patch_size": 16,
    "backbone.drop_path": 0.0,
    "backbone.layer_scale_init": 0.0,
    "backbone.n_registers": 0,
    "crops.n_global": 1,
    "crops.n_local": 0,
    "crops.global_px": 224,
    "crops.global_scale": [0.2, 1.0],
    "crops.ratio": [3 / 4, 4 / 3],
    "crops.flip_p": 0.5,
    "crops.plain_globals": False,
    "mae.mask_ratio": 0.75,
    "mae.normalize_pixels": True,
    "mae.decoder_width": 512,
    "mae.decoder_depth": 8,
    "mae.decoder_heads": 16,
}
IMAGENET = 1_281_167


@pytest.mark.parametrize("size", ["s", "b"])
def test_the_recipe(size):
    config = load_config(ROOT / f"configs/pretrain/mae_vit{size}16.yaml")
    assert {key: flat(config)[key] for key in RECIPE} == RECIPE
    protocol = run_protocol(config, IMAGENET)
    assert (
        protocol.name == "mae-800ep"
        and protocol.full
        and config.optim.batch_size % config.step.accumulate == 0
    )
    assert scaled_lr(config.optim.base_lr, config.optim.batch_size, config.optim.lr_rule) == pytest.approx(
        2.4e-3
    )
    crops, color = config.view_settings().crops, config.view_settings().color
    assert effective_epochs(800, crops.n_global, crops.n_local, crops.global_px, crops.local_px) == 800
    assert color.jitter_p == color.grayscale_p == 0 and color.blur_p == color.solarize_p == (0, 0, 0)
    assert IMAGENET // 4096 == 312
    masks = draw_masks(5, 1, config.view_settings().grid, config.view_settings().masks, (0, 3, 0))
    assert masks.content.sum(1).tolist() == [147] * 5
    student = find_method("mae")(config).student
    n = {name: sum(p.numel() for p in module.parameters()) for name, module in student.items()}
    width = {"s": 384, "b": 768}[size]
    assert (
        n["backbone"] == {"s": 21_665_664, "b": 85_798_656}[size]
    )  # timm's vit_{small,base}_patch16_224 without classes
    block = 12 * 512**2 + 13 * 512
    assert n["decoder"] == (width + 1) * 512 + 512 + 8 * block + 2 * 512 + 513 * 768


@pytest.mark.parametrize(
    "words, says",
    [
        (["mae.decoder_heads=5"], "mae.decoder_heads=5"),
        (["mae.mask_ratio=0.01"], "mae.mask_ratio=0.01"),
        (["mae.mask_ratio=1.0"], "mae.mask_ratio=1.0"),
        (["mae.decoder_width=30"], "mae.decoder_width=30"),
        (["crops.global_px=100"], "crops.global_px=100"),
        (["masks.ratio=[0.1, 0.5]"], "masks"),
    ],
)
def test_settings_that_cannot_be_are_one_line(words, says):
    with pytest.raises(UserError, match=says.replace(".", r"\.")) as error:
        load_config(None, tiny(*words))
    assert "\n" not in str(error.value)


def test_local_crops_are_said_to_have_no_effect():
    with pytest.warns(UserWarning, match=r"crops\.n_local=2"):
        load_config(None, tiny("crops.n_local=2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config("mae-800ep")


# --- runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    torch.set_num_threads(1)
    return f"data.root={write_photos(tmp_path / 'photos', n=8)}"


def run(tmp_path, photos, name, *words, **options):
    return train(load_config(None, tiny(photos, f"run.output={tmp_path / name}", *words)), **options)


@pytest.mark.parametrize("path", ["cpu", "device"])
def test_resume_is_bit_for_bit(tmp_path, photos, path):
    words = [f"data.path={path}", "step.accumulate=2"]
    one = run(tmp_path, photos, "straight", *words)
    run(tmp_path, photos, "parts", *words, stop_after=4)
    two = run(tmp_path, photos, "parts", *words, "data.workers=2", resume="auto")
    a, b = tensors_of(one), tensors_of(two)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert len(lines_of(one)) == 6 and lines_of(one) == lines_of(two)
    assert lines_of(one)[0]["pixels"] == lines_of(one)[0]["loss"] > 0


def test_steps_on_one_batch_lower_its_loss():
    """Normalized targets have variance 1: whoever predicts their mean has the loss 1."""
    method = method_of(dtype=torch.float32)
    batch = batch_of(method, dtype=torch.float32)
    optimizer, losses = torch.optim.AdamW(learned(method), lr=2e-3), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(method.loss(batch, None, 0).total)
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 1 and losses[-1] < 0.9


def test_micro_batches_give_the_loss_of_the_batch(tmp_path, photos):
    """float64: losses and tensors of two and four micro-batches after 6 steps are the whole batch's."""
    runs = [
        run(tmp_path, photos, f"run{n}", "run.precision=float64", f"step.accumulate={n}") for n in (1, 2, 4)
    ]
    assert differences(runs[0], runs[1], 6) == differences(runs[0], runs[2], 6) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_losses(tmp_path, photos, monkeypatch):
    """Those of the decoder are compiled too."""
    compiled, compile = [], Block.compile
    monkeypatch.setattr(Block, "compile", lambda block: compiled.append(block) or compile(block))
    eager, fast = (run(tmp_path, photos, flag, f"step.compile={flag}") for flag in ("false", "true"))
    assert len(compiled) == 2 + 1 and differences(eager, fast, 6, tolerance=1e-4) == []


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, photos, parallel):
    words = ["run.precision=float64", "step.accumulate=2"]
    run(tmp_path, photos, "one", *words)
    options = [photos, f"run.output={tmp_path / 'two'}", *words, f"step.parallel={parallel}"]
    torchrun(2, ROOT / "tools" / "train_ssl.py", *tiny(*options))
    assert differences(tmp_path / "one", tmp_path / "two", 6) == []


def test_what_a_run_leaves(tmp_path, photos):
    """The trained encoder: it builds, starts another run and goes into a detector; the result, its
    protocol."""
    for part in ("train/a", "train/b", "val/a", "val/b"):
        write_photos(tmp_path / "labeled" / part, n=3, seed=len(part) + ord(part[-1]))
    words = [
        f"probes.knn_root={tmp_path / 'labeled'}",
        "probes.every=3",
        "probes.knn_k=3",
        "probes.image_px=64",
    ]
    folder = run(tmp_path, photos, "run", "log.tensorboard=true", "log.images_every=2", *words)
    result, path = read_result(folder), folder / "backbone.safetensors"
    assert (result.method, result.effective_epochs) == ("mae", pytest.approx(3 * (64 / 224) ** 2, abs=0.01))
    assert {"loss", "pixels", "grad_norm", "probe/knn_top1"} <= set(
        result.metrics
    ) and not result.protocol.full
    assert result.protocol.name == "mae-800ep" and result.protocol.deviations["mae.decoder_width"] == [
        512,
        32,
    ]
    tensors, vit = tensors_of(folder), build_backbone("vit_tiny_patch16", weights=path)
    encoder = {key: tensors[f"method.student.backbone.{key}"] for key in vit.state_dict()}
    assert all(torch.equal(value, encoder[key]) for key, value in vit.state_dict().items())
    assert (
        vit.model_kwargs["pos_encoding"] == "standard"
        and vit.model_kwargs["layerscale"] is None
        and not vit.model_kwargs["mask_tokens"]
    )
    said = read_checkpoint(path).provenance
    assert said["method"] == "mae" and said["position_masks"] is False
    again = MAE(load_config(None, tiny(photos, f"backbone.weights={path}")))
    assert all(torch.equal(value, encoder[key]) for key, value in again.backbone.state_dict().items())
    assert not again.backbone.pos_embed.requires_grad
    detector = build_for_fine_tuning("vit_tiny_patch16", path, drop_path=0.1)
    prepare(detector, FeatureOptions())
    x = torch.randn(2, 3, 80, 112, generator=torch.Generator().manual_seed(0))
    features = detection_features(detector.eval(), x, FeatureOptions())
    assert features.shape == (2, 192, 5, 7) and torch.equal(features, vit.eval().feature_map(x))
    (features.square().sum() + features.sum()).backward()
    assert (
        detector.pos_embed.requires_grad and detector.pos_embed.grad.any()
    )  # in fine-tuning positions learn, as MAE's do


def test_loader_and_method_agree_on_the_masks(tmp_path, photos):
    """Every crop of every micro-batch loses 12 of 16 patches; a run of another ratio draws the same crops."""
    config = load_config(None, tiny(photos, "step.accumulate=2"))
    batches = [batch for batch, _ in build_loader(config, build_dataset(config), 0, 6)]
    assert len(batches) == 12 and all((batch.masks.content.sum(1) == 12).all() for batch in batches)
    half = load_config(None, tiny(photos, "step.accumulate=2", "mae.mask_ratio=0.5"))
    for batch, (other, _) in zip(batches, build_loader(half, build_dataset(half), 0, 6)):
        assert torch.equal(batch.global_crops, other.global_crops) and (other.masks.content.sum(1) == 8).all()
