"""The protocol's sweep (B.3): every lr and weight decay of the grid, with several seeds each. The best mean mIoU is
its result.

Each run has a folder, ``output/points/lr_LR_wd_WD/seed_N``. They can run in any order and on any machines. The last to
end finds the results of all others and writes ``output/result.json``; two that end at once write the same bytes.
"""

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pretrain.errors import UserError
from pretrain.jobs import FAILED, LEFT, Runner, Stage, raise_for
from pretrain.log import in_words
from pretrain.results.provenance import config_hash, file_hash
from pretrain.results.runs import POINTS, read_log
from pretrain.results.schema import FILE_NAME, Protocol, Result, read_result, write_result
from pretrain.run_lock import is_held, tidy
from seg_plugin.config import processes
from seg_plugin.hooks import SETTINGS_FILE
from seg_plugin.protocol import SWEEP, with_overrides
from seg_plugin.run import SegmentationRun, train


def points(run: SegmentationRun) -> list[SegmentationRun]:
    """The runs of the grid, with the seeds of a setting in a row. Seeds count up from ``run.seed``."""
    return [
        replace(
            run,
            protocol=with_overrides(run.protocol, {"lr": lr, "weight_decay": weight_decay}),
            seed=seed,
            output=Path(run.output) / POINTS / f"lr_{lr:g}_wd_{weight_decay:g}" / f"seed_{seed}",
        )
        for lr in run.protocol.lr_grid
        for weight_decay in run.protocol.weight_decay_grid
        for seed in range(run.seed, run.seed + run.protocol.seeds)
    ]


def run_point(run: SegmentationRun, index: int, data_changed: bool = False) -> Path:
    """Run one of :func:`points`, resuming it if it has begun, and conclude the sweep if it was the last.

    ``data_changed`` is :func:`seg_plugin.run.train`'s.

    Returns:
        the sweep's ``result.json`` if all runs are done, otherwise this run's.

    Raises:
        UserError: no such run, or as :func:`seg_plugin.run.train`.
    """
    _check_folder(run)
    runs = points(run)
    if not 0 <= index < len(runs):
        raise UserError(f"sweep: there is no run {index}; the grid has 0 to {len(runs) - 1}")
    result = train(runs[index], resume=True, data_changed=data_changed)
    if int(os.environ.get("RANK", 0)) > 0:
        return result
    try:
        return conclude(run) or result
    except UserError as error:  # this run is done; the problem is another's
        warnings.warn(f"the sweep has no result: {error}", stacklevel=2)
        return result


def sweep(run: SegmentationRun, command: Sequence[str], n_at_once: int = 1) -> Path:
    """Run what is left of the grid, ``n_at_once`` at a time, each in its own process. A failure stops no other.

    Args:
        command: runs :func:`run_point`; the index is appended as a word.

    Returns:
        the sweep's ``result.json``.

    Raises:
        UserError: runs failed; names them.
        Interrupted: a signal ended it, or one of its runs. Start it again.
    """
    _check_folder(run)
    if processes() > 1 or "RANK" in os.environ:  # the runs would take them for theirs
        told = "one process starts all runs, --jobs N at a time; to run one on several GPUs: --sweep INDEX"
        raise UserError(f"--sweep: {told}")
    folder = Path(run.output) / POINTS
    tidy(Path(run.output), *{point.output.parent for point in points(run)})
    jobs = {
        str(point.output.relative_to(folder)): [Stage("run", point.output, [*command, str(index)])]
        for index, point in enumerate(points(run))
    }
    ended = Runner(n_at_once, n_gpus=0 if run.device == "cpu" else 1).run(jobs)
    failed, left = ([name for name, how in ended.items() if how == which] for which in (FAILED, LEFT))
    told = f"sweep: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)} (logs in {folder}, RUN.log)"
    raise_for(told if failed else "", left, f"{len(jobs)} runs")
    result = conclude(run)
    assert result is not None, "every run has ended and left its result"
    return result


def _check_folder(run: SegmentationRun) -> None:
    if (Path(run.output) / SETTINGS_FILE).is_file():
        raise UserError(f"output: {run.output} holds a single run; a sweep takes a folder of its own")


def status(run: SegmentationRun) -> str:
    """One line a run: its index, its folder, its state, its iteration and mIoU; at work also the time left."""
    return "\n".join(f"{i:3d}  {point.output}  {_state(point)}" for i, point in enumerate(points(run)))


def _state(run: SegmentationRun) -> str:
    """``-`` (not begun), ``done, mIoU``, ``at work``, ``stopped``, and the iteration of the newest line."""
    folder, most = Path(run.output), run.protocol.max_iters
    if (folder / FILE_NAME).is_file():
        return f"done  {_result(folder).metrics['miou']:.2f}"
    if not (folder / "metrics.jsonl").is_file():
        return "at work" if is_held(folder) else "-"
    log = read_log(folder / "metrics.jsonl", [])
    at = max(log, default=0)
    scores = [terms["miou"] for terms in log.values() if "miou" in terms]
    told = f"iteration {at:,} of {most:,}" + (f", mIoU {scores[-1]:.2f}" if scores else "")
    if not is_held(folder):
        return f"stopped at {told}"
    seconds = [float(line["time"]) for line in _timed(folder)][-20:]
    left = f", {in_words(fmean(seconds) * (most - at))} left" if seconds else ""
    return f"at work, {told}{left}"


def _timed(folder: Path) -> list[dict[str, Any]]:
    """The newest start's lines in mmengine's log that say the seconds of an iteration."""
    logs = sorted(folder.glob("*/vis_data/scalars.json"))
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
    found = []
    for line in lines:
        with suppress(ValueError):  # cut off
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "time" in line and "loss" in line]


def conclude(run: SegmentationRun) -> Path | None:
    """Write the sweep's ``result.json`` once every run of the grid has one. Returns None before that.

    Raises:
        UserError: the runs are not of one sweep: they have different weights or recipes.
    """
    runs = points(run)
    if not all((point.output / FILE_NAME).is_file() for point in runs):
        return None
    results = [_result(point.output) for point in runs]
    weights_hash = file_hash(run.weights, results[0].weights_hash) if run.weights else None
    for point, result in zip(runs, results):
        told = ""
        if result.weights_hash != weights_hash:
            told = f"is a run of other weights than {run.weights}; remove it"
        elif _deviations(result) != _deviations(results[0]):
            told = f"and {runs[0].output} follow different recipes; remove one"
        if told:
            raise UserError(f"sweep: {point.output} {told} and start again")
    return write_result(_summary(runs, results), run.output)


def _result(folder: Path) -> Result:
    """Of a run of the grid.

    Raises:
        UserError: it cannot be read, or says too little; names it.
    """
    result = read_result(folder)
    for name in ("miou", "macc", "aacc", "iou"):
        if name not in result.metrics:
            raise UserError(f"sweep: {folder / FILE_NAME} has no {name}; remove its folder and start again")
    return result


def _deviations(result: Result) -> dict[str, list[Any]]:
    """A run's deviations, without its place in the grid. A changed grid shows in ``lr_grid``."""
    changed = result.protocol.deviations.items()
    return {key: pair for key, pair in changed if key not in (SWEEP, "lr", "weight_decay")}


def _summary(runs: list[SegmentationRun], results: list[Result]) -> Result:
    """The best setting's result over its seeds, with all settings under ``grid``."""
    n = runs[0].protocol.seeds
    grid = [_scores(runs[i : i + n], results[i : i + n]) for i in range(0, len(runs), n)]
    best = max(range(len(grid)), key=lambda index: grid[index]["miou"])
    of_seeds = results[best * n : (best + 1) * n]
    first, changed = of_seeds[0], _deviations(of_seeds[0])
    metrics = {name: fmean(r.metrics[name] for r in of_seeds) for name in ("macc", "aacc")}
    ious = [result.metrics["iou"] for result in of_seeds]
    per_class = {name: fmean(iou[name] for iou in ious if name in iou) for name in sorted(set().union(*ious))}
    named = {f"lr {way['lr']:g}, weight decay {way['weight_decay']:g}": way for way in grid}
    memory = [result.peak_memory_mib for result in results if result.peak_memory_mib is not None]
    return first.with_changes(
        protocol=Protocol(
            name=first.protocol.name, version=first.protocol.version, full=not changed, deviations=changed
        ),
        metrics={**metrics, **grid[best], "iou": per_class, "grid": named},
        config_hash=config_hash({"sweep": sorted({result.config_hash for result in results})}),
        wall_time_s=sum(result.wall_time_s for result in results),
        peak_memory_mib=max(memory, default=None),
        created=max(result.created for result in results),
    )


def _scores(runs: list[SegmentationRun], results: list[Result]) -> dict[str, Any]:
    """A setting's numbers, and its mIoU in percent: mean, sample standard deviation, and each seed's."""
    miou = {str(run.seed): result.metrics["miou"] for run, result in zip(runs, results)}
    spread = {"miou_std": stdev(miou.values())} if len(miou) > 1 else {}
    setting = {"lr": runs[0].protocol.lr, "weight_decay": runs[0].protocol.weight_decay, "seeds": len(miou)}
    return {"miou": fmean(miou.values()), **spread, "miou_by_seed": miou, **setting}
