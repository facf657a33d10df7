"""Speed and memory as ratios, measured side by side in one run.

python tools/benchmark.py data                  cpu_ratio, device_worker_ratio
python tools/benchmark.py step                  method_over_baseline
python tools/benchmark.py heads                 memory_ratio
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else tools/pretrain.py shadows the package
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch starts: large pages on Linux, a twentieth of a step on the CPU

import argparse
import json
from datetime import datetime, timezone
from typing import Any

import torch

from pretrain.cli import run
from pretrain.device import choose_device
from pretrain.results.provenance import git_commit, hardware, packages_in_use

BOUNDS = {  # what the project promises: at most, or (data path) at least
    "cpu_ratio": ("at least", 3.5),
    "device_worker_ratio": ("at most", 1.3),
    "method_over_baseline": ("at most", {"small": 1.10, "base": 1.05}),
    "memory_ratio": ("at most", 0.5),
}


def main(arguments: list[str]) -> None:
    """Parse, measure, print, write."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    found = {"data": data, "step": step, "heads": heads}[options.what](options)
    found |= {"what": options.what, "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    found |= {"packages": packages_in_use(), "hardware": hardware(), "git_commit": git_commit(Path(__file__).parent)}
    show(found)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "step", "heads"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, versions and hardware")
    parser.add_argument("--backbone", default="vit_small_patch16", help="step, heads (%(default)s)")
    parser.add_argument("--batch", type=int, help="images (step: 8 on a CPU, 64 on a GPU; heads: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch (its own choice)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bf16"), help="heads: of the chunked form (%(default)s)"
    )
    parser.add_argument("--with-data", type=int, metavar="WORKERS", help="step: also with real JPEG files through both data paths")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="step: settings for both contenders, e.g. step.compile=true"
    )
    return parser.parse_intermixed_args(arguments)


def data(options: argparse.Namespace) -> dict[str, Any]:
    """Making views on one core."""
    from pretrain.benchmark.data import measure

    device = choose_device(options.device)
    return measure(options.rounds, device=device, render_batch=options.batch or (8 if device.type == "cpu" else 64))


def step(options: argparse.Namespace) -> dict[str, Any]:
    """A training step."""
    from pretrain.benchmark.step import measure, measure_with_data

    device = choose_device(options.device)
    batch, settings = options.batch or (8 if device.type == "cpu" else 64), [f"run.device={device.type}", *options.overrides]
    found = measure(options.backbone, batch, options.rounds, settings)
    if options.with_data is not None:
        found["with_data"] = measure_with_data(options.backbone, batch, 4 * options.rounds, options.with_data, settings)
    return found


def heads(options: argparse.Namespace) -> dict[str, Any]:
    """Heads and losses."""
    from pretrain.benchmark.heads import measure

    return measure(options.backbone, options.batch or 64, options.device, options.precision)


def show(found: dict[str, Any]) -> None:
    """The ratios with their bounds, then the figures."""
    for name, (sense, bound) in BOUNDS.items():
        if name in found:
            limit = next((v for k, v in bound.items() if k in found["backbone"]), None) if isinstance(bound, dict) else bound
            print(f"{name} {found[name]}" + ("" if limit is None else f"  ({sense} {limit})"))
    for key in sorted(found.keys() - BOUNDS.keys() - {"packages", "hardware"}):
        print(f"  {key}: {found[key]}")
    print(f"  on {found['hardware']['cpu']}, {found['hardware']['cores']} cores, GPUs {found['hardware']['gpus'] or 'none'}")


if __name__ == "__main__":
    run(main)
