"""Logs: lines that a resume cuts and continues, TensorBoard read back, W&B by a stand-in, speed and
progress by a clock of ours."""

import io
import json
import logging
import re
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain import log as log_module
from pretrain import metrics_log
from pretrain.errors import UserError
from pretrain.log import ProgressLine, in_columns, in_lines, in_words, log, warnings_into
from pretrain.metrics_log import MetricsLog, Speed, describe, peak_memory_gb

CPU = torch.device("cpu")
PICTURE = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    def write(log, iterations):
        for it in iterations:
            log.write("metrics", it, {"loss": 1 / (1 + it)})
            log.write("probes", it, {"probe/knn_top1": 10.0 * it})
        log.close()

    write(MetricsLog(tmp_path / "straight", 0, tensorboard=False), range(6))
    write(MetricsLog(tmp_path / "parts", 0, tensorboard=False), range(5))
    with open(tmp_path / "parts" / "probes.jsonl", "a") as file:
        file.write('{"iteration": 5, "pro')  # cut off
    write(MetricsLog(tmp_path / "parts", 3, tensorboard=False), range(3, 6))
    for name in ("metrics", "probes", "speed"):
        straight, parts = ((tmp_path / run / f"{name}.jsonl").read_bytes() for run in ("straight", "parts"))
        assert straight == parts
    lines = [json.loads(line) for line in (tmp_path / "parts" / "probes.jsonl").read_text().splitlines()]
    assert lines == [{"iteration": it, "probe/knn_top1": 10.0 * it} for it in range(6)]


def test_lines_are_on_the_disk_after_a_flush(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log.write("speed", 4, {"img_per_s": 2.5})
    assert not log.shows_images
    log.images(4, {"views": PICTURE})  # nowhere to go
    log.flush()
    assert (tmp_path / "speed.jsonl").read_text() == '{"iteration": 4, "img_per_s": 2.5}\n'
    log.close()


def test_tensorboard_holds_scalars_and_pictures(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write("metrics", 7, {"loss": 1.5})
    log.write("probes", 7, {"probe/knn_top1": 50.0})
    log.images(7, {"views": PICTURE})
    assert log.shows_images
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"metrics/loss", "probe/knn_top1"}
    assert [(e.step, e.value) for e in events.Scalars("metrics/loss")] == [(7, 1.5)]
    (image,) = events.Images("images/views")
    from PIL import Image

    assert image.step == 7 and np.array_equal(
        np.array(Image.open(io.BytesIO(image.encoded_image_string))), PICTURE
    )


class FakeWandb(types.ModuleType):
    """What of wandb is used; keeps what it was told."""

    class Error(Exception):
        pass

    Image = staticmethod(lambda image: ("image", image.shape))

    def __init__(self, refuses=""):
        super().__init__("wandb")
        self.refuses, self.inits, self.logged, self.finished = refuses, [], [], 0

    def init(self, **arguments):
        if self.refuses:
            raise self.Error(self.refuses)
        self.inits.append(arguments)
        return types.SimpleNamespace(id=arguments["id"] or "run7", log=self.log, finish=self.finish)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_gets_everything_and_a_resume_goes_on_in_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start_iter in (0, 3):
        log = MetricsLog(tmp_path / "run", start_iter, False, wandb="birds", config={"run": {"seed": 1}})
        log.write("metrics", start_iter, {"loss": 2.0})
        log.write("probes", start_iter, {"probe/knn_top1": 50.0})
        log.images(start_iter, {"views": PICTURE})
        log.close()
    one = dict(
        project="birds", resume="allow", name="run", dir=str(tmp_path / "run"), config={"run": {"seed": 1}}
    )
    assert fake.inits == [{**one, "id": None}, {**one, "id": "run7"}] and fake.finished == 2
    assert fake.logged[:3] == [
        (0, {"metrics/loss": 2.0}),
        (0, {"probe/knn_top1": 50.0}),
        (0, {"images/views": ("image", PICTURE.shape)}),
    ]
    assert [step for step, _ in fake.logged] == [0, 0, 0, 3, 3, 3]


def test_without_wandb_the_key_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"log\.wandb='birds'.*pip install wandb"):
        MetricsLog(tmp_path, 0, False, wandb="birds")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuses="api_key not configured\nlog in"))
    with pytest.raises(
        UserError, match=r"log\.wandb='birds': api_key not configured \(WANDB_MODE=offline"
    ) as error:
        MetricsLog(tmp_path, 0, False, wandb="birds")
    assert "\n" not in str(error.value)
    MetricsLog(tmp_path, 0, False).close()  # not asked for, not needed


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def ticks(speed, clock, *seconds, waited=0.0):
    for s in seconds:
        clock.now += s
        speed.tick(waited)


def test_speed_is_of_the_last_iterations_and_forgets_the_first():
    clock = Clock()
    speed = Speed(batch_size=8, clock=clock)
    assert speed.img_per_s == 0 and speed.data_wait == 0 and speed.eta_s(10) is None
    ticks(speed, clock, 30.0)  # compiling
    assert speed.img_per_s == pytest.approx(8 / 30)
    ticks(speed, clock, *[10.0] * (metrics_log.WARM_ITERS - 1))
    assert speed.img_per_s > 0 and speed.eta_s(10) is None  # of the slow start alone
    ticks(speed, clock, 2.0, waited=0.5)
    assert (
        speed.img_per_s == pytest.approx(4.0)
        and speed.data_wait == pytest.approx(0.25)
        and speed.eta_s(10) == pytest.approx(20)
    )
    ticks(speed, clock, *[1.0] * metrics_log.WINDOW_ITERS)
    assert (
        speed.img_per_s == pytest.approx(8.0)
        and speed.data_wait == 0
        and len(speed.window) == metrics_log.WINDOW_ITERS + 1
    )


def test_pauses_are_not_the_trainings_speed_but_take_their_time():
    clock = Clock()
    speed = Speed(batch_size=8, clock=clock)
    ticks(speed, clock, *[2.0] * 20)
    with speed.paused():
        clock.now += 60
    ticks(speed, clock, *[2.0] * 20)
    assert speed.img_per_s == pytest.approx(4.0)
    assert speed.eta_s(100) == pytest.approx(100 * 2 + 100 * 60 / 40)


def test_words():
    seconds = (0, 59.6, 200, 3720, 183600)
    assert [in_words(s) for s in seconds] == ["0 s", "1 min 00 s", "3 min 20 s", "1 h 02 min", "2 d 03 h"]
    clock = Clock()
    speed = Speed(8, clock)
    ticks(speed, clock, *[2.0] * 9, waited=0.1)
    text = describe(speed, CPU, 1.23e-4, "3/10")
    memory = f"process {peak_memory_gb(CPU):.1f} GB"
    assert text == f"epoch 3/10  lr 1.2e-04  4.0 img/s  data wait 5%  {memory}"
    assert 0.05 < peak_memory_gb(CPU) < 200


MASK_RCNN = "classifier box_reg mask objectness rpn_box_reg".split()


def test_losses_fit_their_columns():
    losses = {"loss": 3.25, **{f"loss_{name}": 0.5 for name in MASK_RCNN}}
    whole = "loss 3.250  classifier 0.500  box_reg 0.500  mask 0.500  objectness 0.500  rpn_box_reg 0.500"
    assert in_columns(losses, 100) == whole
    assert all(len(in_columns(losses, columns)) <= columns for columns in range(20, 100))
    assert (
        in_columns(losses, 80)
        == "loss 3.250  classi 0.500  box_re 0.500  mask 0.500  object 0.500  rpn_bo 0.500"
    )
    assert in_columns({}, 80) == "" and in_columns({"decode.loss_ce": 1.0}, 80) == "ce 1.000"
    assert in_lines("epoch 1/3  lr 1.0e-04  5 img/s", 20) == ["epoch 1/3", "lr 1.0e-04  5 img/s"]


def test_plain_lines_come_now_and_then_and_at_the_end(monkeypatch):
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(log_module.time, "time", clock)
    line = ProgressLine("pretrain mine", 1000, 400, Console(file=file))
    for done in range(401, 406):
        clock.now += 0.4 * log_module.QUIET_S
        line.update(done, f"epoch {done}", 75.0 if done > 401 else None, {"loss": 1, "loss_mask": 0.5})
    line.update(1000, "evaluation 0%", eta_s=3.0)
    line.update(1000, "", eta_s=0.0)
    line.close()
    assert file.getvalue().splitlines() == [
        "pretrain mine 401/1000  loss 1.000  mask 0.500  epoch 401  6 s",
        "pretrain mine 404/1000  loss 1.000  mask 0.500  epoch 404  24 s, 1 min 15 s left",
        "pretrain mine 1000/1000  30 s, done",
    ]
    monkeypatch.setenv(log_module.QUIET, "soon")
    with pytest.raises(UserError, match="POSFIELD_PROGRESS_S='soon' is no number of seconds"):
        ProgressLine("pretrain mine", 1000)


def test_a_terminal_shows_a_bar_of_80_columns_that_moves_with_every_step():
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=80, height=24, color_system=None)
    line = ProgressLine("pretrain intertwined", 125_000, 12_000, terminal)
    losses = {"loss": 23.5, "image": 9.12, "content": 8.01, "position": 6.0, "koleo": -0.101}
    note = "epoch 10/100  lr 1.2e-04  1034.1 img/s  data wait 3%  process 120.1 GB"
    for done in (12_344, 12_345):
        line.update(done, note, eta_s=371_000, terms=losses)
        line.bar.refresh()
    line.close()
    shown = [row.rstrip() for row in re.sub(r"\x1b\[[^m]*?[A-Za-z]", "\n", file.getvalue()).splitlines()]
    assert max(map(len, shown)) <= 80 and not any("\u2026" in row for row in shown)
    for done in (12_344, 12_345):
        assert any(f" {done}/125000 " in row and row.endswith(" 0 s, 4 d 07 h left") for row in shown)
    assert note in shown and in_columns(losses, 80) in shown


def test_what_libraries_warn_of_goes_into_a_file(tmp_path, capsys):
    with warnings_into(tmp_path):
        for _ in range(2):
            warnings.warn("old API", stacklevel=1)
            logging.getLogger("some_library.data").warning("skipped %d", 3)
        log("a line")
    told = (tmp_path / log_module.WARNINGS).read_text()
    assert told.count("UserWarning: old API") == 1 == told.count("some_library.data: skipped 3\n")
    assert capsys.readouterr().err == f"libraries warn of something: {tmp_path / 'warnings.txt'}\na line\n"
    with warnings_into(tmp_path / "quiet"):
        log("a line")
    assert not (tmp_path / "quiet").exists()
