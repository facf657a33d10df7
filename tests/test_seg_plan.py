"""A fine-tuning on masks of one's own: its schedule, plan and progress, the best weights, going on from the folder alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tool_fixture import load_tool

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

from ade_fixture import write_ade
from seg_fixture import FLAGS, TINY

from pretrain.errors import UserError
from pretrain.run_lock import run_lock
from seg_plugin.data import recipe_for
from seg_plugin.hooks import PosfieldIoU
from seg_plugin.plan import schedule, whole_schedule
from seg_plugin.predict import load_segmenter
from seg_plugin.protocol import OWN, protocol, with_overrides
from seg_plugin.run import config, prepare
from seg_plugin.sweep import points, status

BASE = ["--backbone", "vit_tiny_patch16", "--device", "cpu", "--workers", "0"]
NUMBERS = [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in TINY.items()
           if key not in ("num_classes", "reduce_zero_label")]  # fmt: skip
NUMBERS += [f"backbone.{key}={value}" for key, value in FLAGS.items()]


def write_own(folder, n_train=6, n_val=3):
    """Images and masks as people have them: labels from 0."""
    root = write_ade(folder, n_train=n_train, n_val=n_val)
    (root / "annotations").rename(root / "masks")
    for name in ("images", "masks"):
        (root / name / "training").rename(root / name / "train")
        (root / name / "validation").rename(root / name / "val")
    for path in (root / "masks").rglob("*.png"):
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(labels == 0, 255, labels - 1).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_own(tmp_path_factory.mktemp("data") / "own")


def segment(*words):
    load_tool("segment").main([*map(str, words)])


def test_a_schedule_keeps_the_protocols_proportions():
    base = protocol()
    assert schedule(base, base.max_iters, {}) == {
        "max_iters": 160_000,
        "warmup_iters": 0,
        "val_every": 16_000,
    }
    assert schedule(base, 1000, {"warmup_iters": 5}) == {"max_iters": 1000, "val_every": 100}
    assert whole_schedule(base, {"max_iters": "1000"})["val_every"] == 100
    own = {"max_iters": "1000", "val_every": "7"}
    assert whole_schedule(base, own) == own and whole_schedule(base, {}) == {}
    assert with_overrides(base, schedule(base, 3, {})).val_every == 1


def test_epochs_count_the_training_images(data):
    recipe = recipe_for(data, None, {"epochs": "20", "batch_size": "4"})
    assert (recipe.name, recipe.max_iters, recipe.val_every, recipe.num_classes) == (OWN, 40, 4, 4)
    with pytest.raises(UserError, match="epochs=2 and max_iters=3 say it twice"):
        recipe_for(data, None, {"epochs": "2", "max_iters": "3"})
    with pytest.raises(UserError, match="epochs='soon' should be a number above 0"):
        recipe_for(data, None, {"epochs": "soon"})


def test_thousands_of_epochs_are_refused(data, tmp_path):
    with pytest.raises(
        UserError,
        match="160,000 iterations of 2 images are 53,333 epochs of 6 images; give epochs=100 .* or --yes",
    ):
        segment(*BASE, "--data", data, "--output", tmp_path / "run", *NUMBERS)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    segment(*BASE, "--data", data, "--output", folder, *NUMBERS, "epochs=4", "val_every=4", "lr=1e-3")
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_terminal_shows_the_plan_and_a_line_of_progress(data, tmp_path, capfd):
    segment(*BASE, "--data", data, "--output", tmp_path / "run", *NUMBERS, "epochs=4", "val_every=6")
    found = capfd.readouterr()
    said = (found.out + found.err).splitlines()
    (told,) = [line for line in said if line.startswith("plan: ")]
    assert (
        "6 images, 4 classes; batch 2: 3 iterations an epoch, 4 epochs, 12 iterations; validated every 6 on 3 images"
        in told
    )
    assert "estimate: " in found.err and "segmentation 12/12  loss " in found.err
    assert "iteration 6: mIoU " in found.err
    assert len(said) < 30, said  # mmengine's own begins with hundreds
    log = next((tmp_path / "run").glob("*/*.log")).read_text()
    assert "Config" in log and len(log.splitlines()) > 100


def test_a_folder_knows_how_it_was_started(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    max(run.glob("iter_*.pth"), key=lambda path: int(path.stem[5:])).unlink()
    segment("--resume", "--output", run)
    after = json.loads((run / "result.json").read_text())
    assert after["metrics"] == before["metrics"] and lines(run) == lines(finished)
    with pytest.raises(UserError, match="--resume: .* has its settings; leave out"):
        segment("--resume", "--output", run, "lr=1")
    with pytest.raises(UserError, match="--data: give the data set"):
        segment("--output", run)
    (run / "start.json").unlink()
    with pytest.raises(UserError, match="no start.json.*; give --data and the rest"):
        segment("--resume", "--output", run)


def test_the_best_weights_stay_beside_the_last(finished, capsys):
    scores = [(line["miou"], -line["iteration"]) for line in lines(finished) if "miou" in line]
    (best,) = finished.glob("best_mIoU_iter_*.pth")
    assert int(best.stem.rpartition("_")[2]) == -max(scores)[1] and len(scores) == 3
    own = torch.load(best, weights_only=True)["state_dict"]
    found = load_segmenter(finished, "cpu").model.state_dict()
    assert all(torch.equal(own[key], found[key]) for key in own)
    assert f"{best}: the best of the validations" in capsys.readouterr().err
    last = torch.load(finished / "iter_12.pth", weights_only=True)["state_dict"]
    found = load_segmenter(finished, "cpu", checkpoint="last").model.state_dict()
    assert all(torch.equal(last[key], found[key]) for key in last)


def test_patience_ends_a_run(data, tmp_path, capsys, monkeypatch):
    def judged(scores):
        found = iter(scores)

        def compute(self, results):
            return {"mIoU": next(found), "mAcc": 1.0, "aAcc": 1.0}

        monkeypatch.setattr(PosfieldIoU, "compute_metrics", compute)

    def result():
        return json.loads((tmp_path / "result.json").read_text())

    words = [*BASE, "--data", data, "--output", tmp_path, *NUMBERS, "max_iters=12", "val_every=2"]
    judged([5.0, 7.0, 7.0, 6.5])
    segment(*words, "patience=2")
    said = capsys.readouterr()
    assert "12 iterations; validated every 2 on 3 images, over after 2 without a better one" in said.err
    assert "over after 8 iterations by patience=2; best: mIoU 7.00 at 4" in said.out
    assert result()["metrics"]["miou"] == 6.5 and result()["protocol"]["deviations"]["patience"] == [0, 2]
    assert [path.name for path in tmp_path.glob("best_*.pth")] == ["best_mIoU_iter_4.pth"]
    whole = lines(tmp_path)
    assert whole[-1]["iteration"] == 8
    segment("--resume", "--output", tmp_path)  # it is over
    (tmp_path / "result.json").unlink()  # killed between the last validation and the result
    judged([6.5])
    segment("--resume", "--output", tmp_path)
    assert result()["metrics"]["miou"] == 6.5 and lines(tmp_path) == whole
    (tmp_path / "result.json").unlink()  # killed before
    (tmp_path / "iter_8.pth").unlink()
    judged([7.0, 6.5])
    segment("--resume", "--output", tmp_path)
    assert result()["metrics"]["miou"] == 6.5 and lines(tmp_path) == whole


def test_patience_is_no_part_of_runs_without_it(data, tmp_path):
    def hooks(**fields):
        run = prepare(data, output=tmp_path, backbone="vit_tiny_patch16", **fields)
        return config(run).custom_hooks

    (only,) = hooks()
    assert "patience" not in only.protocol
    assert [hook.type for hook in hooks(patience="3")] == ["PosfieldRunHook", "PatienceHook"]


def test_status_says_what_is_at_work_and_how_long_it_takes(finished, data, tmp_path):
    from seg_plugin.run import prepare

    how = dict(
        backbone="vit_tiny_patch16", device="cpu", batch_size="2", max_iters="12", lr_grid="1e-3", seeds="2"
    )
    run = prepare(data, output=tmp_path, **how, weight_decay_grid="1e-2,1e-4")
    done, stopped, working, _ = (point.output for point in points(run))
    for folder in (done, stopped, working):
        shutil.copytree(finished, folder)
    for folder in (stopped, working):
        (folder / "result.json").unlink()
        log = folder / "metrics.jsonl"
        log.write_text("".join(log.read_text().splitlines(True)[:-3]))
    with run_lock(working):
        import os

        pid = os.fork()  # the lock is of this process: another one looks
        if not pid:
            (tmp_path / "said").write_text(status(run))
            os._exit(0)
        os.waitpid(pid, 0)
    said = (tmp_path / "said").read_text().splitlines()
    miou = json.loads((finished / "result.json").read_text())["metrics"]["miou"]
    assert said[0].endswith(f"done  {miou:.2f}")
    assert "stopped at iteration " in said[1] and " of 12, mIoU " in said[1]
    assert "at work, iteration " in said[2] and said[2].endswith(" left")
    assert said[3].endswith("  -")
