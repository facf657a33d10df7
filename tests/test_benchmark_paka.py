"""What `tools/benchmark.py paka` measures, at tiny sizes."""

import json
import pickle
from pathlib import Path

import pytest
from tool_fixture import load_tool

from pretrain.benchmark.paka import RECIPES, full_run, measure, words_of, write_start
from pretrain.benchmark.turns import Figures
from pretrain.config import load_config, run_protocol
from pretrain.errors import UserError
from pretrain.settings import as_dict
from pretrain.weights import read_checkpoint

TINY, SMALL = (
    "vit_tiny_patch16",
    ["backbone.depth=1", "heads.n_prototypes=64", "heads.hidden_dim=32", "heads.bottleneck_dim=16"],
)
CONFIGS = Path(__file__).parents[1] / "configs" / "pretrain"


@pytest.mark.parametrize(
    "name, file, patch_size",
    [
        ("paka", "paka.yaml", 16),
        ("paka", "paka_dinov2reg_vits14.yaml", 14),
        ("gram", "gram_dinov2reg_vits16.yaml", 16),
        ("dinov2", "dinov2_vits16.yaml", 16),
    ],
)
def test_contenders_are_the_recipes(name, file, patch_size):
    own = "backbone.weights=w"
    file_config = load_config(CONFIGS / file, [own] * (name != "dinov2"))
    backbone, batch_size = file_config.backbone.name, file_config.optim.batch_size
    config = load_config(
        RECIPES[name], [*words_of(backbone, patch_size, batch_size)[name], *([own] * (name != "dinov2"))]
    )
    one, two = as_dict(config), as_dict(file_config)
    groups = {"crops", "positions", "color", "masks", "losses", "alignment", "heads", "optim"} & one.keys()
    assert len(groups) >= 6 and one.keys() == two.keys()
    assert {group: one[group] for group in groups} == {group: two[group] for group in groups}
    n_images = 118_287 if name != "dinov2" else 1_281_167
    recipe = run_protocol(config, n_images)
    assert recipe.name.startswith(name) and not recipe.deviations


def test_baseline_with_patches_of_14_px_sees_crops_of_224_px():
    config = load_config(RECIPES["dinov2"], words_of("vit_small_patch16", 14, 8)["dinov2"])
    assert (config.crops.global_px, config.crops.local_px, config.positions.grid) == (224, 98, 16)


def test_the_start_is_the_network_that_the_baseline_trains(tmp_path):
    words = [*words_of(f"{TINY}_reg4", 14, 2)["dinov2"], *SMALL]
    model_kwargs = read_checkpoint(write_start(tmp_path / "b.safetensors", words)).model_kwargs
    assert {model_kwargs[key] for key in ("n_registers", "depth", "layerscale", "patch_size")} == {
        4,
        1,
        1e-5,
        14,
    }


def test_arithmetic_of_a_whole_run():
    """The paper's 14 hours are what 1.09 s a step at 64 images would take."""
    found = full_run({"paka": 14 * 3600 / 46_200}, 64)
    assert found["hours_full_run"] == {"paka": 14.0}
    assert (
        found["arithmetic"]["paka"]
        == "25 epochs * floor(118287 images / 64 images a step) = 46200 steps * 1.091 s = 14 h"
    )


def in_this_process(contenders, device, rounds, steps):
    """:func:`pretrain.benchmark.turns.in_turns` without the seconds that starting processes takes
    (test_benchmark_turns.py)."""
    assert device == "cpu" and steps == 1
    found = {}
    for name, contender in contenders.items():
        make, arguments = pickle.loads(pickle.dumps(contender))  # as it goes to a process
        make(*arguments)()
        found[name] = Figures(
            [{"dinov2": 4.0, "paka": 2.0, "gram": 1.0}[name]] * rounds, 100.0 if name == "dinov2" else 80.0
        )
    return found


def test_the_tool_leaves_the_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pretrain.benchmark.paka.in_turns", in_this_process)
    words = [
        "--backbone",
        TINY,
        "--batch",
        "1",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "f.json"),
        *SMALL,
    ]
    load_tool("benchmark").main(["paka", *words])
    found, shown = json.loads((tmp_path / "f.json").read_text()), capsys.readouterr().out
    for name, value in {
        "time_ratio": 0.5,
        "memory_ratio": 0.8,
        "gram_time_ratio": 0.25,
        "gram_memory_ratio": 0.8,
    }.items():
        assert found[name] == value and f"{name} {value}" in shown
    assert found["seconds"] == {"dinov2": 4.0, "paka": 2.0, "gram": 1.0}
    assert found["img_per_s"] == {"dinov2": 0.25, "paka": 0.5, "gram": 1.0}
    assert found["peak_mib"] == {"dinov2": 100.0, "paka": 80.0, "gram": 80.0}
    assert found["hours_full_run"] == {"paka": 1642.88, "gram": 821.44}  # 25 * 118287 steps of one image


def test_settings_that_do_not_fit():
    with pytest.raises(UserError, match=r"backbone\.dpeth"):
        measure(TINY, 1, 1, "cpu", overrides=["backbone.dpeth=1"])
