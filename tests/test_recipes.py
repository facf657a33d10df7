"""The recipes: every value of the paper and of DINOv2's code, every ablation row by its keys, every number
in a comment."""

import pytest
import yaml
from photos import TINY, last
from recipe_fixture import ABLATIONS, CONFIGS, comments, effective, path_of, recipe

from pretrain.config import load_config, recipe_names, run_protocol
from pretrain.data.loader import DEVICE_SIDE_PX
from pretrain.methods import SHIPPED, find_method
from pretrain.methods.intertwined import Intertwined
from pretrain.results.published import published_rows
from pretrain.schedules import scaled_lr
from pretrain.settings import build, differences, fields, flat, read_words

FULL = "intertwined_vits16"
IMAGENET_1K = 1_281_167  # training images
ENGINE = ("run", "data", "step", "probes", "log")  # groups that say where and how a run computes, not what
# What the paper's Table 6 and appendix B.1 print.
TABLE_6 = {
    "optim.epochs": 100,
    "optim.base_lr": 2e-3,
    "optim.warmup_epochs": 10,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "backbone.drop_path": 0.1,
    "losses.teacher_temperature": 0.04,
    "optim.teacher_momentum": 0.992,
    "masks.ratio": [0.1, 0.5],
    "masks.content_shape": "box",
    "masks.position_shape": "cross",
    "masks.content_share": 0.5,
    "masks.position_share": 0.5,
    "heads.n_prototypes": 65536,
    "positions.scale": "beta",
    "positions.beta": [2.0, 5.0],
    "positions.s_min": 0.2,
    "positions.s_max": 1.0,
    "positions.grid": 50,
    "optim.batch_size": 512,
}
REST_OF_THE_PAPER = {  # sections 3.2.1, 3.4, 4.1, footnote 4, eq. 6, B.1
    "positions.encoding": "field",
    "positions.augment": True,
    "positions.reference": "crops",
    "crops.n_global": 2,
    "crops.n_local": 8,
    "crops.global_px": 224,
    "crops.local_px": 96,
    "losses.image": 1.0,
    "losses.content": 1.0,
    "losses.position": 1.0,
    "losses.koleo": 1.0,
    "backbone.patch_size": 16,
    "backbone.name": "vit_small_patch16",
}
DINOV2 = {  # its public code: ssl_default_config.yaml, data/augmentations.py, train/train.py, loss/
    "crops.global_scale": [0.32, 1.0],
    "crops.local_scale": [0.05, 0.32],
    "crops.ratio": [3 / 4, 4 / 3],
    "crops.flip_p": 0.5,
    "color.jitter": [0.4, 0.4, 0.2, 0.1],
    "color.jitter_p": 0.8,
    "color.grayscale_p": 0.2,
    "color.blur_kernel_px": 9,
    "color.blur_sigma": [0.1, 2.0],
    "color.solarize_p": [0.0, 0.2, 0.0],
    "color.solarize_threshold": 128,
    "masks.min_box_patches": 4,
    "masks.min_aspect": 0.3,
    "backbone.layer_scale_init": 1e-5,
    "heads.hidden_dim": 2048,
    "heads.bottleneck_dim": 256,
    "heads.n_layers": 3,
    "losses.centering": "softmax_center",
    "losses.center_momentum": 0.9,
    "losses.sinkhorn_iterations": 3,
    "losses.student_temperature": 0.1,
    "optim.lr_rule": "sqrt_1024",
    "optim.min_lr": 1e-6,
    "optim.betas": [0.9, 0.999],
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1,
    "optim.teacher_momentum_end": 1.0,
    "optim.head_lr_factor": 1.0,
    "crops.local_rule": "image",
}
OURS = {  # METHOD.md
    "positions.interpolation": "bicubic",
    "positions.surround": "all",
    "positions.tied": True,
    "positions.init": "normal",
    "positions.init_grid": 7,
    "positions.init_scale": 1.0,
    "positions.learnable": True,
    "color.blur_p": [1.0, 0.1, 0.5],
    "masks.kinds_over": "batch",
    "losses.koleo_scope": "global",
    "alignment.bandwidth": 1.0,
    "alignment.pairs": "all",
    "alignment.region_samples": 2,
    "alignment.min_overlap_patches": 2.0,
}
DINOV3 = {"positions.rescale": 2.0}
PAKA = {  # what is published of it; plain globals are off in a pre-training
    "crops.plain_globals": False,
    "crops.local_inside": 0.9,
    "alignment.loss": "cka",
    "alignment.kernel": "linear",
    "alignment.head": True,
}
NECO = {"alignment.region_grid": 7}
MAE = {  # its paper, and its public code
    "mae.mask_ratio": 0.75,
    "mae.normalize_pixels": True,
    "mae.decoder_width": 512,
    "mae.decoder_depth": 8,
    "mae.decoder_heads": 16,
}
START = ["backbone.weights=start.pth"]
UNSET = {
    "backbone.weights": "start.pth",
    "backbone.depth": 0,
    "backbone.n_registers": 0,
    "backbone.attention": "auto",
}
UNSET["optim.epoch_iters"] = 0
POST_TRAINING = ("paka", "gram")
# Each row of the paper's ablations that is not the full method: {key: its value there}.
NO_SAMPLING = {"positions.encoding": "standard", "positions.augment": False}
NO_L_POS = {"masks.position_share": 0.0, "losses.position": 0.0}
ROWS = {
    "table3_none": NO_SAMPLING | NO_L_POS,
    "table3_sampling": NO_L_POS,
    "table3_lpos": NO_SAMPLING,
    "table4a_constant": {"positions.scale": "constant"},
    "table4a_uniform": {"positions.scale": "uniform"},
    "table4b_19": {"positions.grid": 19},
    "table5a_box": {"masks.position_shape": "box"},
    "table5b_content": {"masks.content_share": 1.0} | NO_L_POS,
    "table5b_position": {"masks.content_share": 0.0, "masks.position_share": 1.0, "losses.content": 0.0},
    "reference_image": {"positions.reference": "image"},
}


def iterations(config, n_images):
    return config.optim.epoch_iters or n_images // config.optim.batch_size


# --- the defaults of the methods --------------------------------------------------------------------------


def test_every_default_is_the_papers_dinov2s_or_ours():
    known = TABLE_6 | REST_OF_THE_PAPER | DINOV2 | DINOV3 | OURS | PAKA | NECO | MAE | UNSET
    found = set()
    for name in SHIPPED:
        defaults = flat(build(find_method(name).Settings, [read_words(START)]))
        values = {
            key: value for key, value in defaults.items() if "." in key and key.split(".")[0] not in ENGINE
        }
        assert values == {key: known[key] for key in values}, name
        found |= set(values)
    assert found == set(known)


def test_the_named_source_is_the_right_one():
    """A value of Table 6 says Table 6, one of DINOv2's code says DINOv2, one of PaKA says PaKA, one of
    ours says ours."""
    said = {key: info.description for name in SHIPPED for key, info, _ in fields(find_method(name).Settings)}
    sources = (
        (TABLE_6, "Table 6"),
        (DINOV2, "DINOv2"),
        (PAKA, "PaKA"),
        (OURS, "ours"),
        (DINOV3, "DINOv3"),
        (NECO, "NeCo"),
        (MAE, "MAE"),
    )
    for keys, source in sources:
        assert [key for key in keys if source not in said[key]] == []
    groups = ("sec. ", "footnote", "eq. ", "appendix B")
    assert [key for key in REST_OF_THE_PAPER if not any(f"[{group}" in said[key] for group in groups)] == []


def test_the_heads_are_separate_and_nothing_decays_by_layer():
    """Table 6: separate heads, no layer-wise decay, no lr factor of the patch embedding: no key could say
    otherwise."""
    keys = {key for name in SHIPPED for key, _, _ in fields(find_method(name).Settings)}
    assert not [key for key in keys if "decay" in key and not key.startswith("optim.weight_decay")]
    assert not [key for key in keys if "separate" in key or "patch_embed" in key]


# --- the recipes ------------------------------------------------------------------------------------------

# What each recipe changes in its method's defaults, as its paper and its code have it (METHOD.md).
DINOV2_BASELINE = {  # the paper's own baseline
    "positions.encoding": "standard",
    "positions.grid": 14,
    "positions.interpolation": "dinov2",
    "positions.augment": False,
    "masks.position_share": 0.0,
    "losses.position": 0.0,
}
PAKA_25 = {  # what PaKA says, and NeCo's public recipe where it is silent
    "run.export_network": "student",
    "data.source": "coco",
    "data.split": "train2017",
    "crops.n_local": 4,
    "crops.global_scale": [0.25, 1.0],
    "crops.local_scale": [0.05, 0.4],
    "crops.plain_globals": True,
    "crops.local_rule": "inside",
    "positions.encoding": "standard",
    "positions.augment": False,
    "color.jitter": [0.8, 0.8, 0.8, 0.2],
    "optim.epochs": 25,
    "optim.batch_size": 64,
    "optim.base_lr": 1e-5,
    "optim.head_lr_factor": 10.0,
    "optim.lr_rule": "none",
    "optim.min_lr": 0.0,
    "optim.warmup_epochs": 0,
    "optim.weight_decay_end": 0.5,
    "optim.clip_grad": 0.0,
    "optim.teacher_momentum": 0.9995,
}
TIED = {"positions.encoding": "field", "positions.augment": True}  # ours: both seeds together
GRAM = {"alignment.loss": "gram", "alignment.head": False, "optim.teacher_momentum": 1.0}
WHOLE = {"crops.n_local": 2, "crops.local_px": 224, "crops.local_rule": "same"}
WHOLE |= {"alignment.region_grid": 14, "alignment.region_samples": 1}
MAE_800 = {  # He et al. 2022, Table 8, and its public code
    "crops.n_global": 1,
    "crops.n_local": 0,
    "crops.global_scale": [0.2, 1.0],
    "backbone.name": "vit_base_patch16",
    "backbone.layer_scale_init": 0.0,
    "backbone.drop_path": 0.0,
    "optim.epochs": 800,
    "optim.batch_size": 4096,
    "optim.base_lr": 1.5e-4,
    "optim.lr_rule": "linear_256",
    "optim.min_lr": 0.0,
    "optim.warmup_epochs": 40,
    "optim.weight_decay": 0.05,
    "optim.weight_decay_end": 0.05,
    "optim.betas": [0.9, 0.95],
    "optim.clip_grad": 0.0,
}
OWN_IMAGES = {
    "heads.n_prototypes": 8192,
    "losses.center_momentum": 0.986916,
    "optim.batch_size": 64,
    "optim.base_lr": 2e-4,
    "optim.teacher_momentum": 0.99975,
    "step.accumulate": 0,
}
SCRATCH = {"optim.teacher_momentum": 0.998996}
RECIPES = {
    "own-images": ("intertwined", OWN_IMAGES),
    "own-images-scratch": (
        "intertwined",
        {key: value for key, value in (OWN_IMAGES | SCRATCH).items() if key != "optim.base_lr"},
    ),
    "intertwined-100ep": ("intertwined", {}),
    "dinov2-100ep": ("intertwined", DINOV2_BASELINE),
    "rotary-100ep": ("intertwined", {"positions.encoding": "rotary"}),
    "paka-25ep": ("paka", PAKA_25),
    "paka-tied-25ep": ("paka", {key: value for key, value in PAKA_25.items() if key not in TIED}),
    "gram-25ep": ("paka", PAKA_25 | GRAM),
    "gram-whole-25ep": ("paka", PAKA_25 | GRAM | WHOLE),
    "mae-800ep": ("mae", MAE_800),
}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_changes_what_it_should_and_nothing_else(name):
    method, changes = RECIPES[name]
    config, defaults = load_config(name, START), build(find_method(method).Settings, [read_words(START)])
    changed = differences(defaults, config)
    labels = {"method", "recipe", "run.name"}
    assert {key: value for key, (_, value) in changed.items() if key not in labels} == changes
    assert (config.method, config.recipe) == (method, name) and config.run.name


@pytest.mark.parametrize(
    "words, changes",
    [
        (["backbone.name=vit_base_patch16"], {"optim.batch_size": 16}),
        (["backbone.name=vit_base_patch16_reg4"], {"optim.batch_size": 16}),
        (["backbone.patch_size=14"], {"crops.global_px": 518, "crops.local_px": 98}),
        (
            ["backbone.patch_size=14", "crops.local_px=196"],
            {"crops.global_px": 518},
        ),  # what a config says stands
    ],
)
def test_a_post_training_follows_the_size_of_its_network(words, changes):
    """NeCo: batches of 64 for ViT-S and of 16 for ViT-B; 37 and 7 patches of 14 px, 14 and 6 of 16 px."""
    usual, config = flat(load_config("paka-25ep", START)), flat(load_config("paka-25ep", [*START, *words]))
    said = {word.partition("=")[0] for word in words}
    assert {key: config[key] for key in config if config[key] != usual[key] and key not in said} == changes
    whole = load_config("gram-whole-25ep", [*START, "backbone.patch_size=14"])
    assert (whole.crops.global_px, whole.crops.local_px, whole.alignment.region_grid) == (518, 518, 37)


def test_an_epoch_of_the_recipe():
    config = recipe(FULL)
    epoch_iters = iterations(config, IMAGENET_1K)
    assert epoch_iters == 2502 and config.optim.epochs * epoch_iters == 250_200
    assert (
        round(effective(config, 1), 3) == 3.469 and round(effective(config, 100)) == 347
    )  # the paper rounds to 3.5 and 350


@pytest.mark.parametrize("name, changes", ROWS.items())
def test_an_ablation_row_changes_its_keys_and_says_so(name, changes):
    full, row = flat(recipe(FULL)), flat(recipe(f"ablation/{name}"))
    assert {key: row[key] for key in row if row[key] != full[key] and not key.startswith("run.")} == changes
    assert {key for key in row if row[key] != full[key] and key.startswith("run.")} == {
        "run.name",
        "run.output",
    }
    protocol = run_protocol(recipe(f"ablation/{name}"), IMAGENET_1K)
    assert protocol.name == "intertwined-100ep" and not protocol.full
    assert protocol.deviations == {key: [full[key], value] for key, value in changes.items()}
    body = path_of(f"ablation/{name}").read_text()
    assert len([line for line in body.splitlines() if not line.startswith("#")]) <= 11


@pytest.mark.parametrize("name", ROWS)
def test_an_ablation_row_learns_with_the_heads_that_it_says(name):
    """Built at a tiny size: a loss that a row turns off has no head, and its mask token is not trained."""
    method = Intertwined(recipe(f"ablation/{name}", *last([*TINY, "positions.grid=9"])))
    off = {key.split(".")[1] for key, value in ROWS[name].items() if key.startswith("losses.") and value == 0}
    assert set(method.student) == {"backbone", "image", "content", "position"} - off
    backbone = method.student["backbone"]
    assert backbone.mask_token.requires_grad == ("content" not in off)
    assert backbone.pos_mask_token.requires_grad == ("position" not in off)
    assert backbone.model_kwargs["pos_encoding"] == ROWS[name].get("positions.encoding", "field")


def test_the_rows_are_those_of_the_paper():
    """Fourteen rows are printed; five of them are the full method. Another row's comment holds its
    numbers."""
    printed = [row for row in published_rows() if row.table in ("3", "4a", "4b", "5a", "5b")]
    others = [row for row in printed if (row.box_ap, row.mask_ap) != (44.8, 39.8)]
    assert (len(printed), len(others)) == (14, 9)
    for row in others:
        holders = [
            name
            for name in ROWS
            if name.startswith(f"table{row.table}_")
            and f"{row.box_ap} / {row.mask_ap} AP" in comments(f"ablation/{name}")
        ]
        assert len(holders) == 1, row
    assert {path.stem for path in ABLATIONS.glob("*.yaml")} == set(ROWS)


def test_methods_are_named_apart():
    """Rows of a table are told apart by their method's name."""
    names = [recipe(f"ablation/{name}").run.name for name in ROWS] + [
        recipe(FULL).run.name,
        recipe("dinov2_vits16").run.name,
    ]
    names += [
        recipe(name).run.name
        for name in ("coco_vits16", "highres_vits16", "continue_vitb16", "intertwined_vits16_small")
    ]
    names += [recipe(name).run.name for name in ("intertwined_as_published", "dinov2_as_published")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["intertwined", "dinov2", "highres"])
def test_the_two_sizes_have_one_recipe(name):
    small, base = (flat(recipe(f"{name}_vit{size}16")) for size in "sb")
    differ = {key for key, value in small.items() if value != base[key]}
    assert (
        differ - {"run.init_from"} == {"run.output", "backbone.name"}
        and base["backbone.name"] == "vit_base_patch16"
    )


def test_both_parts_off_is_not_the_baseline():
    none, baseline = recipe("ablation/table3_none"), recipe("dinov2_vits16")
    assert run_protocol(baseline, IMAGENET_1K).full
    differ = {key for key in differences(none, baseline) if not key.startswith("run.")}
    assert differ == {"recipe", "positions.grid", "positions.interpolation"}


@pytest.mark.parametrize("name", ["intertwined", "dinov2"])
def test_dinov2s_running_values(name):
    """Two settings, of each recipe; and the neighbors of KoLeo by GPUs, or by parts of a batch on one."""
    config, ours = recipe(f"{name}_as_published"), recipe(f"{name}-100ep")
    blur, scope = [(1.0, 0.1, 0.5), (0.0, 0.9, 0.5)], ["global", "local"]
    changes = {"color.blur_p": [list(values) for values in blur], "losses.koleo_scope": scope}
    assert run_protocol(config, IMAGENET_1K).deviations == changes
    assert config.recipe == ours.recipe == f"{name}-100ep" and not differences(
        ours, config
    ).keys() - changes.keys() - {
        "run.name",
        "run.output",
    }
    batch = config.optim.batch_size
    assert (batch // 4, batch // 8) == (128, 64)
    for words in ("512 / 4 GPUs = 128", "512 / 8 = 64", "4 of 128", "8 of 64"):
        assert words in comments("intertwined_as_published")


def test_one_gpu_follows_the_recipe_to_the_letter():
    config = recipe("intertwined_vits16_1gpu")
    assert run_protocol(config, IMAGENET_1K).full
    assert config.optim.batch_size % config.step.accumulate == 0 and config.optim.batch_size == 512
    same = flat(recipe(FULL))
    differ = {key for key, value in flat(config).items() if value != same[key]}
    assert differ == {"run.output", "data.workers", "step.accumulate"}


def test_how_a_run_computes_is_no_departure():
    how = [
        "step.accumulate=4",
        "step.compile=true",
        "step.parallel=fsdp2",
        "step.loss_rows=0",
        "step.checkpointing=full",
    ]
    where = [
        "data.path=cpu",
        "data.source=tar",
        "data.max_side_px=512",
        "run.precision=bf16",
        "backbone.attention=sdpa",
    ]
    where += ["probes.every=5", "log.every=1", "run.seed=3"]
    assert run_protocol(recipe(FULL, *how, *where), IMAGENET_1K).full


@pytest.mark.parametrize(
    "override, deviation",
    [
        ("backbone.name=vit_tiny_patch16", ["vit_small_patch16 or vit_base_patch16", "vit_tiny_patch16"]),
        (
            "backbone.name=vit_small_patch16_reg4",
            ["vit_small_patch16 or vit_base_patch16", "vit_small_patch16_reg4"],
        ),
        ("backbone.n_registers=4", [0, 4]),
        ("backbone.weights=some/where/dino.pth", ["from scratch", "dino.pth"]),
        ("run.init_from=runs/earlier", ["from scratch", "earlier"]),
        ("data.max_side_px=256", [0, 256]),
        ("losses.centering=sinkhorn_knopp", ["softmax_center", "sinkhorn_knopp"]),
        ("optim.batch_size=256", [512, 256]),
    ],
)
def test_what_makes_another_recipe_is_said(override, deviation):
    for name in (FULL, "dinov2_vits16"):
        assert run_protocol(recipe(name, override), IMAGENET_1K).deviations == {
            override.partition("=")[0]: deviation
        }


def test_the_small_batch_keeps_its_averages_by_image():
    config, full = recipe("intertwined_vits16_small"), recipe(FULL)
    share = config.optim.batch_size / full.optim.batch_size
    assert share == 1 / 8
    assert config.optim.teacher_momentum == round(0.992**share, 6) == 0.998996
    assert config.losses.center_momentum == round(0.9**share, 6) == 0.986916
    assert iterations(config, IMAGENET_1K) == 20_018 and config.optim.epochs * 20_018 == 2_001_800
    deviations = run_protocol(config, IMAGENET_1K).deviations
    assert set(deviations) == {"optim.batch_size", "optim.teacher_momentum", "losses.center_momentum"}
    for number in ("20,018", "2,001,800", "0.998996", "0.986916", "5.00e-4", "1.41e-3", "1.77e-4"):
        assert number in comments("intertwined_vits16_small")


def test_the_lr_rule_is_safe_at_small_batches():
    """The square root: a quarter of the batch halves the lr. So lr / sqrt(batch) is the same at every
    batch size."""
    config = load_config().optim
    lr = {batch: scaled_lr(config.base_lr, batch, config.lr_rule) for batch in (8, 64, 256, 512, 1024, 4096)}
    assert [f"{lr[batch]:.2e}" for batch in (8, 64, 512, 1024)] == [
        "1.77e-04",
        "5.00e-04",
        "1.41e-03",
        "2.00e-03",
    ]
    assert all(abs(value / batch**0.5 - 2e-3 / 32) < 1e-12 for batch, value in lr.items())


def test_coco_is_as_long_as_imagenet():
    config = recipe("coco_vits16")
    n_images = 118_287 + 123_403
    epoch_iters = iterations(config, n_images)
    assert n_images == 241_690 and epoch_iters == 472
    total, imagenet = config.optim.epochs * epoch_iters, 250_200
    assert total == 250_160 and abs(total - imagenet) < epoch_iters
    assert (
        config.optim.warmup_epochs * epoch_iters == 25_016
        and config.optim.freeze_last_layer_epochs * epoch_iters == 2_360
    )
    assert round(effective(config, config.optim.epochs)) == 1_839
    for number in ("118,287", "123,403", "241,690", "250,160", "1,839", "25,016", "2,360"):
        assert number in comments("coco_vits16")
    assert (
        set(config.data.split.split("+")) == {"train2017", "unlabeled2017"} and config.data.source == "coco"
    )
    deviations = run_protocol(config, n_images).deviations
    assert set(deviations) == {
        "data.n_images",
        "optim.epochs",
        "optim.warmup_epochs",
        "optim.freeze_last_layer_epochs",
    }


@pytest.mark.parametrize("size", ["s", "b"])
def test_the_high_resolution_stage(size):
    config, first = recipe(f"highres_vit{size}16"), recipe(f"intertwined_vit{size}16")
    assert config.run.init_from == first.run.output and config.backbone.name == first.backbone.name
    assert (
        config.crops.global_px == 2 * first.crops.global_px
        and config.crops.local_px == 2 * first.crops.local_px
    )
    assert config.data.max_side_px == 2 * DEVICE_SIDE_PX
    assert config.optim.epochs * config.optim.epoch_iters == 10_000
    epochs = 10_000 * config.optim.batch_size / IMAGENET_1K
    assert round(effective(config, 1), 2) == 13.88 and round(effective(config, epochs), 1) == 55.5
    for number in ("13.88", "10,000", "55.5"):
        assert number in comments(f"highres_vit{size}16")
    changed = {
        "crops.global_px",
        "crops.local_px",
        "optim.base_lr",
        "optim.epoch_iters",
        "optim.freeze_last_layer_epochs",
    }
    assert set(run_protocol(config, IMAGENET_1K).deviations) == changed | {"run.init_from"}


def test_continued_pretraining_starts_from_a_run_of_ours():
    config, first = recipe("continue_vitb16"), recipe("intertwined_vitb16")
    assert config.backbone.weights == f"{first.run.output}/backbone.safetensors"
    assert (
        config.optim.base_lr == first.optim.base_lr / 10
        and round(effective(config, config.optim.epochs)) == 69
    )
    deviations = run_protocol(config, IMAGENET_1K).deviations
    assert deviations["backbone.weights"] == ["from scratch", "backbone.safetensors"]


def test_every_config_is_read_and_writes_to_its_own_folder():
    configs = [path for path in sorted(CONFIGS.rglob("*.yaml")) if not path.name.startswith(("toy", "proof"))]
    paths = [*configs, *sorted(ABLATIONS.glob("*.yaml"))]
    folders = [
        load_config(path, START if path.name.startswith(POST_TRAINING) else []).run.output for path in paths
    ]
    assert len(set(folders)) == len(folders) >= 4 + 6 + len(ROWS) + 10
    for path, folder in zip(paths, folders):
        assert (
            folder.split("/")[-1] == path.stem and yaml.safe_load(path.read_text())["run"]["output"] == folder
        )
