"""Detectron2 runs that are interrupted and gone on with, and runs of several processes: as if there had
been one. Skipped where it is not installed."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip(
    "detectron2", reason="Detectron2 is not installed (it is optional: see its INSTALL guide)"
)

from backbone_fixture import ROTARY
from coco_fixture import CATEGORIES, annotation_file, edit, write_coco
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from detectron2_fixture import ROOT, TOY, assert_equal, metrics_lines, save_pretrained, toy_run

from det_plugin.detectron2_engine import train as engine
from det_plugin.detectron2_engine.saved_config import classes_in
from det_plugin.detectron2_engine.train import evaluate_folder, train
from det_plugin.detectron2_engine.trainer import AccumulatingTrainer
from det_plugin.predict import load_detector
from det_plugin.protocol import deviations, with_overrides
from pretrain import distributed
from pretrain.cli import REQUEUE_CODE
from pretrain.errors import Interrupted, UserError
from pretrain.results import read_result, renamed

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_pretrained(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, coco, weights):
    """A run that nothing interrupted: every part of an iteration draws random numbers, and the rate is
    high enough to matter."""
    run = toy_run(
        tmp_path_factory.mktemp("whole") / "run", coco, weights, drop_path=0.5, lr=2e-3, warmup_iters=1
    )
    train(run)
    return run


def copied(run, folder, last=None):
    """The run in another folder; with ``last``, as if it had been killed when that checkpoint was its
    last."""
    shutil.copytree(run.output, folder)
    if last is not None:
        for file in folder.glob("model_*.pth"):
            if file.name > last:
                file.unlink()
        (folder / "last_checkpoint").write_text(last)
        (folder / "result.json").unlink()
    return replace(run, output=folder)


def final(run):
    state = torch.load(run.output / "model_final.pth", weights_only=True)
    state["trainer"].pop("wall_time_s")
    return state


def assert_same_end(run, whole):
    assert_equal(final(run), final(whole))
    assert metrics_lines(run.output) == metrics_lines(whole.output)
    assert read_result(run.output).metrics == read_result(whole.output).metrics


@pytest.mark.parametrize("workers, lost_line", [(0, False), (2, True)])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, whole, workers, lost_line):
    run = replace(copied(whole, tmp_path / "run", "model_0000001.pth"), workers=workers)
    log = run.output / "metrics.jsonl"
    if lost_line:  # killed in the evaluation that the checkpoint came before
        log.write_text(log.read_text().splitlines(keepends=True)[0])
    train(run, resume=True)
    assert_same_end(run, whole)
    assert len(metrics_lines(run.output)) == 5 and "box_ap" in metrics_lines(run.output)[1]


def test_a_rotary_run_ends_as_if_it_had_not_been_killed(tmp_path, coco):
    whole = replace(toy_run(tmp_path / "whole", coco, None, drop_path=0.5), model_kwargs=ROTARY)
    train(whole)
    run = copied(whole, tmp_path / "run", "model_0000001.pth")
    train(run, resume=True)
    assert_same_end(run, whole)
    (found,) = load_detector(run.output, device="cpu").detect([np.zeros((70, 90, 3), np.uint8)])
    assert {item["category_id"] for item in found} <= CATEGORIES.keys()


def test_other_data_are_told_and_gone_on_over_when_asked(tmp_path, coco, whole, capsys):
    run = copied(whole, tmp_path / "run", "model_0000001.pth")
    run = replace(run, data=Path(shutil.copytree(coco, tmp_path / "own")))
    edit(annotation_file(run.data, "train"), lambda content: content["annotations"][0].update(area=1))
    with pytest.raises(UserError, match=r"^output: .*\(train: other annotations\); .*--data-changed"):
        train(run, resume=True)
    train(run, resume=True, data_changed=True)
    assert "over other data (train: other annotations)" in capsys.readouterr().err
    told = read_result(run.output).protocol.deviations["data"]
    assert told == ["the same to the end", "train: other annotations"]
    assert "data" not in read_result(whole.output).protocol.deviations
    with pytest.raises(UserError, match="train: other annotations"):
        train(replace(run, data=coco))
    before = copied(whole, tmp_path / "before", "model_0000001.pth")
    (before.output / "data.json").unlink()
    train(before, resume=True)
    assert "at most the number of images is compared" in capsys.readouterr().err
    assert_same_end(before, whole)


def test_a_signal_saves_and_the_run_goes_on(tmp_path, coco, whole, monkeypatch):
    run, step = replace(whole, output=tmp_path / "run"), AccumulatingTrainer.run_step

    def signalled(trainer):
        step(trainer)
        if trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(AccumulatingTrainer, "run_step", signalled)
        with pytest.raises(Interrupted, match="SIGUSR1; saved at iteration 3"):
            train(run)
    last = run.output / "model_0000002.pth"
    assert (run.output / "last_checkpoint").read_text() == last.name and not (
        run.output / "result.json"
    ).exists()
    state = torch.load(last, weights_only=True)
    assert state["trainer"]["wall_time_s"] > 0
    state["trainer"]["wall_time_s"] = 1000.0
    torch.save(state, last)
    train(run, resume=True)
    assert_same_end(run, whole)
    assert 1000 < read_result(run.output).wall_time_s < 1100


def test_patience_ends_a_run(tmp_path, coco, capsys, monkeypatch):
    def judged(scores):
        found = iter(scores)
        monkeypatch.setattr(engine, "evaluate", lambda *_: {"box_ap": next(found), "mask_ap": 1.0})

    run = toy_run(tmp_path, coco, None, max_iters=12, milestones=(11,), eval_every=2, patience=2)
    judged([5.0, 7.0, 7.0, 6.5])
    train(run)
    assert (
        "over after 8 iterations by patience=2; best: box AP 7.00 at iteration 4" in capsys.readouterr().out
    )
    result = read_result(tmp_path / "result.json")
    assert result.metrics["box_ap"] == 6.5 and result.protocol.deviations["patience"] == [0, 2]
    train(run, resume=True)  # it is over
    (tmp_path / "result.json").unlink()  # killed between the last evaluation and the result
    judged([6.5])
    train(run, resume=True)
    again = read_result(tmp_path / "result.json")
    assert (again.metrics, again.config_hash) == (result.metrics, result.config_hash)
    assert [line["box_ap"] for line in metrics_lines(tmp_path) if "box_ap" in line] == [5.0, 7.0, 7.0, 6.5]


def test_a_trial_is_two_steps(tmp_path, coco, monkeypatch):
    """With the gradients of one part beside another's activations."""
    run = replace(toy_run(tmp_path, coco, None, batch_size=6), accumulate=3)
    seen, whole = [], AccumulatingTrainer.run_step

    def step(self):
        assert self.accumulate == 2 and all(len(part) == 2 for part in self.data_loader)
        whole(self)
        seen.append(self.terms)

    monkeypatch.setattr(AccumulatingTrainer, "run_step", step)
    engine._try(run, "cpu")
    assert len(seen) == 2 and all("loss_mask" in terms for terms in seen)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, whole, capsys):
    run = copied(whole, tmp_path / "run", "model_0000003.pth")
    for name in ("model_0000003.pth", "model_0000001.pth"):
        file = run.output / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        if name == "model_0000003.pth":
            resumed = copied(run, tmp_path / "resumed")
            train(resumed, resume=True)
            assert f"{resumed.output / name} is no whole checkpoint" in capsys.readouterr().err
            assert_same_end(resumed, whole)
    with pytest.raises(
        UserError, match=r"no whole checkpoint to go on from; the last is .*model_0000003\.pth"
    ):
        train(run, resume=True)


def test_a_run_saved_under_old_names_goes_on_and_is_evaluated(tmp_path, whole):
    """As commit 2c21771 left its folders."""
    old = {new: old for old, new in renamed.DETECTION.items()}
    part, done = copied(whole, tmp_path / "part", "model_0000001.pth"), copied(whole, tmp_path / "done")
    for file in (
        folder.output / name for folder in (part, done) for name in ("config.yaml", "config_resolved.yaml")
    ):
        cfg = LazyConfig.load(str(file))
        evaluator = cfg.dataloader.evaluator
        evaluator.overrides = {old.get(key, key): value for key, value in evaluator.overrides.items()}
        if origin := evaluator.get("origin"):
            origin.update(flags=origin.pop("model_kwargs"), given_flags=origin.pop("given_kwargs"))
        LazyConfig.save(cfg, str(file))
    assert "iterations_it" in file.read_text() and "given_flags" in file.read_text()
    assert load_detector(done.output, "cpu").protocol == whole.protocol
    (done.output / "result.json").unlink()
    evaluate_folder(done.output, done.data, device="cpu", workers=0)
    before, now = read_result(whole.output), read_result(done.output)
    assert (now.metrics, now.protocol, now.config_hash) == (
        before.metrics,
        before.protocol,
        before.config_hash,
    )
    with pytest.raises(UserError, match="other settings .*evaluator.overrides.lr 0.002 -> 0.003"):
        train(replace(part, protocol=with_overrides(whole.protocol, {"lr": 3e-3})), resume=True)
    train(part, resume=True)
    assert_same_end(part, whole)


def test_the_run_folder_names_the_classes(whole):
    assert classes_in(LazyConfig.load(str(whole.output / "config_resolved.yaml"))) == CATEGORIES
    with pytest.raises(UserError, match="classes is missing"):
        classes_in(LazyConfig.load(str(TOY)))


def test_other_categories_are_not_evaluated(tmp_path, whole):
    data = write_coco(tmp_path / "coco")
    annotation_file(data, "val").write_text(
        annotation_file(data, "val").read_text().replace('"disc"', '"plate"')
    )
    run = replace(copied(whole, tmp_path / "run"), data=data)
    before = (run.output / "config.yaml").read_text()
    with pytest.raises(UserError, match="other categories than those that .*run was trained on"):
        evaluate_folder(run.output, run.data, device="cpu", workers=0)
    assert (run.output / "config.yaml").read_text() == before
    with pytest.raises(UserError, match="different categories"):
        train(replace(run, output=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_an_unreadable_image_ends_the_tool_in_one_line(tmp_path, whole):
    data = write_coco(tmp_path / "coco")
    broken = data / "val2017" / "000000001001.png"
    broken.write_bytes(broken.read_bytes()[:-30])  # its header is whole: met in the evaluation, by a worker
    process = start(replace(whole, data=data, output=tmp_path / "run", workers=1))
    said = process.communicate(timeout=120)[0]
    last = said.splitlines()[-1]
    assert process.returncode == 2 and last.startswith("error: data: 1 of 4 images cannot be read"), last
    assert str(broken) in last
    assert "Traceback" not in said


def test_batches_depend_on_seed_and_position_alone(coco, monkeypatch):
    cfg = LazyConfig.load(str(TOY))
    cfg.dataloader.root, cfg.model.roi_heads.num_classes, cfg.dataloader.train.total_batch_size = (
        str(coco),
        3,
        4,
    )

    def drawn(n_parts, accumulate=1, start_iter=0, **changes):
        """Images and torch's next random number, part by part."""
        with EventStorage(start_iter):
            cfg.dataloader.train.update(changes)
            parts = itertools.islice(instantiate(cfg.dataloader.train).parts(accumulate), n_parts)
            return [([sample["image"] for sample in part], torch.rand(()).item()) for part in parts]

    whole = drawn(6, accumulate=2)
    assert len({number for _, number in whole}) == 6
    assert_equal(drawn(2, accumulate=2, start_iter=2, num_workers=2), whole[4:])
    assert_equal(
        [image for images, _ in drawn(3) for image in images],
        [image for images, _ in whole for image in images],
    )
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):  # two ranks are two parts
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert_equal(drawn(3), whole[rank::2])
    with pytest.raises(UserError, match="batch_size=4 cannot be shared by 2 processes x accumulate=3"):
        drawn(1, accumulate=3)
    with pytest.raises(UserError, match="train.seed: -1"):
        drawn(1, seed=-1)


def words_of(run):
    """The command line of a run."""
    fields = {key: value for key, (_, value) in deviations(run.protocol, run.backbone).items()}
    fields["keep_empty"] = run.protocol.keep_empty  # the command's own choice would be another one
    words = [f"{k}={','.join(map(str, v)) if isinstance(v, (tuple, list)) else v}" for k, v in fields.items()]
    paths = [
        "--weights",
        run.weights,
        "--data",
        run.data,
        "--output",
        run.output,
        "--seed",
        run.seed,
        "--workers",
        run.workers,
    ]
    return list(
        map(
            str, ["--engine", "detectron2", "--device", "cpu", "--accumulate", run.accumulate, *paths, *words]
        )
    )


def start(run, *launcher, **options):
    """tools/train_det.py in a process of its own."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        *launcher,
        str(ROOT / "tools" / "train_det.py"),
        *words_of(run),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams, **options)


def test_two_processes_are_one(tmp_path, whole):
    run = replace(whole, output=tmp_path / "run", accumulate=1)
    process = start(run, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    assert said.count("result: ") == 1 and read_result(run.output).hardware["processes"] == 2
    ours, alone = metrics_lines(run.output), metrics_lines(whole.output)
    assert [line["iteration"] for line in ours] == [line["iteration"] for line in alone]
    assert ours[0] == pytest.approx(alone[0], rel=1e-5)
    assert ours[3]["loss"] == pytest.approx(alone[3]["loss"], rel=1e-2)
    assert not list(run.output.glob("log.txt.*")) and len(list(run.output.glob("tensorboard/*"))) == 1


def test_the_tool_ends_a_stopped_run_with_the_code_for_requeuing(tmp_path, whole):
    recipe = with_overrides(whole.protocol, dict(max_iters=2000, eval_every=2000))
    run = replace(whole, output=tmp_path / "run", protocol=recipe)
    process, log = start(replace(run, workers=1), start_new_session=True), run.output / "metrics.jsonl"
    for _ in range(600):
        if log.is_file() and log.read_text():
            break
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.2)
    os.killpg(
        process.pid, signal.SIGTERM
    )  # as schedulers do it; the workers must not end before the training
    said = process.communicate(timeout=120)[0]
    stopped, resumed = said.splitlines()[-2:]
    assert process.returncode == REQUEUE_CODE and resumed.startswith("go on with: posfield detect "), said
    assert stopped.startswith("stopped: SIGTERM; saved at iteration "), said
    it = int(stopped.split()[-1])
    assert (
        run.output / "last_checkpoint"
    ).read_text() == f"model_{it - 1:07d}.pth" and "Traceback" not in said
