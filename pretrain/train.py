"""The pre-training run: build, loop, leave ``backbone.safetensors`` and ``result.json``. Nothing clever."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pretrain import checkpoints, distributed, plan
from pretrain.config import from_saved, load_config, run_protocol
from pretrain.data import digest
from pretrain.data.broken import BrokenFiles
from pretrain.data.loader import AnyBatch, ViewsDataset, build_dataset, build_loader
from pretrain.device import choose_device, deterministic
from pretrain.errors import Interrupted, UserError, explained_shortage
from pretrain.evaluation.probes import Probes
from pretrain.files import write_text
from pretrain.log import ProgressLine, log, warnings_into
from pretrain.methods import TrainSettings
from pretrain.metrics_log import MetricsLog, Speed, describe, peak_memory_gb
from pretrain.precision import at_least_float32
from pretrain.results.provenance import config_hash, file_hash, provenance
from pretrain.results.schema import finished, planned, read_result, write_result
from pretrain.run_lock import check_seen, run_lock
from pretrain.schedules import effective_epochs
from pretrain.settings import as_dict, compared, fields, flat, keys_where
from pretrain.signals import StopSignals
from pretrain.trainer import Length, StepLogs, Trainer
from pretrain.weights import license_of, read_checkpoint, save_backbone

# settings that earlier runs did not have
ADDED = tuple(
    f"positions.{key}" for key in ("init", "init_grid", "init_scale", "learnable", "tied", "rescale")
)
COLLAPSED_LINES = 5  # of the log; features of a few first iterations after the warm-up may be alike


def train(
    config: TrainSettings, resume: str = "", stop_after: int | None = None, data_changed: bool = False
) -> Path:
    """Run (or go on with) a pre-training.

    Args:
        config: all settings (:func:`pretrain.config.load_config`).
        resume: ``auto``: go on from the folder's newest whole checkpoint if there is one, a finished run is
            left as it is; or an iteration of it, or a checkpoint's directory; nothing: start.
        stop_after: save and leave at this iteration, as an interruption would.
        data_changed: go on over other images than before. The schedule stays that of the number of images
            that the run began with; the order from here on is that of the new ones; the result is marked.

    Returns:
        the folder, with ``backbone.safetensors``, ``result.json``, logs and the last checkpoints.

    Raises:
        UserError: bad settings, no images, too many broken ones, a folder that holds another run, or a run
            over other images.
        FloatingPointError: a loss is not finite; names the iteration and the terms.
        Interrupted: SIGTERM, SIGUSR1 or Ctrl-C came; the state is saved.
    """
    rule, device = config.run.deterministic, choose_device(config.run.device)
    calm = deterministic(rule == "always" or rule == "cpu" and device.type == "cpu")
    n = 2 * max(config.step.accumulate, 1)
    more = f"set step.accumulate={n}, or step.checkpointing=full, and go on with --resume"
    fewer = f"set data.workers below {config.data.workers} and go on with --resume"
    with run_lock(config.run.output), calm, explained_shortage(more, fewer):
        distributed.start(device.type)
        check_seen(config.run.output)
        dataset = build_dataset(config)
        images = dataset.source.digest() if distributed.is_main() else None
        if images and resume:
            images.begin()  # beside what follows
        config = plan.fitted(config, dataset, device)
        trainer = Trainer(config, Length.of(config, len(dataset)))
        before = prepare(trainer, images, resume, data_changed)
        folder, total_iters = Path(config.run.output), trainer.length.total_iters
        if trainer.iteration >= total_iters and (folder / "result.json").is_file():
            log(f"{folder} is finished ({read_result(folder).created})")
            return folder
        log(plan.in_words(config, trainer.length, len(dataset), device))
        for doubt in plan.doubts(config, trainer.length, dataset.source) if distributed.is_main() else []:
            log(f"warning: {doubt}")
        # until here a signal simply ends the process: there is nothing to save
        with StopSignals() as signals, warnings_into(folder):
            run = Run(trainer, dataset, images, before, signals)
            run.loop(min(total_iters, stop_after or total_iters))
        if trainer.iteration == total_iters:
            run.finish()
            log(plan.what_next(folder / "backbone.safetensors"))
        return folder


def pretrain(
    config: str | Path | None = None, *, resume: str = "", data_changed: bool = False, **changes: Any
) -> Path:
    """Pre-train a backbone; ``posfield pretrain`` in Python.

    Args:
        config: a YAML file, or the name of a recipe or of one of ``configs/pretrain``; None:
            ``intertwined-100ep``.
        resume: ``auto``: go on from the run's newest whole checkpoint.
        data_changed: go on over other images than before, see :func:`train`.
        changes: its settings by group: ``data={"root": "photos"}, optim={"epochs": 3}``.

    Returns:
        the run's folder, with ``backbone.safetensors`` and ``result.json``.

    Raises:
        UserError: names the key and the value.
    """
    return train(load_config(config, changes), resume=resume, data_changed=data_changed)


@dataclass(frozen=True)
class Totals:
    """What a run has come to, besides its state: for its logs and its result."""

    wall_time_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    img_per_s: float = 0.0
    n_skipped: int = 0  # steps that changed nothing, since a loss was not finite
    broken: dict[str, Any] = field(default_factory=dict)  # BrokenFiles.state()
    probes: dict[str, float] = field(default_factory=dict)
    loss_terms: tuple[str, ...] = ()  # names of the loss's addends
    data_changes: tuple[str, ...] = ()  # how its images changed on the way
    n_scheduled: int = 0  # images that its schedule is made for; 0: those that it has


def prepare(
    trainer: Trainer, images: digest.Digest | None, resume: str, data_changed: bool = False
) -> Totals:
    """Bring the trainer to where the run stands: its start, another run's networks, or a checkpoint.

    Args:
        images: of the run, on the main process.

    Raises:
        UserError: the folder holds a run and nothing says to go on with it; or the checkpoint does not belong
            to these settings.
    """
    config, folder = trainer.config, Path(trainer.config.run.output)
    if not resume and checkpoints.whole_directories(folder):
        held = f"{folder} already holds a run"
        raise UserError(f"run.output: {held}; go on with --resume, or choose another folder")
    found, messages = checkpoints.find(folder, resume) if resume else (None, [])
    for message in messages:
        log(message)
    if found is None and messages:
        raise UserError(f"resume: {folder} has checkpoints, but no whole one; move them away to start anew")
    if found is not None:
        check_same_run(found, config)
        now = distributed.gather_objects(images and images.values())[0]
        totals = with_data(totals_of(found), found, now, data_changed)
        checkpoints.load(found, trainer.tensors())
        trainer.iteration = found.iteration
        if totals.n_scheduled:
            trainer.length = Length.of(config, totals.n_scheduled)
        trainer.n_skipped = totals.n_skipped
        log(f"going on from {found.path}")
        return totals
    if config.run.init_from:
        earlier, messages = checkpoints.find(Path(config.run.init_from), config.run.init_from)
        for message in messages:
            log(message)
        assert earlier is not None  # what is asked for by name is there, or find raises
        networks = trainer.networks()
        left = {name for name in earlier.contents() if name.startswith("method.")} - networks.keys()
        if left:
            names = ", ".join(sorted(left)[:4])
            raise UserError(f"run.init_from: {earlier.path} has networks that this run has not: {names}")
        checkpoints.load(earlier, networks)
    return Totals()


def totals_of(found: checkpoints.Found) -> Totals:
    """What a checkpoint's run had come to.

    Raises:
        UserError: it says so in another form.
    """
    try:
        saved = Totals(**found.meta["progress"])
        return replace(saved, loss_terms=tuple(saved.loss_terms), data_changes=tuple(saved.data_changes))
    except TypeError as error:
        raise UserError(f"resume: {found.path / 'meta.json'}: progress cannot be read ({error})") from error


def with_data(totals: Totals, found: checkpoints.Found, now: digest.Values, data_changed: bool) -> Totals:
    """What a checkpoint's run had come to, with what has happened to its images since.

    Args:
        now: the digest of the images.

    Raises:
        UserError: they are others, and that is not wanted.
    """
    if "digest" not in found.meta:
        log(
            f"{found.path} is of an earlier version and holds no digest: only the number of images is compared"
        )
    told = digest.difference({"images": found.meta["n_images"], **found.meta.get("digest", {})}, now)
    digest.accept(f"the run up to {found.path}", told, "resume", data_changed)
    if not told:
        return totals
    changes = (*totals.data_changes, f"iteration {found.iteration}: {told}")
    n_scheduled = totals.n_scheduled or found.meta["n_images"]
    return replace(totals, data_changes=changes, n_scheduled=n_scheduled)


def check_same_run(found: checkpoints.Found, config: TrainSettings) -> None:
    """A checkpoint goes on under the settings that it was made with.

    Settings that may change say so (``fixed=False``). Of ``step`` only how often dropped paths are drawn
    (``step.accumulate``) and where KoLeo looks under ``koleo_scope=local`` touch what is computed, as the
    number of ranks does.

    Raises:
        UserError: names what differs.
    """
    if not {"config", "n_images", "progress"} <= found.meta.keys():
        raise UserError(f"resume: {found.path} is no checkpoint of a pre-training")
    try:
        saved = from_saved(with_method_of(config, found.meta["config"]), config.method)
    except UserError as error:
        raise UserError(f"resume: {found.path / 'meta.json'}: {error}") from error
    free = keys_where(type(config), "fixed", False)
    pairs = compared(flat(without_paths(saved)), flat(without_paths(config)))
    changed = {key: pair for key, pair in pairs.items() if key not in free}
    if changed:
        told = ", ".join(f"{key}={before!r} (now {after!r})" for key, (before, after) in changed.items())
        made = f"{found.path} was made with other settings: {told}"
        raise UserError(f"resume: {made}; set them back, or choose another run.output")


def with_method_of(config: TrainSettings, saved: Any) -> Any:
    """A saved config whose method's file is where it is now; one of another method as it is."""
    if isinstance(saved, Mapping) and Path(str(saved.get("method", ""))).stem == Path(config.method).stem:
        return {**saved, "method": config.method}
    return saved


def without_paths(config: TrainSettings) -> dict[str, Any]:
    """Plain values of a config, its method by name alone: where a method's file lies changes no run."""
    return {**as_dict(config), "method": Path(config.method).stem}


def hashed(config: TrainSettings) -> dict[str, Any]:
    """What a run's ``config_hash`` stands for: :func:`without_paths`, of settings that earlier runs did not have only
    what is away from its default, so that their hashes stay."""
    values = without_paths(config)
    for key, info, _ in fields(type(config)):
        group, _, name = key.rpartition(".")
        if key in ADDED and values[group][name] == info.default:
            del values[group][name]
    return values


def run_name(config: TrainSettings) -> str:
    """The name under which a run's results are reported."""
    return config.run.name or Path(config.method).stem


def learns_positions(trainer: Trainer) -> bool:
    """Whether the run learns a position mask token, which position probes need."""
    token = getattr(trainer.method.backbone, "pos_mask_token", None)
    return token is not None and token.requires_grad


class Run:
    """A run under way: its loader, logs, checkpoints and probes around the trainer."""

    def __init__(
        self,
        trainer: Trainer,
        dataset: ViewsDataset,
        images: digest.Digest | None,
        before: Totals,
        signals: StopSignals,
    ) -> None:
        config = trainer.config
        self.config, self.trainer, self.dataset, self.signals = config, trainer, dataset, signals
        self.images = images
        self.before, self.now = before, before
        self.started, self.folder = time.monotonic(), Path(config.run.output)
        # of the whole run; of this rank since the last look
        self.broken, self.read = BrokenFiles(**before.broken), BrokenFiles()
        # losses not looked at yet, still on the device
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        is_main, patch_size = distributed.is_main(), config.backbone.patch_size
        self.probes = Probes(config.probes, config.data, patch_size, reads=is_main)
        if config.probes.position and self.probes.is_wanted and not learns_positions(trainer):
            never = f"method={config.method} as it is set never learns a position mask token"
            raise UserError(f"probes.position=true, but {never}; set probes.position=false")
        # looked at now: at the end of the run the file may be gone
        weights = config.backbone.weights
        self.started_from = metadata(weights) if weights and is_main else {}
        if is_main:
            planned(Path(config.run.output), **self.result(before))
        self.folder.mkdir(parents=True, exist_ok=True)
        log, is_sharded = config.log, trainer.ranks.is_sharded
        self.writer = checkpoints.Writer(self.folder, log.keep_checkpoints, is_sharded, log.async_checkpoints)
        self.speed = Speed(config.optim.batch_size)
        self.log: MetricsLog | None = None
        self.line: ProgressLine | None = None
        self.numbers: tuple[str, dict[str, float]] = "", {}  # below the bar
        # collapsed lines of the log in a row
        self.n_collapsed = 0
        if is_main:
            write_text(self.folder / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
            self.log = MetricsLog(self.folder, trainer.iteration, log.tensorboard, log.wandb, as_dict(config))
            title = f"pretrain {run_name(config)}"
            self.line = ProgressLine(title, trainer.length.total_iters, trainer.iteration)

    def loop(self, end: int) -> None:
        """Iterations up to ``end``, with logs, probes and checkpoints."""
        config, trainer, log = self.config, self.trainer, self.config.log
        pinned = trainer.device.type == "cuda"
        loader = build_loader(config, self.dataset, trainer.iteration, end, pin_memory=pinned)
        try:
            for micro_batches, unreadable, waited_s in by_iteration(loader, config.step.accumulate):
                it, done = trainer.iteration, trainer.iteration + 1
                is_last = done == trainer.length.total_iters
                is_logged = it % log.every == 0 or is_last
                is_due = done % log.checkpoint_every == 0 or done == end
                logs = trainer.step(micro_batches, examine=is_logged)
                if self.images:
                    self.images.begin()
                self.pending.append((it, logs.losses))
                self.read.record(config.optim.batch_size // distributed.world_size(), unreadable)
                self.speed.tick(waited_s)
                self.tell_estimate(done)
                stopping = self.signals.on_any_rank()
                if is_logged or is_due or stopping:
                    self.log_metrics(it, logs, is_logged)
                self.move(done)
                with self.speed.paused():
                    self.log_images(it, micro_batches[0])
                    self.probe(done)
                    if is_due or stopping:
                        self.save(done)
                if stopping and not is_last:
                    self.writer.wait()
                    signal = self.signals.received or "another rank was signalled"
                    raise Interrupted(f"{signal}; saved at iteration {done}")
            self.writer.wait()
        except UserError as error:  # raised in a worker, it arrives wrapped in the worker's traceback
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from error
        finally:
            if self.log and self.line:
                self.log.close()
                self.line.close()

    def log_metrics(self, it: int, logs: StepLogs, is_logged: bool) -> None:
        """Bring the losses since the last time to the host, refuse what is not finite, log the last ones."""
        self.account()
        losses, self.pending = checked(self.pending, self.config.step.on_nan), []
        seconds = self.before.wall_time_s + time.monotonic() - self.started
        self.now = replace(
            self.before,
            wall_time_s=seconds,
            losses=losses,
            img_per_s=self.speed.img_per_s,
            n_skipped=self.trainer.n_skipped,
            broken=self.broken.state(),
            probes=self.now.probes,
            loss_terms=logs.terms,
        )
        if self.log and self.line and is_logged:
            self.log.write("metrics", it, {**losses, **logs.scheduled})
            speed = {"img_per_s": self.speed.img_per_s, "data_wait": self.speed.data_wait}
            memory = {"peak_memory_gb": peak_memory_gb(self.trainer.device)}
            self.log.write("speed", it, {**speed, "broken_images": len(self.broken.files), **memory})
            self.tell_collapse(it, losses)
            self.show_numbers(it, losses, logs)

    def show_numbers(self, it: int, losses: Mapping[str, float], logs: StepLogs) -> None:
        """What stands below the bar until the next line of the log."""
        length = self.trainer.length
        of_step = {name: losses[name] for name in ("loss", *logs.terms) if name in losses}
        epoch = f"{it // length.epoch_iters + 1}/{self.config.optim.epochs}"
        note = describe(self.speed, self.trainer.device, logs.scheduled["lr"], epoch)
        self.numbers = ("" if "loss" in losses else "skipped  ") + note, of_step

    def move(self, done: int) -> None:
        """The bar."""
        if self.line:
            note, losses = self.numbers
            self.line.update(done, note, self.speed.eta_s(self.line.total - done), losses)

    def tell_estimate(self, done: int) -> None:
        """Say once how long the run will take, when there is something to go by."""
        if estimate := self.speed.estimate(self.trainer.length.total_iters - done):
            log(estimate)

    def tell_collapse(self, it: int, losses: Mapping[str, float]) -> None:
        """Say once that the features collapse, where the method has said so ``COLLAPSED_LINES`` times in a row."""
        told = it >= self.trainer.length.warmup_iters and self.trainer.method.collapse(losses)
        self.n_collapsed = self.n_collapsed + 1 if told else 0
        if self.n_collapsed == COLLAPSED_LINES:
            log(f"warning: iteration {it}: the features collapse: {told}")

    def account(self) -> None:
        """Add up what the ranks could not read, and name each new image once.

        Raises:
            UserError: they are more than the share that is allowed.
        """
        for name in self.broken.add(distributed.gather_objects(self.read.state())):
            log(f"skipped, cannot be read: {name}")
        self.read = BrokenFiles()
        allowed = self.config.data.broken_share
        if self.broken.over(allowed):
            if distributed.is_main():
                self.broken.write(self.folder)
            counts = self.broken.told(0)[0]
            raise UserError(
                f"data.root: {counts}, more than data.broken_share={allowed:g} allows; {self.folder} lists them"
            )

    def log_images(self, it: int, batch: AnyBatch) -> None:
        """Images of what the run sees, now and then."""
        every = self.config.log.images_every
        if not every or it % every:
            return
        backbone = self.trainer.exported_backbone()
        if self.log and self.log.shows_images and backbone is not None:
            from pretrain.analysis.figures import training_images  # loads matplotlib

            seen = batch.to(self.trainer.device, self.trainer.dtype)
            views = seen.global_crops, seen.local_crops, seen.views, seen.masks
            self.log.images(it, training_images(backbone, *views, autocast=self.trainer.autocast))

    def probe(self, done: int) -> None:
        """Ask the probes about the network that the run leaves, where it is time."""
        if not self.probes.is_due(done, self.trainer.length.total_iters):
            return
        backbone = self.trainer.exported_backbone()
        if self.log and backbone is not None:
            found = self.probes.run(backbone, self.trainer.device, self.trainer.autocast)
            self.now = replace(self.now, probes=found)
            self.log.write("probes", done - 1, found)
        distributed.barrier()

    def save(self, done: int) -> None:
        """Leave a checkpoint; the logs reach the disk before it."""
        if self.log:
            self.log.flush()
        meta = {"config": as_dict(self.config), "n_images": len(self.dataset), "progress": asdict(self.now)}
        if self.images:
            meta["digest"] = self.images.values()
        self.writer.save(done, self.trainer.tensors(), meta)

    def finish(self) -> None:
        """Leave the backbone, the result, the list of broken images, and the last checkpoint in one file."""
        backbone = self.trainer.exported_backbone()
        if not distributed.is_main() or backbone is None:
            return
        config, now = self.config, self.now
        self.broken.write(self.folder)
        for line in self.broken.told():
            log(line)
        if self.trainer.ranks.is_sharded:
            last, _ = checkpoints.newest(self.folder)
            assert last is not None
            checkpoints.consolidate(last, self.folder)
        origin = self.origin()
        state = {name: tensor.float() for name, tensor in backbone.state_dict().items()}
        path, name = self.folder / "backbone.safetensors", config.backbone.name
        save_backbone(path, state, name=name, model_kwargs=backbone.model_kwargs, provenance=origin)
        write_result(finished(**self.result(now, path)), self.folder)

    def result(self, now: Totals, backbone: Path | None = None) -> dict[str, Any]:
        """The fields of the run's :class:`Result`, from what it has come to and the file that it leaves."""
        config, origin = self.config, self.origin()
        counts = {"img_per_s": now.img_per_s, "n_skipped": now.n_skipped}
        counts["broken_images"] = len(self.broken.files)
        return {
            "kind": "pretrain",
            "method": run_name(config),
            "backbone": config.backbone.name,
            "patch_px": config.backbone.patch_size,
            "effective_epochs": origin["effective_epochs"],
            "protocol": run_protocol(config, len(self.dataset), digest.deviation(now.data_changes)),
            "metrics": {**now.losses, **now.probes, **counts},
            "seed": config.run.seed,
            "wall_time_s": now.wall_time_s,
            "loss_terms": now.loss_terms,
            "post_training": self.trainer.method.stage == "posttrain",
            **provenance(hashed(config), backbone),
        }

    def origin(self) -> dict[str, Any]:
        """What the backbone says of itself: of this run alone; ``started_from`` tells of those before."""
        config, crops = self.config, self.config.view_settings().crops
        # of a run whose images changed, the epochs are those of its schedule
        n_images = self.before.n_scheduled or len(self.dataset)
        seen = self.trainer.length.total_iters * config.optim.batch_size / n_images
        epochs = effective_epochs(seen, crops.n_global, crops.n_local, crops.global_px, crops.local_px)
        origin = {
            "method": run_name(config),
            "effective_epochs": round(epochs, 2),
            "seed": config.run.seed,
            "config_hash": config_hash(hashed(config)),
            "data": f"{len(self.dataset)} images",
            "position_masks": learns_positions(self.trainer),  # whether pos_mask_token was ever learned
        }
        return {**origin, "started_from": self.started_from} if self.started_from else origin


def metadata(weights: str) -> dict[str, Any]:
    """Of what a run starts from: the file's name, hash, and method, effective epochs and licence if it says them."""
    said = read_checkpoint(weights).provenance
    said = {**said, "license": license_of(said)}
    known = {k: said[k] for k in ("method", "effective_epochs", "license") if said.get(k) is not None}
    return {"file": Path(weights).name, "hash": file_hash(weights), **known}


def by_iteration(
    loader: Iterable[tuple[AnyBatch, tuple[str, ...]]], n_micro_batches: int
) -> Iterator[tuple[list[AnyBatch], list[str], float]]:
    """An iteration's micro-batches, the images that could not be read, and the seconds spent waiting."""
    micro_batches, unreadable, since, waited_s = list[AnyBatch](), list[str](), time.perf_counter(), 0.0
    batches = iter(loader)
    try:
        for batch, names in batches:
            waited_s += time.perf_counter() - since
            micro_batches.append(batch)
            unreadable += names
            if len(micro_batches) == n_micro_batches:
                yield micro_batches, unreadable, waited_s
                micro_batches, unreadable, waited_s = [], [], 0.0
            since = time.perf_counter()
    finally:
        # Workers ignore SIGTERM: what holds a broken-off iterator (a traceback) would keep the process alive.
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def checked(pending: list[tuple[int, dict[str, Tensor]]], on_nan: str) -> dict[str, float]:
    """The last of some iterations' terms, averaged over the ranks, as numbers.

    Raises:
        FloatingPointError: one of them, in any of the iterations, is NaN or infinite, and such a step is not
            to be skipped.
    """
    losses: dict[str, float] = {}
    stacked = [
        distributed.mean_over_ranks(torch.stack([at_least_float32(term) for term in terms.values()]))
        for _, terms in pending
    ]
    for (it, terms), values in zip(pending, stacked):
        losses = dict(zip(terms, values.tolist()))
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        if wrong and on_nan == "stop":
            raise FloatingPointError(f"iteration {it}: {', '.join(wrong)} is not finite: {losses}")
        if wrong:
            log(f"iteration {it} was skipped: {', '.join(wrong)} is not finite")
            losses = {name: value for name, value in losses.items() if name not in wrong}
    return losses
