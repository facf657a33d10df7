"""Measure speed and memory as ratios, side by side in one run.

posfield benchmark data      cpu_ratio, device_worker_ratio
posfield benchmark step      method_over_baseline; with --rotary: rotary_over_unrotated
posfield benchmark heads     memory_ratio
posfield benchmark det       time and memory ratios, also checkpointed: our ViT over Detectron2's
posfield benchmark det-step  img/s and memory of a detector's training step, ours and Detectron2's
posfield benchmark paka      time_ratio, memory_ratio: PaKA's step over DINOv2's; hours of a whole run
posfield benchmark seg       time_ratio, memory_ratio: our ViT over mmseg's
posfield benchmark start     seconds and memory before the first batch: a folder of files, annotations of COCO's size
"""

import os
from pathlib import Path

# read when torch starts: large pages on Linux, a twentieth of a step on the CPU
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import inspect
import json
from datetime import datetime, timezone
from importlib import import_module
from typing import Any

from pretrain.cli import command_parser, fields_and_kwargs
from pretrain.files import write_text
from pretrain.results.provenance import git_commit, hardware, packages_in_use

# Modules whose ``measure`` takes the options by their names
MEASURES = {
    "data": "pretrain.benchmark.data",
    "step": "pretrain.benchmark.step",
    "heads": "pretrain.benchmark.heads",
    "paka": "pretrain.benchmark.paka",
    "det": "det_plugin.benchmark.backbone",
    "det-step": "det_plugin.benchmark.step",
    "seg": "seg_plugin.benchmark",
    "start": "det_plugin.benchmark.start",
}
# what the project promises: at most, or for the data path at least
BOUNDS: dict[str, dict[str, tuple[str, Any]]] = {
    "data": {"cpu_ratio": ("at least", 3.5), "device_worker_ratio": ("at most", 1.3)},
    "step": {
        "method_over_baseline": ("at most", {"small": 1.10, "base": 1.05}),
        "rotary_over_unrotated": ("at most", 1.05),
    },
    "heads": {"memory_ratio": ("at most", 0.5)},
    "det": {
        "time_ratio": ("at most", 0.55),
        "memory_ratio": ("at most", 0.30),
        "memory_ratio_checkpointed": ("at most", 0.12),
    },
}


def main(arguments: list[str]) -> None:
    """Parse, measure, print, write."""
    options = parse(arguments)
    import torch

    from pretrain.device import choose_device

    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes that it starts
    is_small = options.what != "heads" and choose_device(options.device).type == "cpu"
    options.batch = options.batch or (8 if is_small else 64)
    given = vars(options)
    if options.what == "det-step":
        fields, given["model_kwargs"] = fields_and_kwargs(options.overrides)
        given["overrides"] = {"image_size_px": str(options.image_px), **fields}
    measure = import_module(MEASURES[options.what]).measure
    found = measure(**{name: given[name] for name in inspect.signature(measure).parameters if name in given})
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found |= {"what": options.what, "created": created, "git_commit": git_commit(Path(__file__).parent)}
    found |= {"packages": packages_in_use(), "hardware": hardware()}
    show(found)
    if options.json:
        write_text(options.json, json.dumps(found, indent=2, sort_keys=True) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("what", choices=tuple(MEASURES))
    add("--json", type=Path, metavar="FILE", help="write figures, versions and hardware")
    add("--backbone", default="vit_small_patch16", help="all but data (%(default)s)")
    add("--batch", type=int, help="images (data, step, paka: 8 on a CPU, 64 on a GPU; heads: 64)")
    crops = "paka: 14: its crops of 518 px (%(default)s)"
    add("--patch-size", type=int, default=16, choices=(14, 16), help=crops)
    sizes = "det-step: images (%(default)s)"
    add("--batches", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help=sizes)
    add("--image-px", type=int, default=1024, help="det, det-step: side of the square image (%(default)s)")
    add("--rounds", type=int, default=5, help="turns of each contender (%(default)s; heads: 1)")
    add("--threads", type=int, default=0, help="of torch (its own choice)")
    add("--device", default="auto", help="auto | cpu | cuda | mps")
    dtypes = ("float32", "bf16")
    add("--precision", default="float32", choices=dtypes, help="heads: of the chunked form")
    add("--files", type=int, default=200_000, metavar="N", help="start: in the folder (%(default)s)")
    smaller = "start: COCO's sizes are divided by N (%(default)s)"
    add("--shrink", type=int, default=1, metavar="N", help=smaller)
    real = "step: also with real JPEG files through both data paths"
    add("--with-data", type=int, metavar="WORKERS", help=real)
    add("--rotary", action="store_true", help="step: what rotary positions cost")
    what = "step, paka: settings for all, e.g. step.compile=true; det-step: of the protocol"
    add("overrides", nargs="*", metavar="key=value", help=what)
    return parser.parse_intermixed_args(arguments)


def show(found: dict[str, Any]) -> None:
    """The ratios with their bounds, then the figures."""
    bounds = BOUNDS.get(found["what"], {})
    ratios = [name for name in found if name in bounds or name.endswith("_ratio")]
    for name in ratios:
        sense, limit = bounds.get(name, ("", None))
        if isinstance(limit, dict):  # by size of the backbone
            limit = next((value for size, value in limit.items() if size in found["backbone"]), None)
        print(f"{name} {found[name]}" + ("" if limit is None else f"  ({sense} {limit})"))
    for key in sorted(found.keys() - {*ratios, "packages", "hardware"}):
        print(f"  {key}: {found[key]}")
    machine = found["hardware"]
    print(f"  on {machine['cpu']}, {machine['cores']} cores, GPUs {machine['gpus'] or 'none'}")
