"""The whole path on composed photographs: data, pre-training, detection, segmentation, table and report.

posfield demo            (``make demo``; a quarter of an hour on two cores; run it again to go on where it stopped)
posfield demo --quick    (``make demo QUICK=1``; three minutes: everything once, too short to learn)
"""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import NamedTuple

from pretrain.cli import REQUEUE_CODE, command, command_parser
from pretrain.errors import Interrupted, UserError
from pretrain.log import QUIET, ProgressLine
from pretrain.results import renamed

SHOW_EVERY_S = 15
PROGRESS_S = "1"  # between the lines that a stage prints
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PHOTOGRAPHS = (
    "chelsea flower coffee china".split()
)  # whose views and attention are drawn; no object is pasted on them
# of pretrain.log: title, done/total, and the rest
PROGRESS = re.compile(r"(\S.*?) (\d+)/(\d+)  (.*)")
METHODS = {"intertwined": "toy", "dinov2": "toy_dinov2"}
# Scaled-down data and protocols: minutes on two CPU cores, marked as such in the table
DATA = "--train 480 --val 80 --size 128".split()
DETECTION = """image_size_px=128 channels=64 box_fc=256 box_convs=1 mask_convs=1 num_classes=5 jitter_scale=0.8,1.25
    anchor_sizes_px=16,24,40,64,96 rpn_batch_per_image=64 roi_batch_per_image=64 rpn_pre_nms=300,200 rpn_post_nms=200,100
    batch_size=8 max_iters=450 milestones=360,420 warmup_iters=20 lr=4e-4 layer_decay=0.9 eval_every=450 amp=false
    detections_per_image=30""".split()
# of DETECTION, which the ablation has in full: the demo's share of a quarter of an hour
SHORTER = "max_iters=330 milestones=264,308 eval_every=330".split()
QUICK_DATA = "--images 64 --train 32 --val 12 --size 96".split()
QUICK_PRETRAIN = "optim.epochs=2 optim.warmup_epochs=1 backbone.depth=2 data.workers=0".split()
QUICK_DETECTION = "max_iters=10 milestones=8,9 warmup_iters=2 eval_every=10".split()
SEGMENTATION = """num_classes=6 crop_px=128 slide_crop_px=128 slide_stride_px=112 resize_px=170,128 ratio_range=0.75,1.5
    batch_size=8 max_iters=350 lr=5e-4 val_every=350""".split()
QUICK_SEGMENTATION = "max_iters=10 val_every=10".split()


def last(*settings: list[str]) -> list[str]:
    """key=value words, of each key the last one, whether by its name or by the one that it had before."""
    parts = [word.partition("=") for words in settings for word in words]
    words = {renamed.DETECTION.get(key, key): f"{key}{rest}{value}" for key, rest, value in parts}
    return list(words.values())


class Stage(NamedTuple):
    """One command of the demo, and how long it may take on two cores."""

    title: str
    budget_s: int
    command: list[str]


def stages(folder: Path, quick: bool = False) -> list[Stage]:
    """The demo, in order; the budgets add up to less than 15 minutes. ``quick``: a few steps of everything."""
    data, photographs = folder / "data", folder / "photographs"
    composed = command("toy-data", "--output", data, *(QUICK_DATA if quick else DATA))
    steps = [Stage("compose photographs", 20, composed)]
    for method, config in METHODS.items():
        words = [f"data.root={data / 'images'}", f"run.output={folder / f'pretrain_{method}'}"]
        words += QUICK_PRETRAIN if quick else []
        line = command("pretrain", "--config", config, "--resume", *words)
        steps.append(Stage(f"pre-train {method}", 130, line))
    detection = ["--engine", "torchvision", *last(DETECTION, SHORTER, QUICK_DETECTION if quick else [])]
    segmentation = last(SEGMENTATION, QUICK_SEGMENTATION if quick else [])
    for task, title, budget_s, protocol, labels in (
        ("detect", "detection", 200, detection, "coco"),
        ("segment", "segmentation", 60, segmentation, "ade"),
    ):
        for method in METHODS:
            weights = folder / f"pretrain_{method}" / "backbone.safetensors"
            where = ("--weights", weights, "--data", data / labels, "--output", folder / f"{task}_{method}")
            line = command(task, *where, "--resume", *protocol)
            steps.append(Stage(f"{title} {method}", budget_s, line))
    pretrained = [folder / f"pretrain_{method}" for method in METHODS]
    steps.append(Stage("draw", 20, command("analyze crops", *pretrained, "--data", photographs)))
    runs = [folder / f"{task}_{method}" for task in ("pretrain", "detect", "segment") for method in METHODS]
    table, page = folder / "table.md", folder / "report.html"
    steps.append(Stage("table", 5, command("table", *runs, "--format", "md", "--output", table)))
    title = "posfield demo" + ", quick: too short to learn" * quick
    return [*steps, Stage("report", 5, command("report", *runs, "--output", page, "--title", title))]


def copy_photographs(folder: Path) -> None:
    """What :data:`PHOTOGRAPHS` names, into a folder."""
    from pretrain.data.toy import photographs  # loads OpenCV

    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        path = photographs()[name]
        shutil.copy(path, folder / path.name)


class Shown:
    """A stage's progress, of which its command prints a line every second: a bar on a terminal, else a line every
    :data:`SHOW_EVERY_S`."""

    def __init__(self) -> None:
        self.line: ProgressLine | None = None
        self.last_s = time.time()
        self.is_terminal = sys.stderr.isatty()

    def take(self, said: str) -> bool:
        """Whether a line is one of progress and no part of the log: one every :data:`SHOW_EVERY_S` is."""
        found = PROGRESS.match(said)
        if found is None:
            return False
        title, done, total, note = found.groups()
        is_due = time.time() - self.last_s > SHOW_EVERY_S or done == total
        self.last_s = time.time() if is_due else self.last_s
        if self.is_terminal:
            if self.line is None or self.line.title != title:
                self.close()
                self.line = ProgressLine(title, int(total), int(done))
            self.line.update(int(done), note, None)
        elif is_due:
            print(f"    {said.strip()}", flush=True)
        return not is_due

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.line is not None:
            self.line.close()


def run_stage(stage: Stage, log: Path) -> None:
    """Run a stage's command. All that it says goes into ``log``, at once; its progress is shown.

    Raises:
        UserError: it failed; names the log, whose end is shown before.
        Interrupted: it, or the demo, was asked to stop, and it has saved.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    shown, said, asked = Shown(), "", list[str]()
    environment = {**os.environ, QUIET: PROGRESS_S}
    with (
        open(log, "w", buffering=1) as file,
        # a session of its own: a terminal sends Ctrl-C to all in a group, and it would come twice, which means at once
        Popen(
            stage.command, text=True, stdout=PIPE, stderr=STDOUT, env=environment, start_new_session=True
        ) as process,
    ):

        def pass_on(number: int, _: object) -> None:
            asked.append(signal.Signals(number).name)
            print("stopping as soon as the stage has saved; again: at once", file=sys.stderr, flush=True)
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

        before = {number: signal.signal(number, pass_on) for number in STOPS}
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not shown.take(line):
                    file.write(line)
                    said = (said + line)[-2000:]
            code = process.wait()
        finally:
            shown.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    if asked or code == REQUEUE_CODE:
        raise Interrupted(f"in {stage.title!r} ({', '.join(asked) or 'asked to stop'}); what is done stays")
    if code:
        print(said, file=sys.stderr)
        told = f"all that it said is in {log}, its command was: {' '.join(stage.command)}"
        raise UserError(f"stage {stage.title!r} failed with code {code}; {told}")


def main(arguments: list[str]) -> None:
    """Run the stages, each of which leaves what is finished as it is."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, help="folder of the demo (demo; with --quick demo_quick)")
    add("--quick", action="store_true", help="everything once, too short to learn: three minutes")
    options = parser.parse_args(arguments)
    folder = options.output or Path("demo_quick" if options.quick else "demo")
    plan, started = stages(folder, options.quick), time.time()
    minutes = 3 if options.quick else sum(stage.budget_s for stage in plan) // 60 + 1
    how = "; Ctrl-C saves, and the same command goes on"
    print(f"demo: {len(plan)} stages into {folder}, some {minutes} minutes on two cores{how}", flush=True)
    copy_photographs(folder / "photographs")
    for number, stage in enumerate(plan, 1):
        log, begun = folder / "logs" / f"{number:02d} {stage.title}.log".replace(" ", "_"), time.time()
        print(f"[{number}/{len(plan)}] {stage.title} ...", flush=True)
        run_stage(stage, log)
        print(f"[{number}/{len(plan)}] {stage.title}: {time.time() - begun:.0f} s", flush=True)
    print((folder / "table.md").read_text())
    print(
        f"demo: {time.time() - started:.0f} s; open {folder / 'report.html'} in a browser; logs in {folder / 'logs'}"
    )
