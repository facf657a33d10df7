"""The whole path on composed photographs: data, pre-training, detection, segmentation, table and report.

posfield demo --output demo            (``make demo``; run it again to go on where it stopped)
"""

import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, run
from typing import NamedTuple

from pretrain.cli import command, command_parser
from pretrain.errors import UserError
from pretrain.results import renamed

SHOW_EVERY_S = 15
METHODS = {"intertwined": "toy", "dinov2": "toy_dinov2"}
# Scaled-down data and protocols: minutes on two CPU cores, marked as such in the table
DATA = "--train 480 --val 80 --size 128".split()
DETECTION = """image_size_px=128 channels=64 box_fc=256 box_convs=1 mask_convs=1 num_classes=5 jitter_scale=0.8,1.25
    anchor_sizes_px=16,24,40,64,96 rpn_batch_per_image=64 roi_batch_per_image=64 rpn_pre_nms=300,200 rpn_post_nms=200,100
    batch_size=8 max_iters=450 milestones=360,420 warmup_iters=20 lr=4e-4 layer_decay=0.9 eval_every=450 amp=false
    detections_per_image=30""".split()
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
    """The demo, in order; the budgets add up to less than 18 minutes. ``quick``: a few steps of everything."""
    data = folder / "data"
    composed = command("toy-data", "--output", data, *(QUICK_DATA if quick else DATA))
    steps = [Stage("compose photographs", 20, composed)]
    for method, config in METHODS.items():
        words = [f"data.root={data / 'images'}", f"run.output={folder / f'pretrain_{method}'}"]
        words += QUICK_PRETRAIN if quick else []
        line = command("pretrain", "--config", config, "--resume", *words)
        steps.append(Stage(f"pre-train {method}", 150, line))
    detection = ["--engine", "torchvision", *last(DETECTION, QUICK_DETECTION if quick else [])]
    segmentation = last(SEGMENTATION, QUICK_SEGMENTATION if quick else [])
    for task, title, budget_s, protocol, labels in (
        ("detect", "detection", 280, detection, "coco"),
        ("segment", "segmentation", 60, segmentation, "ade"),
    ):
        for method in METHODS:
            weights = folder / f"pretrain_{method}" / "backbone.safetensors"
            where = ("--weights", weights, "--data", data / labels, "--output", folder / f"{task}_{method}")
            line = command(task, *where, "--resume", *protocol)
            steps.append(Stage(f"{title} {method}", budget_s, line))
    for method in METHODS:
        steps.append(Stage(f"draw {method}", 10, command("analyze crops", folder / f"pretrain_{method}")))
    return steps


def run_stage(stage: Stage, log: Path) -> None:
    """Run a stage's command. All that it says goes into ``log``; now and then a progress line is shown.

    Raises:
        UserError: it failed; the message holds its command, the end of the log is shown before.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    shown, said = 0.0, ""
    with open(log, "w") as file, Popen(stage.command, text=True, stdout=PIPE, stderr=STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            said = (said + line)[-2000:]
            if " eta" in line and time.time() - shown > SHOW_EVERY_S:
                shown = time.time()
                print(f"    {line.strip()[-120:]}", flush=True)
    if process.returncode:
        print(said, file=sys.stderr)
        told = f"(all of it in {log}); its command was: {' '.join(stage.command)}"
        raise UserError(f"stage {stage.title!r} failed {told}")


def main(arguments: list[str]) -> None:
    """Run the stages, each of which leaves what is finished as it is; then the table and the report."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo"), help="folder of the demo (%(default)s)")
    add("--quick", action="store_true", help="a few steps of everything, in a minute or two")
    options = parser.parse_args(arguments)
    folder = options.output
    plan, started = stages(folder, options.quick), time.time()
    minutes = sum(stage.budget_s for stage in plan) // 60 + 1
    print(f"demo: {len(plan)} stages, at most {minutes} minutes on two cores", flush=True)
    for number, stage in enumerate(plan, 1):
        print(f"[{number}/{len(plan)}] {stage.title} (budget {stage.budget_s} s)", flush=True)
        begun = time.time()
        run_stage(stage, folder / "logs" / f"{number} {stage.title}.log".replace(" ", "_"))
        print(f"[{number}/{len(plan)}] {stage.title}: {time.time() - begun:.0f} s", flush=True)
    runs = [folder / f"{task}_{method}" for task in ("pretrain", "detect", "segment") for method in METHODS]
    for line in (
        command("table", *runs, "--format", "md", "--output", folder / "table.md"),
        command("report", *runs, "--output", folder / "report.html", "--title", "posfield demo"),
    ):
        if run(line).returncode:
            raise UserError(f"failed: {' '.join(line)}")
    print((folder / "table.md").read_text())
    print(f"demo: {time.time() - started:.0f} s; the report is {folder / 'report.html'}")
