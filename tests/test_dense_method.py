"""PaKA and Gram anchoring, one step: the loss restated pair by pair, its gradient, its edges, and the
settings that it refuses."""

import re

import pytest
import torch
import torch.nn.functional as F
from dense_fixture import DENSE, GRAM, TIED, write_start
from photos import last, write_photos
from torchvision.ops import roi_align

from pretrain.config import load_config
from pretrain.data.loader import build_dataset, build_loader
from pretrain.errors import UserError
from pretrain.methods.method import Progress
from pretrain.methods.paka import PaKA
from pretrain.trainer import Length, Trainer
from pretrain.views.color import NO_COLOR

EXACT = ["run.precision=float64", "backbone.drop_path=0.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    write_photos(folder / "photos")
    write_start(folder / "start.safetensors", n_registers=2)
    return folder


def settings(folder, *extra, start="start.safetensors"):
    places = [f"data.root={folder / 'photos'}", f"backbone.weights={folder / start}"]
    return load_config(None, last([*DENSE, *places, *extra]))


def first_batch(config, dtype=torch.float32):
    return next(iter(build_loader(config, build_dataset(config), 0, 1)))[0].to(torch.device("cpu"), dtype)


def apart(config, dtype=torch.float64):
    """The method with a student that has left its teacher."""
    torch.manual_seed(0)
    method = PaKA(config).to(dtype)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return method


def terms_of(method, batch):
    """``loss`` and its terms, of a batch in one piece."""
    loss = method.loss(batch, method.prepare([batch], Progress(0, 1, 1, 0)), 0)
    return {"loss": loss.total, **loss.terms}


# --- the loss ---------------------------------------------------------------------------------------------


def patches_in(network, crop, place, box, flip, region, bins):
    """Features [bins^2, d] of one crop in a region of the image, by torchvision's ROI-Align."""
    tokens = network["backbone"](crop[None], *place).patches  # [1, N, D]
    side = round(tokens.shape[1] ** 0.5)
    maps = tokens.transpose(1, 2).unflatten(2, (side, side))
    maps = maps.flip(3) if flip else maps
    x0, y0, x1, y1 = box
    scale = torch.stack([side / (x1 - x0), side / (y1 - y0)])
    corners = torch.cat([(region[:2] - box[:2]) * scale, (region[2:] - box[:2]) * scale])
    bins = (
        roi_align(maps, [corners[None].to(maps.dtype)], (bins, bins), sampling_ratio=2, aligned=True)[0]
        .flatten(1)
        .T
    )
    return network["head"](bins) if "head" in network else bins


def overlap(first, second, least):
    """The overlap of two crops (box, patches a side) between their outermost centers, none where it is too
    narrow."""
    boxes = []
    for box, n in (first, second):
        half = (box[2:] - box[:2]) / (2 * n)
        boxes.append(torch.cat([box[:2] + half, box[2:] - half]))
    low, high = torch.maximum(boxes[0][:2], boxes[1][:2]), torch.minimum(boxes[0][2:], boxes[1][2:])
    patch = torch.maximum(*((box[2:] - box[:2]) / n for box, n in (first, second)))
    return torch.cat([low, high]) if bool(((high - low) >= least * patch).all()) else None


def one_minus_cka(s, t):
    center = torch.eye(len(s), dtype=s.dtype) - 1 / len(s)
    k, l = center @ s @ s.T @ center, center @ t @ t.T @ center
    return 1 - (k * l).sum() / (k.norm() * l.norm())


def gram(s, t):
    s, t = F.normalize(s, dim=1), F.normalize(t, dim=1)
    return (
        sum(((s[i] @ s[j]) - (t[i] @ t[j])) ** 2 for i in range(len(s)) for j in range(len(s))) / len(s) ** 2
    )


@pytest.mark.parametrize(
    "extra",
    [
        [],
        [*TIED, "crops.n_local=3"],
        [*GRAM, "alignment.pairs=parent"],
        ["crops.local_rule=image", "alignment.loss=gram"],
    ],
    ids=["paka", "tied", "gram", "anywhere"],
)
def test_the_loss_is_the_mean_over_all_overlaps(folder, extra):
    config = settings(folder, *EXACT, *extra)
    batch, method, alignment = first_batch(config, torch.float64), apart(config), config.alignment
    views, n_images = batch.views, batch.n_images
    tied = config.positions.encoding == "field"
    losses = []
    for b in range(n_images):
        for g in range(2):
            for l in range(views.boxes.shape[1] - 2):
                if alignment.pairs == "parent" and l % 2 != g:
                    continue
                boxes = views.boxes[b, g], views.boxes[b, 2 + l]
                region = overlap((boxes[0], 4), (boxes[1], 3), alignment.min_overlap_patches)
                if region is None:
                    continue
                found = []
                for network, crops, v, n in (
                    ("teacher", batch.global_crops, g, g),
                    ("student", batch.local_crops, 2 + l, l),
                ):
                    flip = views.flips[b, v]
                    place = (views.position_boxes[b, v][None], flip[None]) if tied else ()
                    crop = crops[n * n_images + b]
                    found.append(
                        patches_in(getattr(method, network), crop, place, views.boxes[b, v], flip, region, 3)
                    )
                losses.append((gram if alignment.loss == "gram" else one_minus_cka)(found[1], found[0]))
    terms = terms_of(method, batch)
    assert len(losses) > 3 and set(terms) == {"loss", alignment.loss}
    torch.testing.assert_close(
        terms["loss"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-9
    )  # boxes are float32
    assert terms["loss"] > 1e-4


@pytest.mark.parametrize("extra", [[], GRAM, TIED], ids=["paka", "gram", "tied"])
def test_equal_views_and_networks_agree(folder, extra):
    """The crop itself for both, no colors, student and teacher as they start."""
    plain = [
        "crops.local_rule=same",
        "crops.local_px=64",
        *(f"color.{key}={value}" for key, value in NO_COLOR.items()),
    ]
    config = settings(folder, *EXACT, *plain, "alignment.region_grid=4", "alignment.region_samples=1", *extra)
    batch = first_batch(config, torch.float64)
    method = PaKA(config).double()
    assert bool(batch.views.flips[:, 2:].any()) and not bool(batch.views.flips[:, :2].any())
    unflipped = first_batch(
        settings(folder, *EXACT, *plain, "crops.flip_p=0.0", "alignment.region_grid=4", *extra), torch.float64
    )
    assert terms_of(method, unflipped)["loss"].abs() < 1e-9 < terms_of(method, batch)["loss"]


def test_the_student_alone_drops_paths(folder):
    config = settings(folder, "backbone.drop_path=0.5")
    batch, method = first_batch(config), apart(config, torch.float32).train()
    first, again = (method.teacher_targets(batch) for _ in range(2))
    assert torch.equal(first.features, again.features)
    assert len({terms_of(method, batch)["loss"].item() for _ in range(8)}) > 1


def test_the_whole_crop_is_read_patch_by_patch(folder):
    """Gram anchoring as DINOv3 does it: the features of the regions are the patches themselves, turned
    back where flipped."""
    whole = [
        "crops.local_rule=same",
        "crops.local_px=64",
        "alignment.region_grid=4",
        "alignment.region_samples=1",
    ]
    config = settings(folder, *EXACT, *GRAM, *whole)
    batch, method = first_batch(config, torch.float64), apart(config)
    targets = method.teacher_targets(batch)
    patches = (
        method.teacher["backbone"](batch.global_crops).patches.unflatten(0, (2, -1)).transpose(0, 1)
    )  # [B, G, N, D]
    assert torch.equal(targets.are, torch.eye(2, dtype=torch.bool).expand(len(patches), -1, -1))
    own = torch.stack([targets.features[:, g, g] for g in range(2)], 1)
    torch.testing.assert_close(own, patches, rtol=1e-4, atol=1e-5)  # float32 boxes


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], GRAM, TIED], ids=["paka", "gram", "tied"])
def test_the_gradient_reaches_every_parameter_of_the_student_alone(folder, extra):
    """DDP waits for all of them: [CLS], registers and their positions too. Of the head's last bias CKA
    sees nothing."""
    config = settings(folder, *EXACT, *extra)
    method = apart(config)
    terms_of(method, first_batch(config, torch.float64))["loss"].backward()
    for name, parameter in method.student.named_parameters():
        if name == "head.4.bias":
            assert not parameter.requires_grad
            continue
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().sum() > 1e-12, name
    assert {"backbone.cls_token", "backbone.reg_token"} <= dict(method.student.named_parameters()).keys()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


@pytest.mark.parametrize("rule", ["full", "selective"])
def test_checkpointing_changes_nothing(folder, rule):
    """Loss and gradients, with dropped paths."""
    found = []
    for checkpointing in ("none", rule):
        config = settings(folder, f"step.checkpointing={checkpointing}", "backbone.drop_path=0.3")
        method = apart(config, torch.float32)
        batch = first_batch(config)
        torch.manual_seed(3)
        loss = terms_of(method, batch)["loss"]
        loss.backward()
        found.append(
            [loss, *(parameter.grad for parameter in method.student.parameters() if parameter.requires_grad)]
        )
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def step_of(config):
    """A trainer after a step, its losses and its scheduled values."""
    trainer = Trainer(config, Length.of(config, 6))
    loader = build_loader(config, build_dataset(config), 0, 1)
    logs = trainer.step([next(iter(loader))[0]], examine=True)
    return trainer, logs.losses, logs.scheduled


@pytest.mark.parametrize(
    "extra",
    [[], ["alignment.loss=frobenius", "alignment.kernel=rbf"], GRAM],
    ids=["paka", "frobenius rbf", "gram"],
)
def test_a_step_in_bfloat16_is_finite(folder, extra):
    trainer, terms, _ = step_of(settings(folder, "run.precision=bf16", *extra))
    assert set(terms) == {"loss", trainer.config.alignment.loss, "grad_norm", "overlaps", "feature_std"}
    assert all(bool(term.isfinite()) for term in terms.values())
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.method.parameters())
    assert 0 < terms["overlaps"] <= 1 and terms["feature_std"] > 0


def test_heads_learn_ten_times_as_fast_and_nothing_is_frozen(folder):
    trainer, _, scheduled = step_of(settings(folder, "optim.warmup_epochs=0"))
    rates, lr = {group["lr_factor"]: group["lr"] for group in trainer.optimizer.param_groups}, scheduled["lr"]
    assert rates == {1.0: lr, 10.0: 10 * lr} and lr > 0
    heads = {
        id(p) for group in trainer.optimizer.param_groups if group["lr_factor"] == 10 for p in group["params"]
    }
    assert heads == {id(p) for p in trainer.method.student["head"].parameters() if p.requires_grad}
    start = PaKA(trainer.config)
    for (name, moved), parameter in zip(
        trainer.method.student.named_parameters(), start.student.parameters()
    ):
        assert name.startswith("head") or not torch.equal(moved, parameter), name


# --- edges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], GRAM], ids=["paka", "gram"])
def test_a_batch_without_any_overlap_changes_nothing(folder, extra):
    tiny = ["crops.local_rule=image", "crops.local_scale=[0.01,0.02]", "crops.global_scale=[0.9,1.0]"]
    config = settings(
        folder,
        *tiny,
        "alignment.min_overlap_patches=1.9",
        "optim.weight_decay=0.0",
        "optim.weight_decay_end=0.0",
        *extra,
    )
    trainer, terms, _ = step_of(config)
    assert terms["loss"] == terms["overlaps"] == terms["grad_norm"] == 0
    torch.manual_seed(config.run.seed)
    before = PaKA(config)
    for one, two in zip(trainer.method.parameters(), before.parameters()):
        assert torch.equal(one, two)


def test_images_smaller_than_a_crop(folder, tmp_path):
    write_photos(tmp_path / "photos", size=(20, 13))
    _, terms, _ = step_of(settings(tmp_path, f"backbone.weights={folder / 'start.safetensors'}", start=""))
    assert bool(terms["loss"].isfinite()) and terms["overlaps"] > 0


def test_weights_without_the_registers_that_are_asked_for_are_named(folder, tmp_path):
    path = write_start(tmp_path / "none.safetensors")
    for extra in ("backbone.name=vit_tiny_patch16_reg4", "backbone.n_registers=4"):
        with pytest.raises(UserError, match=f"{re.escape(str(path))}.*registers"):
            PaKA(settings(folder, extra, f"backbone.weights={path}"))


def test_a_file_of_14_px_patches_goes_on_at_14_or_16(folder, tmp_path):
    path = write_start(tmp_path / "14.safetensors", patch_size=14, n_registers=4)
    for patch_size, sides in ((14, (56, 42)), (16, (64, 48))):
        px = [
            f"backbone.patch_size={patch_size}",
            f"crops.global_px={sides[0]}",
            f"crops.local_px={sides[1]}",
        ]
        config = settings(folder, *px, f"backbone.weights={path}", *EXACT)
        method = apart(config)
        backbone = method.backbone
        assert (
            backbone.patch_size == patch_size
            and backbone.n_registers == 4
            and not backbone.model_kwargs["mask_tokens"]
        )
        assert bool(terms_of(method, first_batch(config, torch.float64))["loss"] > 0)


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra, named",
    [
        (["backbone.weights="], "backbone.weights"),
        (["crops.n_local=0"], "crops.n_local=0"),
        (["crops.local_px=32", "alignment.min_overlap_patches=1.0"], "crops.local_px=32 span 1 patches"),
        (["run.export_network=teacher", "optim.teacher_momentum=1.0"], "run.export_network=teacher"),
        (["alignment.loss=mse"], "alignment.loss"),
        (["crops.local_rule=outside"], "crops.local_rule"),
        (["alignment.region_grid=1"], "alignment.region_grid"),
    ],
)
def test_settings_that_contradict_each_other_are_named(folder, extra, named):
    with pytest.raises(UserError, match=re.escape(named)):
        settings(folder, *extra)


@pytest.mark.parametrize("extra", ["masks.content_share=0.5", "losses.position=0.5", "heads.n_prototypes=9"])
def test_settings_of_a_pre_training_are_refused(folder, extra):
    group, key = extra.partition("=")[0].split(".")
    with pytest.raises(UserError, match=f"unknown key '({group}|{group}.{key})'"):
        settings(folder, extra)


def test_settings_without_effect_are_a_warning(folder):
    with pytest.warns(UserWarning, match="positions.augment has no effect"):
        settings(folder, "positions.augment=true")


def test_whole_crops_of_two_sizes_read_beyond_the_patches_of_the_smaller(folder, recwarn):
    """There both repeat their borders, which are not the same: it is said."""
    whole = ["crops.local_rule=same", "alignment.region_grid=4"]
    settings(folder, *whole, "crops.local_px=64")
    settings(folder, *whole, "crops.local_px=48", "alignment.region_samples=1", "alignment.region_grid=3")
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"region_samples=4 points .* border of 3 patches"):
        settings(folder, *whole, "crops.local_px=48", "alignment.region_samples=1")


def test_settings_of_a_post_training_are_refused_by_a_pre_training(recwarn):
    load_config(None, [])
    assert not recwarn.list
    with pytest.raises(UserError, match="unknown key 'alignment'"):
        load_config(None, ["alignment.loss=gram"])


def test_a_teacher_that_moves_may_be_gram_anchoring_s_and_a_head_too(folder, recwarn):
    settings(folder, "alignment.loss=gram")
    settings(
        folder, "run.export_network=teacher", "optim.teacher_momentum=1.0", "optim.teacher_momentum_end=0.9"
    )
    assert not recwarn.list
