"""``make test-slow``: dense post-training of a toy backbone, three seeds of three recipes, and what it
does to its features."""

import csv
import io
import json

import numpy as np
import pytest
from tool_fixture import load_tool

from pretrain.config import load_config
from pretrain.data.toy_sets import write_toy_data
from pretrain.train import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]

SEEDS = (0, 1, 2)
RECIPES = ("toy_paka", "toy_gram", "toy_paka_tied")
# The protocols' settings but for their sizes: images of 160 px, and what is held of them for all epochs.
REDUCED = ["linear.image_px=160", "linear.label_px=80", "linear.augment=false", "linear.batch_size=32", "in_context.image_px=160",
           "in_context.memory_size=20000", "in_context.passes=1", "in_context.augment=false"]  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The demo's images, and a backbone that was pre-trained on them."""
    folder = tmp_path_factory.mktemp("dense")
    write_toy_data(folder / "data", n_images=400, n_train=240, n_val=60, size_px=160, seed=0, overwrite=False)
    train(
        load_config(
            "configs/pretrain/toy.yaml",
            [f"data.root={folder / 'data/images'}", f"run.output={folder / 'start'}"],
        )
    )
    return folder


def evaluate(toy, weights, output, seed):
    """Linear and in-context segmentation of the toy's labeled images, by the tool: what its result says."""
    words = [
        "--weights",
        str(weights),
        "--data",
        str(toy / "data/ade/ADEChallengeData2016"),
        "--set",
        "folder",
    ]
    words += ["--tasks", "linear", "in_context", "--output", str(output), "--seed", str(seed), *REDUCED]
    load_tool("evaluate dense").main(words)
    return json.loads((output / "result.json").read_text())


def test_dense_post_training_of_a_toy_backbone(toy, capsys):
    """PaKA, Gram anchoring on the same images and crops, and PaKA with crop-tied positions, three seeds
    each: the loss falls in every run, every run changes the features, and the table holds mean and
    standard deviation of what came out, better or worse."""
    found = {
        "start": [
            evaluate(toy, toy / "start/backbone.safetensors", toy / f"out/start_{seed}", seed)
            for seed in SEEDS
        ]
    }
    for recipe in RECIPES:
        found[recipe] = []
        for seed in SEEDS:
            run = toy / f"{recipe}_{seed}"
            words = [
                f"backbone.weights={toy / 'start/backbone.safetensors'}",
                f"data.root={toy / 'data/images'}",
            ]
            train(
                load_config(
                    f"configs/pretrain/{recipe}.yaml", [*words, f"run.output={run}", f"run.seed={seed}"]
                )
            )
            losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:3]), f"{recipe}, seed {seed}: {losses}"
            found[recipe].append(
                evaluate(toy, run / "backbone.safetensors", toy / f"out/{recipe}_{seed}", seed)
            )

    for recipe in RECIPES:
        for seed in SEEDS:
            assert (
                found[recipe][seed]["metrics"]["linear_miou"]
                != found["start"][seed]["metrics"]["linear_miou"]
            )
    load_tool("table").main([str(toy / "out"), "--format", "csv"])
    table = capsys.readouterr().out
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(table[table.index("source,") :]))}
    assert len(rows) == 1 + len(RECIPES)
    for results in found.values():
        row = rows[results[0]["method"]]
        values = [result["metrics"]["linear_miou"] for result in results]
        assert float(row["linear_miou"]) == pytest.approx(np.mean(values), abs=1e-3)
        assert float(row["linear_miou_std"]) == pytest.approx(np.std(values, ddof=1), abs=1e-3)
    load_tool("table").main([str(toy / "out"), "--format", "md"])
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
