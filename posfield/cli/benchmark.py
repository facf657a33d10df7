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
import importlib
from typing import Any

import torch

from pretrain.cli import command_parser, fields_and_kwargs
from pretrain.device import choose_device
from pretrain.files import write_json
from pretrain.results.provenance import git_commit, hardware, packages_in_use
from pretrain.results.schema import now

# What the project promises: at most, or for the data path at least.
BOUNDS: dict[str, dict[str, tuple[str, Any]]] = {
    "data": {"cpu_ratio": ("at least", 3.5), "device_worker_ratio": ("at most", 1.3)},
    "step": {"method_over_baseline": ("at most", {"small": 1.10, "base": 1.05})},
    "heads": {"memory_ratio": ("at most", 0.5)},
    "det": {
        "time_ratio": ("at most", 0.55),
        "memory_ratio": ("at most", 0.30),
        "memory_ratio_checkpointed": ("at most", 0.12),
    },
}
MODULES = {name: f"pretrain.benchmark.{name}" for name in ("data", "step", "heads", "paka")} | {
    "det": "det_plugin.benchmark.backbone",
    "det-step": "det_plugin.benchmark.step",
    "seg": "seg_plugin.benchmark",
}


def main(arguments: list[str]) -> None:
    """Parse, measure, print, write."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes that it starts
    found = measured(options)
    found |= {"what": options.what, "created": now(), "git_commit": git_commit(Path(__file__).parent)}
    found |= {"packages": packages_in_use(), "hardware": hardware()}
    show(found)
    if options.json:
        write_json(options.json, found)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("what", choices=tuple(MODULES))
    add("--json", type=Path, metavar="FILE", help="write figures, versions and hardware")
    add("--backbone", default="vit_small_patch16", help="all but data (%(default)s)")
    add("--batch", type=int, help="images (step, paka: 8 on a CPU, 64 on a GPU; heads: 64)")
    at_518 = "paka: 14: its crops of 518 px (%(default)s)"
    add("--patch-size", type=int, default=16, choices=(14, 16), help=at_518)
    some = [1, 2, 4, 8]
    add("--batches", type=int, nargs="+", default=some, metavar="N", help="det-step: images (%(default)s)")
    add("--image-px", type=int, default=1024, help="det, det-step: side of the square image (%(default)s)")
    add("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    add("--threads", type=int, default=0, help="of torch (its own choice)")
    add("--device", default="auto", help="auto | cpu | cuda | mps")
    add("--precision", default="float32", choices=("float32", "bf16"), help="heads: of the chunked form")
    both = "step: also with real JPEG files through both data paths"
    add("--with-data", type=int, metavar="WORKERS", help=both)
    settings = "step, paka: settings for all, e.g. step.compile=true; det-step: of the protocol"
    add("overrides", nargs="*", metavar="key=value", help=settings)
    return parser.parse_intermixed_args(arguments)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of what is asked for; its module is loaded only now."""
    what, backbone, rounds, device = options.what, options.backbone, options.rounds, options.device
    chosen, module = choose_device(device), importlib.import_module(MODULES[what])
    batch = options.batch or (8 if chosen.type == "cpu" else 64)
    if what == "data":
        return module.measure(rounds, device=chosen, render_batch=batch)
    if what == "step":
        settings = [f"run.device={chosen.type}", *options.overrides]
        found = module.measure(backbone, batch, rounds, settings)
        if options.with_data is not None:
            asked = (4 * rounds, options.with_data, settings)
            found["with_data"] = module.measure_with_data(backbone, batch, *asked)
        return found
    if what == "det-step":
        fields, model_kwargs = fields_and_kwargs(options.overrides)
        how = {"model_kwargs": model_kwargs, "overrides": {"image_size_px": str(options.image_px)} | fields}
        return module.measure(backbone, options.batches, rounds, device, **how)
    further = {
        "heads": (options.batch or 64, device, options.precision),
        "paka": (batch, rounds, device, options.patch_size, options.overrides),
        "det": (rounds, device, options.image_px),
        "seg": (rounds, device),
    }
    return module.measure(backbone, *further[what])


def show(found: dict[str, Any]) -> None:
    """The ratios with their bounds, then the figures."""
    bounds = BOUNDS.get(found["what"], {})
    ratios = [name for name in found if name in bounds or name.endswith("_ratio")]
    for name in ratios:
        sense, bound = bounds.get(name, ("", None))
        if isinstance(bound, dict):
            bound = next((limit for size, limit in bound.items() if size in found["backbone"]), None)
        print(f"{name} {found[name]}" + ("" if bound is None else f"  ({sense} {bound})"))
    for key in sorted(found.keys() - {*ratios, "packages", "hardware"}):
        print(f"  {key}: {found[key]}")
    machine = found["hardware"]
    print(f"  on {machine['cpu']}, {machine['cores']} cores, GPUs {machine['gpus'] or 'none'}")
