"""Configs that runs of commit 2c21771 saved load, equal today's of the same name, and keep their recipe."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from recipe_fixture import recipe

from pretrain.config import from_saved, load_config, run_protocol
from pretrain.errors import UserError
from pretrain.results.renamed import PRETRAINING, deviation
from pretrain.settings import differences

# Every config of configs/pretrain at that commit: what it changes in the default.yaml of then; the recipe and
# the deviations that the result of its run named.
OLD = json.loads(Path(__file__).with_name("old_configs.json").read_text())
START = "start.pth"  # of every post-training
IMAGES = {"intertwined": 1_281_167, "paka": 118_287}


def saved(name, **changes):
    """A run's config.yaml of that time, as plain values: the keys of all methods in one config."""
    values = copy.deepcopy(OLD["default"])
    for key, value in (OLD["configs"][name]["changes"] | changes).items():
        group, option = key.split(".")
        assert option in values[group]
        values[group][option] = value
    return values


@pytest.mark.parametrize("name", OLD["configs"])
@pytest.mark.filterwarnings("ignore:config. positions.grid")
def test_a_saved_config_equals_todays_of_its_name(name, tmp_path):
    """As a checkpoint holds it, and as the YAML file beside the logs."""
    old, values = OLD["configs"][name], saved(name)
    config = from_saved(values)
    now = recipe(name, *([f"backbone.weights={START}"] if config.method == "paka" else []))
    assert differences(config, now) == {} and config == now
    protocol = run_protocol(config, IMAGES[config.method])
    assert protocol.name == config.recipe == old["recipe"]
    assert protocol.deviations == {deviation(key): pair for key, pair in old["deviations"].items()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert load_config(tmp_path / "config.yaml") == now
    changed = load_config(tmp_path / "config.yaml", ["optim.epochs=3", "run.leaves=student"])
    assert (
        set(differences(now, changed)) <= {"optim.epochs", "run.export_network"} and changed.optim.epochs == 3
    )


@pytest.mark.parametrize(
    "name, changes, recipe_of_then",
    [
        ("toy", {"positions.encoding": "standard", "positions.augment": False}, "intertwined-100ep"),
        (
            "toy_dinov2",
            {"losses.image": 2.0, "optim.epochs": 3, "crops.n_local": 1, "masks.content_share": 1.0},
            "dinov2-100ep",
        ),
        ("toy_dinov2", {"positions.interpolation": "bicubic"}, "intertwined-100ep"),
        ("paka", {"positions.encoding": "field"}, "paka-tied-25ep"),
        ("paka_tied_vits16", {"optim.epochs": 3, "dense.region_grid": 5}, "paka-tied-25ep"),
        ("gram_dinov2reg_vits16", {"crops.local_rule": "same"}, "gram-whole-25ep"),
        ("gram_whole_vits16", {"crops.local_rule": "inside", "optim.teacher_momentum": 0.9}, "gram-25ep"),
    ],
)
@pytest.mark.filterwarnings("ignore:config. ")
def test_recipes_are_told_apart_as_they_were(name, changes, recipe_of_then):
    """pretraining_protocol of that commit named these."""
    assert from_saved(saved(name, **changes)).recipe == recipe_of_then


def test_every_old_word_still_means_its_key():
    values = {
        "run.algorithm": ("dense", "paka"),
        "run.method": ("mine", "mine"),
        "run.leaves": ("student", "student"),
        "run.start_from": ("runs/first", "runs/first"),
        "colour.grey_p": ("0.25", 0.25),
        "colour.jitter_p": ("0.75", 0.75),
        "dense.region_grid": ("5", 5),
        "backbone.layerscale": ("0.5", 0.5),
        "optim.epoch_length_it": ("7", 7),
        "probes.period_it": ("8", 8),
        "log.period_it": ("9", 9),
        "log.checkpoint_period_it": ("11", 11),
        "log.pictures_period_it": ("12", 12),
    }
    config = load_config(
        None, [f"backbone.weights={START}", *(f"{key}={text}" for key, (text, _) in values.items())]
    )
    for key, (_, value) in values.items():
        held = config
        for name in deviation(key).split("."):
            held = getattr(held, name)
        assert held == value, key
    groups = {old: new for old, new in PRETRAINING.items() if "." not in old}
    assert groups == {"colour": "color", "dense": "alignment"}
    named = {old for old in PRETRAINING if old not in groups} - {
        "color.grey_p"
    }  # of colour, when that is color already
    assert named <= set(values)


def test_what_is_damaged_is_one_line():
    for values, told in (
        (None, "saved config: NoneType is no mapping of keys"),
        ([], "saved config: list is no mapping of keys"),
        (
            {**saved("toy"), "optim": 3},
            "config: optim (saved config) is a group of keys, not 3; set optim.KEY",
        ),
        (saved("toy") | {"nothing": {"a": 1}}, "config: unknown key 'nothing' (saved config); there are "),
        (
            {**saved("toy"), "run": {"algorithm": ["dense"]}},
            "config: method=['dense'] (saved config) should be the name of one",
        ),
        (
            saved("paka", **{"backbone.weights": ""}),
            "config: backbone.weights is empty, but a post-training starts from",
        ),
        (
            saved("toy", **{"optim.base_lr": float("nan")}),
            "config: optim.base_lr=nan should be a finite number (saved config)",
        ),
    ):
        with pytest.raises(UserError) as error:
            from_saved(values)
        assert str(error.value).startswith(told) and "\n" not in str(error.value)
