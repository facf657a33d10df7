"""The whole path on composed photographs: data, pre-training, detection, segmentation, table and report.

posfield demo --output demo            (``make demo``; run it again to go on where it stopped)
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import command
from pretrain.errors import UserError

SHOW_EVERY_S = 15
METHODS = {"intertwined": "toy", "dinov2": "toy_dinov2"}
# Scaled-down protocols: minutes on two CPU cores. The table marks them as such, field by field.
DETECTION = """image_size_px=128 channels=64 box_fc=256 box_convs=1 mask_convs=1 num_classes=5 jitter_scale=0.8,1.25
    anchor_sizes_px=16,24,40,64,96 rpn_batch_per_image=64 roi_batch_per_image=64 rpn_pre_nms=300,200 rpn_post_nms=200,100
    batch_size=8 max_iters=450 milestones=360,420 warmup_iters=20 lr=4e-4 layer_decay=0.9 eval_every=450 amp=false
    detections_per_image=30""".split()
SEGMENTATION = """num_classes=6 crop_px=128 slide_crop_px=128 slide_stride_px=112 resize_px=170,128 ratio_range=0.75,1.5
    batch_size=8 max_iters=350 lr=5e-4 val_every=350""".split()


@dataclass(frozen=True)
class Stage:
    """One command of the demo, and how long it may take on two cores."""

    title: str
    budget_s: int
    command: list[str]


def stages(folder: Path) -> list[Stage]:
    """The demo, in order; the budgets add up to less than 18 minutes."""
    data = folder / "data"
    composed = command("toy-data", "--output", data, "--train", 480, "--val", 80, "--size", 128)
    steps = [Stage("compose photographs", 20, composed)]
    for method, config in METHODS.items():
        out = folder / f"pretrain_{method}"
        overrides = [f"data.root={data / 'images'}", f"run.output={out}"]
        steps.append(
            Stage(
                f"pre-train {method}",
                150,
                command("pretrain", "--config", config, "--resume", *overrides),
            )
        )
    for method in METHODS:
        steps.append(
            _finetune("det", method, folder, data / "coco", 280, DETECTION, "--engine", "torchvision")
        )
    for method in METHODS:
        steps.append(_finetune("seg", method, folder, data / "ade", 60, SEGMENTATION))
    for method in METHODS:
        run_folder = folder / f"pretrain_{method}"
        steps.append(Stage(f"draw {method}", 10, command("analyze crops", run_folder)))
    return steps


def _finetune(
    task: str, method: str, folder: Path, data: Path, budget_s: int, protocol: list[str], *extra: str
) -> Stage:
    out = folder / f"{task}_{method}"
    weights = folder / f"pretrain_{method}" / "backbone.safetensors"
    line = command(
        {"det": "detect", "seg": "segment"}[task],
        *extra,
        "--weights",
        weights,
        "--data",
        data,
        "--output",
        out,
        "--resume",
        *protocol,
    )
    return Stage(f"{'detection' if task == 'det' else 'segmentation'} {method}", budget_s, line)


def run_stage(stage: Stage, log: Path) -> None:
    """Run a stage's command. All that it says goes into ``log``; now and then a progress line is shown.

    Raises:
        UserError: it failed; the message holds its command, the end of the log is shown before.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    shown, said = 0.0, ""
    with (
        open(log, "w") as file,
        subprocess.Popen(
            stage.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            said = (said + line)[-2000:]
            if " eta" in line and time.time() - shown > SHOW_EVERY_S:
                shown = time.time()
                print(f"    {line.strip()[-120:]}", flush=True)
    if process.returncode:
        print(said, file=sys.stderr)
        raise UserError(
            f"stage {stage.title!r} failed (all of it in {log}); its command was: {' '.join(stage.command)}"
        )


def main(arguments: list[str]) -> None:
    """Run the stages (each leaves what is finished as it is, after a look at its settings), then the table
    and the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the demo (%(default)s)")
    folder = parser.parse_args(arguments).output
    plan, started = stages(folder), time.time()
    print(
        f"demo: {len(plan)} stages, at most {sum(s.budget_s for s in plan) // 60 + 1} minutes on two cores",
        flush=True,
    )
    for number, stage in enumerate(plan, 1):
        print(f"[{number}/{len(plan)}] {stage.title} (budget {stage.budget_s} s)", flush=True)
        begun = time.time()
        run_stage(stage, folder / "logs" / f"{number} {stage.title}.log".replace(" ", "_"))
        print(f"[{number}/{len(plan)}] {stage.title}: {time.time() - begun:.0f} s", flush=True)
    runs = [folder / f"{task}_{method}" for task in ("pretrain", "det", "seg") for method in METHODS]
    for line in (
        command("table", *runs, "--format", "md", "--output", folder / "table.md"),
        command("report", *runs, "--output", folder / "report.html", "--title", "posfield demo"),
    ):
        if subprocess.run(line).returncode:
            raise UserError(f"failed: {' '.join(line)}")
    print((folder / "table.md").read_text())
    print(f"demo: {time.time() - started:.0f} s; the report is {folder / 'report.html'}")
