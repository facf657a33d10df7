"""Dense evaluation as a probe of a running training: the evaluators' numbers, no trace, equal after a
resumption; bad sets told."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from label_set_fixture import write_folder, write_voc
from photos import TINY, last, write_photos

from pretrain.build import build_backbone
from pretrain.config import load_config
from pretrain.data.datasets import open_label_set
from pretrain.errors import UserError
from pretrain.evaluation.clustering import ClusteringSettings, clustering
from pretrain.evaluation.features import Features, frozen
from pretrain.evaluation.in_context import InContextSettings, in_context
from pretrain.evaluation.linear_segmentation import LinearSettings, linear
from pretrain.evaluation.probes import Probes
from pretrain.results.schema import read_result
from pretrain.train import train

ALL = "probes.dense_tasks=linear in_context clustering"
NAMES = ["linear_miou", "in_context_miou", "in_context_hungarian_miou", "clustering_miou"]


@pytest.fixture
def sets(tmp_path):
    write_folder(tmp_path / "toy", 4, 3)
    write_photos(tmp_path / "photos")
    return tmp_path


def config_of(folder, *extra):
    paths = [f"data.root={folder / 'photos'}", f"probes.dense_root={folder / 'toy'}"]
    return load_config(None, last([*TINY, *paths, "probes.image_px=32", "probes.every=2", *extra]))


def probes_of(config):
    return Probes(config.probes, config.data, config.backbone.patch_size)


def test_the_probe_is_the_evaluators_at_small_settings(sets):
    backbone = build_backbone("vit_tiny_patch16", depth=1).eval()
    found = probes_of(config_of(sets, ALL, "probes.max_images=2")).run(backbone, torch.device("cpu"))
    parts = [open_label_set(sets / "toy", part).first(2) for part in ("train", "val")]
    with frozen(backbone):
        features = Features(backbone, torch.device("cpu"), nullcontext())
        of_linear = LinearSettings(image_px=32, augment=False, batch_size=32, epochs=5)
        expected = linear(features, *parts, of_linear).metrics
        expected |= in_context(
            features, *parts, InContextSettings(image_px=32, augment=False, passes=1, memory_size=50_000)
        ).metrics
        few = ClusteringSettings(image_px=32, overclusters=(), seeds=1, restarts=1)
        expected |= clustering(features, *parts, few).metrics
    assert found == {f"probe/dense_{name}": expected[name] for name in NAMES}


def test_the_probe_leaves_no_trace_and_repeats_itself(sets):
    probes = probes_of(config_of(sets, ALL))
    backbone = build_backbone("vit_tiny_patch16", depth=1, drop_path=0.5).train()
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = probes.run(backbone, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert all(part.training for part in backbone.modules()) and all(
        p.grad is None for p in backbone.parameters()
    )
    torch.manual_seed(2)
    np.random.seed(2)
    assert json.dumps(probes.run(backbone, torch.device("cpu"))) == json.dumps(first)


@pytest.mark.filterwarnings("error:config. the other probes")
def test_a_run_logs_the_probe_and_a_resumed_one_the_same(sets):
    def run(name):
        return config_of(sets, ALL, f"run.output={sets / name}", "optim.epochs=2")

    train(run("straight"))
    train(run("parts"), stop_after=3)
    train(run("parts"), resume="auto")
    logs = [(sets / name / "probes.jsonl").read_text() for name in ("straight", "parts")]
    assert logs[0] == logs[1]
    probed = [json.loads(line) for line in logs[0].splitlines()]
    assert [line["iteration"] for line in probed] == [1, 3] and {
        f"probe/dense_{name}" for name in NAMES
    } <= set(probed[0])
    metrics = read_result(sets / "parts").metrics
    assert metrics["probe/dense_linear_miou"] == probed[-1]["probe/dense_linear_miou"]


def test_the_kind_of_a_set_may_be_named(sets):
    write_voc(sets / "voc", 2, 2)
    probes = probes_of(config_of(sets, f"probes.dense_root={sets / 'voc'}", "probes.dense_set=voc2012"))
    assert probes.probes[0].train.name == "voc2012" and len(probes.probes[0].val) == 2
    assert list(probes.probes[0].settings) == ["in_context"]  # by default, for it trains nothing


@pytest.mark.parametrize(
    ("spoil", "extra", "said"),
    [
        (None, ["probes.dense_root=/nowhere"], r"probes\.dense_root: no folder /nowhere"),
        (None, ["probes.dense_set=ade20k"], r"probes\.dense_root: .*toy"),
        (None, ["probes.dense_set=cityscape"], r"probes\.dense_root: kind 'cityscape'"),
        (None, ["probes.dense_tasks=linear knn"], r"probes\.dense_tasks: 'knn' is none of linear, in_context, clustering"),
        (None, ["probes.dense_tasks="], r"probes\.dense_tasks is empty"),
        (None, ["probes.image_px=40"], r"probes\.image_px=40 is no multiple"),
        (lambda f: next(f.glob("toy/images/val/*")).write_bytes(b"no"), [], r"probes\.dense_root: .*/val/.* cannot be read"),
        (lambda f: (f / "toy/classes.txt").write_text("a\nb\nc\n"), [], r"probes\.dense_root: .*names 3 labels, .* holds 3"),
        (None, ["probes.void=0,x"], r"probes\.dense_root: --void: 'x' is no value"),
    ],
)  # fmt: skip
def test_bad_sets_are_told_at_the_start(sets, spoil, extra, said):
    if spoil:
        spoil(sets)
    with pytest.raises(UserError, match=said) as error:
        probes_of(config_of(sets, *extra))
    assert "\n" not in str(error.value)


def test_keys_without_a_period_are_a_warning(sets):
    with pytest.warns(UserWarning, match=r"probes\.every is 0"):
        assert len(probes_of(config_of(sets, "probes.every=0"))) == 0
