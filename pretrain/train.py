"""The pre-training run: build, loop, leave ``backbone.safetensors`` and ``result.json``. Nothing clever."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain import distributed
from pretrain.checkpoint import load_checkpoint, save_checkpoint
from pretrain.config import as_dict
from pretrain.data.loader import ViewsDataset, build_dataset, build_loader
from pretrain.device import choose_device, deterministic
from pretrain.errors import UserError
from pretrain.methods.intertwined import Intertwined
from pretrain.metrics_log import MetricsLog, ProgressLine
from pretrain.optim import clip_gradients, ema_update, parameter_groups, set_schedules
from pretrain.recipe import pretraining_protocol
from pretrain.results.provenance import config_hash, provenance
from pretrain.results.schema import Result, read_result, write_result
from pretrain.schedules import cosine, effective_epochs, scaled_lr, warmup_cosine
from pretrain.weights import save_backbone


@dataclass(frozen=True)
class Length:
    """How long a run is, in iterations."""

    epoch_it: int
    total_it: int
    warmup_it: int
    freeze_it: int

    @staticmethod
    def of(config: DictConfig, n_images: int) -> "Length":
        """From epochs to iterations; an epoch is images / batch unless the config says how long it is."""
        optim = config.optim
        epoch_it = optim.epoch_length_it or n_images // optim.batch_size
        if not epoch_it:
            raise UserError(f"config: optim.batch_size={optim.batch_size} is more than the {n_images} images of {config.data.root}")
        return Length(
            epoch_it,
            optim.epochs * epoch_it,
            optim.warmup_epochs * epoch_it,
            optim.freeze_last_layer_epochs * epoch_it,
        )


@dataclass(frozen=True)
class Values:
    """What the schedules say at one iteration."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    teacher_momentum: float

    def logged(self) -> dict[str, float]:
        """What goes into the logs."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "teacher_momentum": self.teacher_momentum}

    @staticmethod
    def at(it: int, config: DictConfig, length: Length) -> "Values":
        """METHOD.md 6: warm-up and cosine of the lr, cosines of weight decay and momentum, last layer frozen at first."""
        optim = config.optim
        peak = scaled_lr(optim.base_lr, optim.batch_size, optim.lr_rule)
        lr = warmup_cosine(it, length.total_it, length.warmup_it, peak, optim.min_lr)
        return Values(
            lr,
            0.0 if it < length.freeze_it else lr,
            cosine(it, length.total_it, optim.weight_decay, optim.weight_decay_end),
            cosine(it, length.total_it, optim.teacher_momentum, optim.teacher_momentum_end),
        )


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, AbstractContextManager[Any]]:
    """Dtype of the parameters and the autocast context of a step; ``auto`` is bf16 on CUDA, float32 elsewhere."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "float32"
    if name == "bf16":
        return torch.float32, torch.autocast(device.type, torch.bfloat16)
    return (torch.float64 if name == "float64" else torch.float32), nullcontext()


class Trainer:
    """The state of a run, and one step of it."""

    def __init__(self, config: DictConfig, dataset: ViewsDataset) -> None:
        self.config, self.dataset = config, dataset
        self.length = Length.of(config, len(dataset))
        self.device = choose_device(config.run.device)
        self.dtype, self.autocast = choose_precision(config.run.precision, self.device)
        torch.manual_seed(config.run.seed)
        self.method = Intertwined(config).to(self.device, self.dtype)
        self.ranks: nn.Module = self.method
        if distributed.world_size() > 1:
            # Which parameters get a gradient does not change from step to step; centres are kept equal by their own reduction.
            self.ranks = DistributedDataParallel(self.method, broadcast_buffers=False)
        betas = tuple(config.optim.betas)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.method.student), betas=betas)
        self.iteration = 0

    def step(self, batch: Any) -> tuple[dict[str, Tensor], Values]:
        """One iteration: teacher, student, losses, backward, step, EMA. Returns the loss terms, still on the device."""
        values = Values.at(self.iteration, self.config, self.length)
        # Drop path is the only thing drawn on the device: seeded by the iteration, a resumed run draws the same.
        torch.manual_seed(self.config.run.seed * 1_000_003 + self.iteration * 1009 + distributed.rank())
        set_schedules(self.optimizer, values.lr, values.last_layer_lr, values.weight_decay)
        with self.autocast:
            terms = self.ranks(batch.to(self.device, self.dtype))
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        clip_gradients(self.method.student.values(), self.config.optim.clip_grad)
        self.optimizer.step()
        ema_update(self.method.teacher, self.method.student, values.teacher_momentum)
        self.iteration += 1
        return {name: term.detach() for name, term in terms.items()}, values

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "iteration": self.iteration,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": as_dict(self.config),
            "n_images": len(self.dataset),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state.

        Raises:
            UserError: the checkpoint belongs to another network or to other settings, by key.
        """
        if "config" not in state or "method" not in state:
            raise UserError(f"resume: the checkpoint in {self.config.run.output} is no pre-training's")
        changed = changed_keys(state["config"], as_dict(self.config))
        if changed:
            raise UserError(
                f"resume: the checkpoint in {self.config.run.output} was made with other settings: {', '.join(changed)}"
            )
        if state["n_images"] != len(self.dataset):
            now = f"{self.config.data.root} has {len(self.dataset)}"
            raise UserError(f"resume: the run was over {state['n_images']} images, but {now}: order and schedule would change")
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]


# Keys that may change between a run and its continuation: they do not touch what is computed.
FREE_KEYS = ("run.output", "run.device", "data.root", "data.workers", "log.checkpoint_period_it", "log.tensorboard")


def changed_keys(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ, those of no effect on the outcome left out."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(set(before) | set(after))
        return [key for name in names for key in changed_keys(before.get(name), after.get(name), f"{prefix}{name}.")]
    name = prefix.rstrip(".")
    return [] if before == after or name in FREE_KEYS else [name]


def train(config: DictConfig, resume: bool = False, stop_after_it: int | None = None) -> Path:
    """Run (or go on with) a pre-training.

    Args:
        config: all settings (:func:`pretrain.config.load_config`).
        resume: go on from the folder's checkpoint if there is one; a finished run is left as it is.
        stop_after_it: save and leave at this iteration, as an interruption would.

    Returns:
        the folder, with ``backbone.safetensors`` (the teacher), ``result.json``, logs and the last checkpoint.

    Raises:
        UserError: bad settings, no images, a folder that holds another run.
        FloatingPointError: a loss is no number; names the iteration and the terms.
    """
    rule, device = config.run.deterministic, choose_device(config.run.device)
    with deterministic(rule == "always" or rule == "cpu" and device.type == "cpu"):
        return _train(config, resume, stop_after_it)


def _train(config: DictConfig, resume: bool, stop_after_it: int | None) -> Path:
    folder = Path(config.run.output)
    distributed.start(choose_device(config.run.device).type)
    dataset = build_dataset(config)
    trainer = Trainer(config, dataset)
    state = load_checkpoint(folder) if resume else None
    before = Progress()
    if state is not None:
        trainer.restore(state)
        before = Progress(**state["progress"])
        del state  # gigabytes, for the whole run
    elif not resume and (folder / "checkpoint.pt").exists():
        raise UserError(f"run.output: {folder} already holds a run; go on with --resume, or choose another folder")
    if trainer.iteration >= trainer.length.total_it and (folder / "result.json").is_file():
        distributed.say(f"{folder} is finished ({read_result(folder).created})")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
    end_it = min(trainer.length.total_it, stop_after_it or trainer.length.total_it)
    progress = loop(trainer, folder, end_it, before)
    if end_it == trainer.length.total_it and distributed.is_main():
        finish(trainer, folder, progress)
    return folder


@dataclass(frozen=True)
class Progress:
    """What a run has come to, besides its state: for its logs and its result."""

    wall_time_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    img_per_s: float = 0.0
    broken: tuple[str, ...] = ()  # files that could not be read


def loop(trainer: Trainer, folder: Path, end_it: int, before: Progress) -> Progress:
    """Iterations up to ``end_it``, with logs and checkpoints."""
    config, first_it, started = trainer.config, trainer.iteration, time.time()
    loader = build_loader(config, trainer.dataset, first_it, end_it, pin_memory=trainer.device.type == "cuda")
    log = MetricsLog(folder, first_it, config.log.tensorboard) if distributed.is_main() else None
    line = ProgressLine(f"pretrain {config.run.method}", trainer.length.total_it, first_it) if log else None
    broken, new, waited, now = set(before.broken), set[str](), 0.0, before
    waiting_since = time.time()
    try:
        for batch, unreadable in loader:
            waited += time.time() - waiting_since
            new |= set(unreadable)
            terms, values = trainer.step(batch)
            done = trainer.iteration
            is_due = done % config.log.checkpoint_period_it == 0 or done == end_it
            if (done - 1) % config.log.period_it == 0 or is_due:
                report_broken(broken, new)
                seconds = time.time() - started
                img_per_s = (done - first_it) * config.optim.batch_size / seconds
                now = Progress(before.wall_time_s + seconds, finite_losses(terms, done - 1), img_per_s, tuple(sorted(broken)))
                if log and line and ((done - 1) % config.log.period_it == 0 or done == trainer.length.total_it):
                    log.write("metrics", done - 1, {**now.losses, **values.logged()})
                    share = waited / seconds
                    log.write("speed", done - 1, {"img_per_s": img_per_s, "data_wait": share, "broken_images": len(broken)})
                    eta_s = (trainer.length.total_it - done) * config.optim.batch_size / img_per_s
                    line.update(done, f"loss {now.losses['loss']:.3f}  {img_per_s:.1f} img/s  data wait {share:.0%}", eta_s)
            if is_due and log:
                log.flush()
                save_checkpoint(folder, {**trainer.state(), "progress": asdict(now)})
            waiting_since = time.time()
    except UserError as error:  # raised in a worker, it arrives wrapped in the worker's traceback
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from error
    finally:
        if log and line:
            log.close()
            line.close()
    return now


def finite_losses(terms: dict[str, Tensor], it: int) -> dict[str, float]:
    """Loss terms averaged over the ranks, as numbers.

    Raises:
        FloatingPointError: one is NaN or infinite; the run must not go on.
    """
    stacked = distributed.mean_over_ranks(torch.stack(list(terms.values())))
    losses = dict(zip(terms, stacked.tolist()))
    if not all(math.isfinite(value) for value in losses.values()):
        raise FloatingPointError(f"noticed at iteration {it}: a loss is no number: {losses}")
    return losses


def report_broken(known: set[str], new: set[str]) -> None:
    """Name each file that some rank could not read, once; ``new`` moves into ``known``."""
    for name in sorted(distributed.union_over_ranks(new) - known):
        known.add(name)
        distributed.say(f"skipped, cannot be read: {name}")
    new.clear()


def finish(trainer: Trainer, folder: Path, progress: Progress) -> None:
    """Leave the teacher's backbone and the result."""
    config, crops = trainer.config, trainer.config.crops
    seen = trainer.length.total_it * config.optim.batch_size / len(trainer.dataset)
    epochs = effective_epochs(seen, crops.n_global, crops.n_local, crops.global_px, crops.local_px)
    origin = {
        "method": config.run.method,
        "effective_epochs": round(epochs, 2),
        "seed": config.run.seed,
        "config_hash": config_hash(as_dict(config)),
    }
    backbone = trainer.method.backbone_of("teacher")
    path = save_backbone(
        folder / "backbone.safetensors",
        {name: tensor.float() for name, tensor in backbone.state_dict().items()},
        name=config.backbone.name,
        flags=backbone.flags,
        provenance=origin,
    )
    result = Result(
        kind="pretrain",
        method=config.run.method,
        backbone=config.backbone.name,
        effective_epochs=origin["effective_epochs"],
        protocol=pretraining_protocol(config, len(trainer.dataset)),
        metrics={**progress.losses, "img_per_s": progress.img_per_s},
        seed=config.run.seed,
        wall_time_s=progress.wall_time_s,
        **provenance(as_dict(config), path),
    )
    write_result(result, folder)
