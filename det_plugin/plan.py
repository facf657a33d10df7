"""How long a fine-tuning on data of one's own should be, and what it is going to do, told before its first step."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from det_plugin.coco.annotations import Data
from det_plugin.coco.metrics import KINDS
from det_plugin.protocol import READING, DetectionProtocol, deviations, protocol, with_overrides
from det_plugin.run import DetectionRun
from pretrain import distributed
from pretrain.device import fewest_parts
from pretrain.errors import UserError
from pretrain.jobs import start
from pretrain.log import log
from pretrain.results.schema import read_result
from pretrain.schedules import iterations
from pretrain.settings import as_dict

# Of a protocol's iterations on other data: more are refused; what is proposed (ours)
MOST_EPOCHS, EPOCHS = 200, 50


def schedule(base: DetectionProtocol, max_iters: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a schedule of ``max_iters``: steps, warm-up and evaluations at the same shares of it as in ``base``.

    Args:
        given: fields that the user set; they stay.
    """
    share = max_iters / base.max_iters
    steps = tuple(sorted({max(1, round(step * share)) for step in base.milestones}))
    fields: dict[str, Any] = {"max_iters": max_iters, "milestones": steps}
    fields["warmup_iters"] = round(base.warmup_iters * share)
    fields["eval_every"] = max(1, round(base.eval_every * share))
    return {key: value for key, value in fields.items() if key not in given or key == "max_iters"}


def whole_schedule(base: DetectionProtocol, fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with the rest of the schedule where ``max_iters`` is given without milestones."""
    if "max_iters" not in fields or "milestones" in fields:
        return dict(fields)
    alone = {"max_iters": fields["max_iters"], "milestones": (), "warmup_iters": 0}
    return {**fields, **schedule(base, with_overrides(base, alone).max_iters, fields)}


def fitted(run: DetectionRun, device: torch.device, steps: Callable[[DetectionRun], object]) -> DetectionRun:
    """The run with ``accumulate`` 0 replaced by the fewest micro-batches whose steps fit into the GPU's memory; 1 without
    a GPU.

    Args:
        steps: takes two steps of a run, the second of which has the optimizer's moments, and keeps nothing.

    Raises:
        UserError: not even one image at a time fits; there are several processes.
    """
    if run.accumulate:
        return run
    if device.type != "cuda":
        return replace(run, accumulate=1)
    if distributed.world_size() > 1:
        raise UserError("accumulate: 0 is fitted by one process alone; give a number")
    batch = run.protocol.batch_size
    n = fewest_parts(batch, lambda n: steps(replace(run, accumulate=n)), device)
    if n is None:
        more = "give --checkpointing, or a smaller image_size_px"
        raise UserError(f"accumulate: not even one image at a time fits into {device}; {more}")
    log(f"accumulate={n}: {batch // n} images at a time fit into {device}")
    return replace(run, accumulate=n)


def tell(run: DetectionRun, data: Data, device: torch.device, begins: bool) -> None:
    """Log the plan in one line.

    Raises:
        UserError: a run that begins would repeat few images for the whole of a protocol made for COCO.
    """
    p, n, batch = run.protocol, len(data.train.pictures), run.protocol.batch_size
    epoch_iters, epochs = math.ceil(n / batch), p.max_iters * batch / n
    usual = protocol(p.name, run.backbone).max_iters
    if begins and not run.is_sure and p.max_iters == usual and epochs > MOST_EPOCHS:
        at_16 = iterations(EPOCHS, n, 16)
        short = f"epochs={EPOCHS} ({iterations(EPOCHS, n, batch):,} iterations; with batch_size=16 {at_16:,})"
        told = f"{p.max_iters:,} iterations of {batch} images are {epochs:,.0f} epochs of {n:,} images"
        raise UserError(f"protocol: {told}; give {short}, or --yes for all of it")
    ranks = distributed.world_size()
    parts = f" ({ranks} processes x {run.accumulate} micro-batches x {batch // (ranks * run.accumulate)})"
    split = parts if ranks * run.accumulate > 1 else ""
    precision = p.amp_dtype if p.amp and device.type == "cuda" else "float32"
    kind = "boxes and masks" if p.has_masks else "boxes"
    planned = p.max_iters / epoch_iters
    ends = f", over after {p.patience} without a better one" if p.patience else ""
    log(
        f"plan: {n:,} images, {len(data.train.class_names)} classes, {kind}; batch {batch}{split}: {epoch_iters:,} iterations an "
        f"epoch, {planned:,.3g} epochs, {p.max_iters:,} iterations; evaluated every {p.eval_every:,} on {len(data.val.pictures):,} "
        f"images{ends}; {run.backbone} {run.weights or 'from scratch'} on {device}, {precision}; into {run.output}"
    )
    if begins and distributed.is_main():
        leave_start(run)


def ended(result: Path) -> Path:
    """Say what a finished run left, and what to do with it. Gives back the path of its ``result.json``."""
    if distributed.is_main() and result.is_file():
        metrics, output = read_result(result).metrics, result.parent
        found = ", ".join(
            f"{kind} AP {metrics[f'{kind}_ap']:.2f}" for kind in KINDS if f"{kind}_ap" in metrics
        )
        log(f"done: {found}; {start.way_on(output)}")
    return result


def leave_start(run: DetectionRun) -> None:
    """Write down what a run was started with."""
    whole = as_dict(run.protocol)
    fields = {key: whole[key] for key in (*deviations(run.protocol, run.backbone), *READING, "num_classes")}
    names = "backbone", "seed", "device", "workers", "accumulate", "checkpointing", "compile"
    start.leave(run, names, fields, protocol=run.protocol.name)
