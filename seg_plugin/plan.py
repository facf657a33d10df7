"""How long a fine-tuning on masks of one's own should be, and what it is going to do, told before its first step."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from pretrain import distributed
from pretrain.errors import UserError
from pretrain.jobs import start
from pretrain.log import ProgressLine, log
from pretrain.metrics_log import Speed, describe
from pretrain.results.schema import read_result
from pretrain.schedules import iterations
from pretrain.settings import as_dict
from seg_plugin.protocol import OF_THE_DATA, OWN, SegmentationProtocol, deviations, with_overrides

MOST_EPOCHS, EPOCHS = 1000, 100  # of own-160k's iterations: more are refused; what is proposed (ours)
SHOWN = "mIoU"


def schedule(base: SegmentationProtocol, max_iters: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a schedule of ``max_iters``: warm-up and validations at the same shares of it as in ``base``.

    Args:
        given: fields that the user set; they stay.
    """
    share = max_iters / base.max_iters
    fields = {"max_iters": max_iters, "warmup_iters": round(base.warmup_iters * share)}
    fields["val_every"] = max(1, round(base.val_every * share))
    return {key: value for key, value in fields.items() if key not in given or key == "max_iters"}


def whole_schedule(base: SegmentationProtocol, fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with the rest of the schedule where ``max_iters`` is given without ``val_every``."""
    if "max_iters" not in fields or "val_every" in fields:
        return dict(fields)
    alone = {"max_iters": fields["max_iters"], "num_classes": 2, "warmup_iters": 0}
    return {**fields, **schedule(base, with_overrides(base, alone).max_iters, fields)}


def tell(run: Any, n_images: int, n_validation: int, device: Any, begins: bool) -> None:
    """Log the plan in one line, and write down what the run was started with.

    Args:
        run: :class:`seg_plugin.run.SegmentationRun`.

    Raises:
        UserError: a run that begins would repeat few images for the whole of a protocol of thousands of epochs.
    """
    p, ranks = run.protocol, distributed.world_size()
    epochs = p.max_iters * p.batch_size / n_images
    if (
        begins
        and not run.is_sure
        and p.name == OWN
        and "max_iters" not in deviations(p)
        and epochs > MOST_EPOCHS
    ):
        told = f"{p.max_iters:,} iterations of {p.batch_size} images are {epochs:,.0f} epochs of {n_images:,} images"
        short = f"epochs={EPOCHS} ({iterations(EPOCHS, n_images, p.batch_size):,} iterations)"
        raise UserError(f"protocol: {told}; give {short}, or --yes for all of it")
    ends = f", over after {p.patience} without a better one" if p.patience else ""
    split = f" ({ranks} processes x {p.batch_size // ranks})" if ranks > 1 else ""
    log(
        f"plan: {n_images:,} images, {p.num_classes} classes; batch {p.batch_size}{split}: "
        f"{math.ceil(n_images / p.batch_size):,} iterations an epoch, {epochs:,.3g} epochs, {p.max_iters:,} iterations; "
        f"validated every {p.val_every:,} on {n_validation:,} images{ends}; "
        f"{run.backbone} {run.weights or 'from scratch'} on {device}, {'float16' if p.amp else 'float32'}; into {run.output}"
    )
    if begins and distributed.is_main():
        leave_start(run)


def ended(result: Path) -> Path:
    """Say what a finished run left, and what to do with it. Gives back the path of its ``result.json``."""
    if distributed.is_main() and result.is_file():
        log(f"done: mIoU {read_result(result).metrics['miou']:.2f}; {start.way_on(result.parent)}")
    return result


def leave_start(run: Any) -> None:
    """Write down what a run was started with."""
    whole = as_dict(run.protocol)
    fields = {key: whole[key] for key in (*deviations(run.protocol), *OF_THE_DATA, "lr", "weight_decay")}
    masks = run.masks.model_dump(exclude_defaults=True)
    names = "backbone", "seed", "device", "workers"
    start.leave(run, names, fields, masks=masks, dataset=run.protocol.name)


class ProgressHook(Hook):
    """Our progress line in place of mmengine's log on the terminal."""

    priority = "VERY_LOW"

    def __init__(self, batch_size: int, n_images: int) -> None:
        self.speed, self.n_images = Speed(batch_size), n_images
        self.line: ProgressLine | None = None
        self.losses: dict[str, float] = {}

    def before_train(self, runner: Any) -> None:
        """Show where the run stands."""
        if distributed.is_main():
            self.line = ProgressLine("segmentation", runner.max_iters, runner.iter)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        """An iteration is done."""
        if self.line is None:
            return
        self.speed.tick(runner.message_hub.get_scalar("train/data_time").current())
        done = batch_idx + 1
        left_s = self.speed.eta_s(runner.max_iters - done)
        if estimate := self.speed.estimate(runner.max_iters - done, " without validations"):
            log(estimate)
        self.losses = {name: of.detach().item() for name, of in (outputs or {}).items() if "loss" in name}
        epoch, epochs = (
            math.ceil(n * self.speed.batch_size / self.n_images) for n in (done, runner.max_iters)
        )
        lr = max(group["lr"] for group in runner.optim_wrapper.param_groups)
        device = next(runner.model.parameters()).device
        self.line.update(done, describe(self.speed, device, lr, f"{epoch}/{epochs}"), left_s, self.losses)

    def before_val(self, runner: Any) -> None:
        """A validation is no part of the speed."""
        self.pause = self.speed.paused()
        self.pause.__enter__()
        self.began = time.monotonic()

    def after_val_iter(self, runner: Any, batch_idx: int, *_: Any, **__: Any) -> None:
        """An image of a validation is done."""
        if self.line is not None:
            share = (batch_idx + 1) / len(runner.val_dataloader)
            left_s = (time.monotonic() - self.began) * (1 / share - 1)
            self.line.update(runner.iter, f"validation {share:.0%}", left_s, self.losses)

    def after_val(self, runner: Any) -> None:
        """On with the training."""
        self.pause.__exit__(None, None, None)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Say how good it is."""
        if self.line is not None and SHOWN in (metrics or {}):
            log(f"iteration {runner.iter}: {SHOWN} {(metrics or {})[SHOWN]:.2f}")

    def after_train(self, runner: Any) -> None:
        """Leave the terminal as it was."""
        if self.line is not None:
            self.line.close()
