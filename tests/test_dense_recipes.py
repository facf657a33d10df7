"""The recipes of post-training: the configs of PaKA and Gram anchoring follow theirs, and deviations are
said."""

import pytest
from recipe_fixture import CONFIGS, comments, effective, recipe

from pretrain.config import load_config, run_protocol
from pretrain.settings import differences, flat

COCO_TRAIN, IMAGENET_1K = 118_287, 1_281_167  # images

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.name.startswith(("paka", "gram")))
START = ["backbone.weights=start.pth"]


@pytest.mark.parametrize("name", NAMES)
def test_a_post_training_follows_its_recipe(name):
    """Any patch size and size of network, on COCO's train2017 and from the weights that are given."""
    config = recipe(name, *START)
    protocol = run_protocol(config, COCO_TRAIN)
    names = {
        "paka": "paka-25ep",
        "gram": "gram-25ep",
        "paka_tied_vits16": "paka-tied-25ep",
        "gram_whole_vits16": "gram-whole-25ep",
    }
    assert protocol.full and protocol.name == names.get(name, names[name[:4]])
    assert config.run.export_network == "student" and config.optim.batch_size == (
        16 if "vitb" in name else 64
    )
    assert config.crops.global_px // config.backbone.patch_size == (37 if "14" in name else 14)
    said = comments("paka-25ep") + comments(name)
    assert f"{round(effective(config, config.optim.epochs), 1)}" in said or name == "gram_whole_vits16"
    if "reg" in name:
        assert config.backbone.name.endswith("_reg4")


def test_what_makes_another_post_training_is_said():
    changes = [
        "optim.epochs=5",
        "optim.head_lr_factor=1.0",
        "alignment.region_grid=5",
        "run.init_from=runs/earlier",
    ]
    of_the_file = ["positions.grid=9", "backbone.depth=3"]  # no part of the recipe
    deviations = run_protocol(recipe("paka_vits16", *START, *changes, *of_the_file), IMAGENET_1K).deviations
    assert deviations == {
        "optim.epochs": [25, 5],
        "optim.head_lr_factor": [10.0, 1.0],
        "alignment.region_grid": [7, 5],
        "run.init_from": ["from backbone.weights", "earlier"],
        "data.n_images": [COCO_TRAIN, IMAGENET_1K],
    }
    assert COCO_TRAIN == 118_287 and COCO_TRAIN // 64 == 1_848 and COCO_TRAIN // 16 == 7_392
    tiny = run_protocol(recipe("paka", *START, "backbone.name=vit_tiny_patch16"), COCO_TRAIN)
    assert set(tiny.deviations) == {"backbone.name"}


def test_gram_anchoring_and_paka_are_two_configs_of_few_keys():
    """The comparison that PaKA's reviewers asked for: the same weights, images, crops and regions."""
    paka, gram, whole = (
        recipe(name, *START)
        for name in ("paka_dinov2reg_vits16", "gram_dinov2reg_vits16", "gram_whole_vits16")
    )
    named = {"recipe", "run.name", "run.output"}
    assert set(differences(paka, gram)) == named | {
        "alignment.loss",
        "alignment.head",
        "optim.teacher_momentum",
    }
    differ = set(differences(gram, whole))
    regions = {"alignment.region_grid", "alignment.region_samples"}
    assert differ == named | regions | {"crops.n_local", "crops.local_px", "crops.local_rule"}


@pytest.mark.parametrize(
    "name, label", [("toy_paka", "paka-25ep"), ("toy_paka_tied", "paka-tied-25ep"), ("toy_gram", "gram-25ep")]
)
def test_toys_say_that_they_are_scaled_down_and_fit_the_demos_backbone(name, label):
    config, demo = recipe(name, *START), load_config(CONFIGS / "toy.yaml")
    assert run_protocol(config, 300).label.startswith(f"{label}, scaled down")
    for key in (
        "backbone.name",
        "backbone.depth",
        "crops.global_px",
        "crops.local_px",
        "heads.hidden_dim",
        "heads.bottleneck_dim",
    ):
        assert flat(config)[key] == flat(demo)[key]
    if name == "toy_paka_tied":
        assert config.positions.grid == demo.positions.grid


def test_the_configs_and_the_recipe_are_loaded_without_a_warning(recwarn):
    for name in NAMES:
        recipe(name, *START)
    assert not recwarn.list
