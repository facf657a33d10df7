"""The pre-training run: build, loop, leave ``backbone.safetensors`` and ``result.json``. Nothing clever."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor

from pretrain import checkpoints, distributed
from pretrain.analysis.pictures import training_pictures
from pretrain.config import as_dict, completed
from pretrain.data.broken import BrokenFiles
from pretrain.data.loader import AnyBatch, ViewsDataset, build_dataset, build_loader
from pretrain.device import choose_device, deterministic
from pretrain.errors import Interrupted, UserError
from pretrain.evaluation.probes import Probes
from pretrain.metrics_log import MetricsLog, ProgressLine, Speed, describe, peak_memory_gb
from pretrain.precision import at_least_float32
from pretrain.recipe import pretraining_protocol
from pretrain.results.provenance import config_hash, file_hash, provenance
from pretrain.results.schema import Result, read_result, write_result
from pretrain.schedules import effective_epochs
from pretrain.signals import StopSignals
from pretrain.trainer import Length, Trainer, Values
from pretrain.weights import read_checkpoint, save_backbone


def train(config: DictConfig, resume: str = "", stop_after_it: int | None = None) -> Path:
    """Run (or go on with) a pre-training.

    Args:
        config: all settings (:func:`pretrain.config.load_config`).
        resume: ``auto``: go on from the folder's newest whole checkpoint if there is one, a finished run is left as it is; or an
            iteration of it, or a checkpoint's directory; nothing: start.
        stop_after_it: save and leave at this iteration, as an interruption would.

    Returns:
        the folder, with ``backbone.safetensors`` (``run.leaves``), ``result.json``, logs and the last checkpoints.

    Raises:
        UserError: bad settings, no images, too many broken ones, a folder that holds another run.
        FloatingPointError: a loss is no number; names the iteration and the terms.
        Interrupted: SIGTERM or SIGUSR1 came; the state is saved.
    """
    rule, device = config.run.deterministic, choose_device(config.run.device)
    with deterministic(rule == "always" or rule == "cpu" and device.type == "cpu"):
        distributed.start(device.type)
        dataset = build_dataset(config)
        trainer = Trainer(config, Length.of(config, len(dataset)))
        before = prepare(trainer, len(dataset), resume)
        folder, total_it = Path(config.run.output), trainer.length.total_it
        if trainer.iteration >= total_it and (folder / "result.json").is_file():
            distributed.say(f"{folder} is finished ({read_result(folder).created})")
            return folder
        with StopSignals() as signals:  # until here a signal simply ends the process: there is nothing to save
            run = Run(trainer, dataset, before, signals)
            run.loop(min(total_it, stop_after_it or total_it))
        if trainer.iteration == total_it:
            run.finish()
        return folder


@dataclass(frozen=True)
class Progress:
    """What a run has come to, besides its state: for its logs and its result."""

    wall_time_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    img_per_s: float = 0.0
    n_skipped: int = 0  # steps that changed nothing, since a loss was no number
    broken: dict[str, Any] = field(default_factory=dict)  # BrokenFiles.state()
    probes: dict[str, float] = field(default_factory=dict)


def prepare(trainer: Trainer, n_images: int, resume: str) -> Progress:
    """Bring the trainer to where the run stands: its start, another run's networks, or a checkpoint.

    Raises:
        UserError: the folder holds a run and nothing says to go on with it; or the checkpoint does not belong to these settings.
    """
    config, folder = trainer.config, Path(trainer.config.run.output)
    if not resume and checkpoints.whole_directories(folder):
        raise UserError(f"run.output: {folder} already holds a run; go on with --resume, or choose another folder")
    found, messages = checkpoints.find(folder, resume) if resume else (None, [])
    for message in messages:
        distributed.say(message)
    if found is None and messages:
        raise UserError(f"resume: {folder} has checkpoints, but no whole one; move them away to start anew")
    if found is not None:
        check_same_run(found, config, n_images)
        checkpoints.load(found, trainer.tensors())
        trainer.iteration = found.iteration
        progress = progress_of(found)
        trainer.n_skipped = progress.n_skipped
        distributed.say(f"going on from {found.path}")
        return progress
    if config.run.start_from:
        earlier, messages = checkpoints.find(Path(config.run.start_from), config.run.start_from)
        for message in messages:
            distributed.say(message)
        assert earlier is not None  # what is asked for by name is there, or find raises
        networks = trainer.networks()
        left = sorted(name for name in earlier.contents() if name.startswith("method.") and name not in networks)
        if left:
            raise UserError(f"run.start_from: {earlier.path} has networks that this run has not: {', '.join(left[:4])}")
        checkpoints.load(earlier, networks)
    return Progress()


def progress_of(found: checkpoints.Found) -> Progress:
    """What a checkpoint's run had come to.

    Raises:
        UserError: it says so in another form.
    """
    try:
        return Progress(**found.meta["progress"])
    except TypeError as error:
        raise UserError(f"resume: {found.path / 'meta.json'}: progress cannot be read ({error})") from error


# Settings that may change between a run and its continuation. Of `step` only how often dropped paths are drawn (step.accumulate)
# and where KoLeo looks under koleo_scope=local touch what is computed, as the number of ranks does.
FREE_KEYS = ("run.output", "run.device", "data.root", "data.workers", "data.broken_share")
FREE_GROUPS = ("step", "probes", "log")


def check_same_run(found: checkpoints.Found, config: DictConfig, n_images: int) -> None:
    """A checkpoint goes on under the settings and over the images that it was made with.

    Raises:
        UserError: names what differs.
    """
    if not {"config", "n_images", "progress"} <= found.meta.keys():
        raise UserError(f"resume: {found.path} is no checkpoint of a pre-training")
    changed = changed_keys(completed(found.meta["config"]), as_dict(config))
    if changed:
        raise UserError(f"resume: {found.path} was made with other settings: {', '.join(changed)}")
    if found.meta["n_images"] != n_images:
        now = f"{config.data.root} has {n_images}"
        raise UserError(f"resume: the run was over {found.meta['n_images']} images, but {now}: order and schedule would change")


def changed_keys(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ, those of no effect on the outcome left out."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(set(before) | set(after))
        return [key for name in names for key in changed_keys(before.get(name), after.get(name), f"{prefix}{name}.")]
    name = prefix.rstrip(".")
    return [] if before == after or name in FREE_KEYS or name.split(".")[0] in FREE_GROUPS else [name]


class Run:
    """A run under way: its loader, logs, checkpoints and probes around the trainer."""

    def __init__(self, trainer: Trainer, dataset: ViewsDataset, before: Progress, signals: StopSignals) -> None:
        config = trainer.config
        self.config, self.trainer, self.dataset, self.before, self.signals = config, trainer, dataset, before, signals
        self.now, self.started, self.folder = before, time.time(), Path(config.run.output)
        self.broken, self.read = BrokenFiles(**before.broken), BrokenFiles()  # of the whole run; of this rank since the last look
        self.pending: list[tuple[int, dict[str, Tensor]]] = []  # loss terms not looked at yet, still on the device
        self.probes = Probes(config, reads=distributed.is_main())
        weights = config.backbone.weights if distributed.is_main() else ""
        self.started_from = told_of(weights) if weights else {}  # looked at now: at the end of the run the file may be gone
        self.folder.mkdir(parents=True, exist_ok=True)
        log = config.log
        self.writer = checkpoints.Writer(self.folder, log.keep_checkpoints, trainer.ranks.is_sharded, log.async_checkpoints)
        self.speed = Speed(config.optim.batch_size)
        self.log: MetricsLog | None = None
        self.line: ProgressLine | None = None
        if distributed.is_main():
            (self.folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
            self.log = MetricsLog(self.folder, trainer.iteration, log.tensorboard, log.wandb, as_dict(config))
            self.line = ProgressLine(f"pretrain {config.run.method}", trainer.length.total_it, trainer.iteration)

    def loop(self, end_it: int) -> None:
        """Iterations up to ``end_it``, with logs, probes and checkpoints."""
        config, trainer, log = self.config, self.trainer, self.config.log
        pinned = trainer.device.type == "cuda"
        loader = build_loader(config, self.dataset, trainer.iteration, end_it, pin_memory=pinned)
        try:
            for parts, unreadable, waited_s in in_parts(loader, config.step.accumulate):
                it, done = trainer.iteration, trainer.iteration + 1
                is_last = done == trainer.length.total_it
                is_logged, is_due = it % log.period_it == 0 or is_last, done % log.checkpoint_period_it == 0 or done == end_it
                terms, values = trainer.step(parts, examine=is_logged)
                self.pending.append((it, terms))
                self.read.record(config.optim.batch_size // distributed.world_size(), unreadable)
                self.speed.tick(waited_s)
                stopping = self.signals.on_any_rank()
                if is_logged or is_due or stopping:
                    self.look(it, values if is_logged else None)
                with self.speed.paused():
                    self.show(it, parts[0])
                    self.probe(done)
                    if is_due or stopping:
                        self.save(done)
                if stopping and not is_last:
                    self.writer.wait()
                    raise Interrupted(f"{self.signals.received or 'another rank was signalled'}; saved at iteration {done}")
            self.writer.wait()
        except UserError as error:  # raised in a worker, it arrives wrapped in the worker's traceback
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from error
        finally:
            if self.log and self.line:
                self.log.close()
                self.line.close()

    def look(self, it: int, values: Values | None) -> None:
        """Bring the losses since the last look to the host, refuse what is no number, and log the last ones."""
        self.account()
        losses, self.pending = checked(self.pending, self.config.step.on_nan), []
        seconds = self.before.wall_time_s + time.time() - self.started
        self.now = Progress(seconds, losses, self.speed.img_per_s, self.trainer.n_skipped, self.broken.state(), self.now.probes)
        if self.log and self.line and values is not None:
            self.log.write("metrics", it, {**losses, **values.logged()})
            speed = {"img_per_s": self.speed.img_per_s, "data_wait": self.speed.data_wait, "broken_images": len(self.broken.files)}
            speed["peak_memory_gb"] = peak_memory_gb(self.trainer.device)
            self.log.write("speed", it, speed)
            left_it = self.trainer.length.total_it - it - 1
            self.line.update(it + 1, describe(losses, self.speed, self.trainer.device), self.speed.eta_s(left_it))

    def account(self) -> None:
        """Add up what the ranks could not read, and name each new image once.

        Raises:
            UserError: they are more than the share that is allowed.
        """
        for name in self.broken.add(distributed.gather_objects(self.read.state())):
            distributed.say(f"skipped, cannot be read: {name}")
        self.read = BrokenFiles()
        allowed = self.config.data.broken_share
        if self.broken.over(allowed):
            if distributed.is_main():
                self.broken.write(self.folder)
            counts = self.broken.told(0)[0]
            raise UserError(f"data.root: {counts}, more than data.broken_share={allowed:g} allows; {self.folder} lists them")

    def show(self, it: int, batch: AnyBatch) -> None:
        """Pictures of what the run sees, now and then."""
        period_it = self.config.log.pictures_period_it
        if not period_it or it % period_it:
            return
        backbone = self.trainer.kept_backbone()
        if self.log and self.log.shows_pictures and backbone is not None:
            seen = batch.to(self.trainer.device, self.trainer.dtype)
            crops = seen.global_crops, seen.local_crops
            self.log.pictures(it, training_pictures(backbone, *crops, seen.views, seen.masks, autocast=self.trainer.autocast))

    def probe(self, done: int) -> None:
        """Ask the probes about the network that the run leaves, where it is time."""
        if not self.probes.is_due(done, self.trainer.length.total_it):
            return
        backbone = self.trainer.kept_backbone()
        if self.log and backbone is not None:
            found = self.probes.run(backbone, self.trainer.device, self.trainer.autocast)
            self.now = Progress(**{**asdict(self.now), "probes": found})
            self.log.write("probes", done - 1, found)
        distributed.barrier()

    def save(self, done: int) -> None:
        """Leave a checkpoint; the logs reach the disk before it."""
        if self.log:
            self.log.flush()
        meta = {"config": as_dict(self.config), "n_images": len(self.dataset), "progress": asdict(self.now)}
        self.writer.save(done, self.trainer.tensors(), meta)

    def finish(self) -> None:
        """Leave the backbone (``run.leaves``), the result, the list of broken images, and the last checkpoint in one file."""
        backbone = self.trainer.kept_backbone()
        if not distributed.is_main() or backbone is None:
            return
        config, now = self.config, self.now
        self.broken.write(self.folder)
        for line in self.broken.told():
            distributed.say(line)
        if self.trainer.ranks.is_sharded:
            last, _ = checkpoints.newest(self.folder)
            assert last is not None
            checkpoints.consolidate(last, self.folder)
        origin = self.origin()
        state = {name: tensor.float() for name, tensor in backbone.state_dict().items()}
        path = self.folder / "backbone.safetensors"
        save_backbone(path, state, name=config.backbone.name, flags=backbone.flags, provenance=origin)
        result = Result(
            kind="pretrain",
            method=config.run.method,
            backbone=config.backbone.name,
            effective_epochs=origin["effective_epochs"],
            protocol=pretraining_protocol(config, len(self.dataset)),
            metrics={
                **now.losses,
                **now.probes,
                "img_per_s": now.img_per_s,
                "n_skipped": now.n_skipped,
                "broken_images": len(self.broken.files),
            },
            seed=config.run.seed,
            wall_time_s=now.wall_time_s,
            **provenance(as_dict(config), path),
        )
        write_result(result, self.folder)

    def origin(self) -> dict[str, Any]:
        """What the backbone says of itself. Epochs and images are this run's alone; ``started_from`` tells of those before."""
        config, crops = self.config, self.config.crops
        seen = self.trainer.length.total_it * config.optim.batch_size / len(self.dataset)
        epochs = effective_epochs(seen, crops.n_global, crops.n_local, crops.global_px, crops.local_px)
        learned = config.run.algorithm == "intertwined" and config.losses.position and config.masks.position_share
        origin = {
            "method": config.run.method,
            "effective_epochs": round(epochs, 2),
            "seed": config.run.seed,
            "config_hash": config_hash(as_dict(config)),
            "data": f"{len(self.dataset)} images",
            "position_masks": bool(learned),  # whether pos_mask_token was ever learned
        }
        return {**origin, "started_from": self.started_from} if self.started_from else origin


def told_of(weights: str) -> dict[str, Any]:
    """What a run starts from: the file's name, its hash, and its method and effective epochs where it says them."""
    said = read_checkpoint(weights).provenance
    known = {key: said[key] for key in ("method", "effective_epochs") if said.get(key) is not None}
    return {"file": Path(weights).name, "hash": file_hash(weights), **known}


def in_parts(loader: Iterable[tuple[AnyBatch, tuple[str, ...]]], n_parts: int) -> Iterator[tuple[list[AnyBatch], list[str], float]]:
    """An iteration's batch in its parts, the images that could not be read, and how long the data was waited for (s)."""
    parts, unreadable, since, waited_s = list[AnyBatch](), list[str](), time.perf_counter(), 0.0
    batches = iter(loader)
    try:
        for batch, names in batches:
            waited_s += time.perf_counter() - since
            parts.append(batch)
            unreadable += names
            if len(parts) == n_parts:
                yield parts, unreadable, waited_s
                parts, unreadable, waited_s = [], [], 0.0
            since = time.perf_counter()
    finally:
        # Workers ignore SIGTERM: whatever holds an iterator that broke off (a traceback) would keep the process from ending.
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def checked(pending: list[tuple[int, dict[str, Tensor]]], on_nan: str) -> dict[str, float]:
    """The last of some iterations' terms, averaged over the ranks, as numbers.

    Raises:
        FloatingPointError: one of them, in any of the iterations, is NaN or infinite, and such a step is not to be skipped.
    """
    losses: dict[str, float] = {}
    stacked = [
        distributed.mean_over_ranks(torch.stack([at_least_float32(term) for term in terms.values()])) for _, terms in pending
    ]
    for (it, terms), values in zip(pending, stacked):
        losses = dict(zip(terms, values.tolist()))
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        if wrong and on_nan == "stop":
            raise FloatingPointError(f"iteration {it}: {', '.join(wrong)} is no number: {losses}")
        if wrong:
            distributed.say(f"iteration {it} was skipped: {', '.join(wrong)} is no number")
            losses = {name: value for name, value in losses.items() if name not in wrong}
    return losses
