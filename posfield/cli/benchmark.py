"""Measure speed and memory as ratios, side by side in one run.

posfield benchmark data      cpu_ratio, device_worker_ratio
posfield benchmark step      method_over_baseline
posfield benchmark heads     memory_ratio
posfield benchmark det       time and memory ratios, also checkpointed: our ViT over Detectron2's
posfield benchmark det-step  img/s and memory of a detector's training step, ours and Detectron2's
posfield benchmark paka      time_ratio, memory_ratio: PaKA's step over DINOv2's; hours of a whole run
posfield benchmark seg       time_ratio, memory_ratio: our ViT over mmseg's
"""

import os
from pathlib import Path

# read when torch starts: large pages on Linux, a twentieth of a step on the CPU
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import json
from datetime import datetime, timezone
from typing import Any

import torch

from pretrain.cli import fields_and_kwargs
from pretrain.device import choose_device
from pretrain.results.provenance import git_commit, hardware, packages_in_use

# what the project promises: at most, or for the data path at least
BOUNDS: dict[str, dict[str, tuple[str, Any]]] = {
    "data": {"cpu_ratio": ("at least", 3.5), "device_worker_ratio": ("at most", 1.3)},
    "step": {"method_over_baseline": ("at most", {"small": 1.10, "base": 1.05})},
    "heads": {"memory_ratio": ("at most", 0.5)},
    "paka": {},
    "det": {
        "time_ratio": ("at most", 0.55),
        "memory_ratio": ("at most", 0.30),
        "memory_ratio_checkpointed": ("at most", 0.12),
    },
    "det-step": {},
    "seg": {},
}


def main(arguments: list[str]) -> None:
    """Parse, measure, print, write."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes that it starts
    measures = {
        "data": data,
        "step": step,
        "heads": heads,
        "paka": paka,
        "det": det,
        "det-step": det_step,
        "seg": seg,
    }
    found = measures[options.what](options)
    found |= {"what": options.what, "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    found |= {
        "packages": packages_in_use(),
        "hardware": hardware(),
        "git_commit": git_commit(Path(__file__).parent),
    }
    show(found)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=tuple(BOUNDS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, versions and hardware")
    parser.add_argument("--backbone", default="vit_small_patch16", help="all but data (%(default)s)")
    parser.add_argument("--batch", type=int, help="images (step, paka: 8 on a CPU, 64 on a GPU; heads: 64)")
    parser.add_argument(
        "--patch-size",
        type=int,
        default=16,
        choices=(14, 16),
        help="paka: 14: its crops of 518 px (%(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        metavar="N",
        help="det-step: images (%(default)s)",
    )
    parser.add_argument(
        "--image-px", type=int, default=1024, help="det, det-step: side of the square image (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch (its own choice)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bf16"), help="heads: of the chunked form"
    )
    parser.add_argument(
        "--with-data",
        type=int,
        metavar="WORKERS",
        help="step: also with real JPEG files through both data paths",
    )
    what = "step, paka: settings for all, e.g. step.compile=true; det-step: of the protocol"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=what)
    return parser.parse_intermixed_args(arguments)


def data(options: argparse.Namespace) -> dict[str, Any]:
    """Making views on one core."""
    from pretrain.benchmark.data import measure

    device = choose_device(options.device)
    return measure(
        options.rounds, device=device, render_batch=options.batch or (8 if device.type == "cpu" else 64)
    )


def step(options: argparse.Namespace) -> dict[str, Any]:
    """A training step."""
    from pretrain.benchmark.step import measure, measure_with_data

    device = choose_device(options.device)
    batch, settings = (
        options.batch or (8 if device.type == "cpu" else 64),
        [f"run.device={device.type}", *options.overrides],
    )
    found = measure(options.backbone, batch, options.rounds, settings)
    if options.with_data is not None:
        found["with_data"] = measure_with_data(
            options.backbone, batch, 4 * options.rounds, options.with_data, settings
        )
    return found


def heads(options: argparse.Namespace) -> dict[str, Any]:
    """Heads and losses."""
    from pretrain.benchmark.heads import measure

    return measure(options.backbone, options.batch or 64, options.device, options.precision)


def paka(options: argparse.Namespace) -> dict[str, Any]:
    """A step of a post-training."""
    from pretrain.benchmark.paka import measure

    batch = options.batch or (8 if choose_device(options.device).type == "cpu" else 64)
    return measure(
        options.backbone, batch, options.rounds, options.device, options.patch_size, options.overrides
    )


def det(options: argparse.Namespace) -> dict[str, Any]:
    """The ViT of a detector, forward and backward."""
    from det_plugin.benchmark.backbone import measure

    return measure(options.backbone, options.rounds, options.device, options.image_px)


def det_step(options: argparse.Namespace) -> dict[str, Any]:
    """A detector's whole training step."""
    from det_plugin.benchmark.step import measure

    fields, model_kwargs = fields_and_kwargs(options.overrides)
    fields.setdefault("image_size_px", str(options.image_px))
    return measure(
        options.backbone,
        options.batches,
        options.rounds,
        options.device,
        model_kwargs=model_kwargs,
        overrides=fields,
    )


def seg(options: argparse.Namespace) -> dict[str, Any]:
    """The ViT of a segmenter, forward and backward."""
    from seg_plugin.benchmark import measure

    return measure(options.backbone, options.rounds, options.device)


def show(found: dict[str, Any]) -> None:
    """The ratios with their bounds, then the figures."""
    bounds = BOUNDS[found["what"]]
    ratios = [name for name in found if name in bounds or name.endswith("_ratio")]
    for name in ratios:
        sense, bound = bounds.get(name, ("", None))
        limit = (
            next((v for k, v in bound.items() if k in found["backbone"]), None)
            if isinstance(bound, dict)
            else bound
        )
        print(f"{name} {found[name]}" + ("" if limit is None else f"  ({sense} {limit})"))
    for key in sorted(found.keys() - {*ratios, "packages", "hardware"}):
        print(f"  {key}: {found[key]}")
    print(
        f"  on {found['hardware']['cpu']}, {found['hardware']['cores']} cores, GPUs {found['hardware']['gpus'] or 'none'}"
    )
