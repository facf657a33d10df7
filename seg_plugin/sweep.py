"""The protocol's sweep (B.3): every lr and weight decay of the grid, several seeds each; the best by mean mIoU."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.results.schema import FILE_NAME, read_result
from seg_plugin.run import SegmentationRun, train


def points(run: SegmentationRun) -> list[SegmentationRun]:
    """The runs of the grid, in ``output/points/lr_LR_wd_WD/seed_N``; seeds count up from ``run.seed``."""
    return [
        replace(
            run,
            protocol=replace(run.protocol, lr=lr, weight_decay=weight_decay),
            seed=seed,
            output=Path(run.output) / "points" / f"lr_{lr:g}_wd_{weight_decay:g}" / f"seed_{seed}",
        )
        for lr in run.protocol.lr_grid
        for weight_decay in run.protocol.weight_decay_grid
        for seed in range(run.seed, run.seed + run.protocol.seeds)
    ]


def sweep(run: SegmentationRun, resume: bool = False, index: int | None = None) -> Path:
    """Run the whole grid and leave ``sweep.json`` (returned), with the best setting's results in ``best/seed_N``.

    Runs that are finished already are not run again.

    Args:
        resume: go on with unfinished runs of the grid.
        index: run this one alone (an array job's number), and return its ``result.json``; the whole sweep, started after all
            are finished, then only compares.
    """
    runs = points(run)
    if index is not None:
        if not 0 <= index < len(runs):
            raise UserError(f"sweep: there is no run {index}; the grid has 0 to {len(runs) - 1}")
        return train(runs[index], resume)
    results = [(point, train(point, resume)) for point in runs]
    seeds = run.protocol.seeds
    table = [_row(results[first : first + seeds]) for first in range(0, len(results), seeds)]
    best = max(table, key=lambda row: row["mean_miou"])
    for seed, folder in best["runs"].items():
        target = Path(run.output) / "best" / f"seed_{seed}"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(run.output) / folder / FILE_NAME, target / FILE_NAME)
    path = Path(run.output) / "sweep.json"
    path.write_text(json.dumps({"best": best, "grid": table}, indent=2) + "\n", encoding="utf-8")
    return path


def _row(results: list[tuple[SegmentationRun, Path]]) -> dict[str, Any]:
    """One setting of the grid: its seeds' mIoU in percent, and their mean."""
    protocol = results[0][0].protocol
    miou = {str(point.seed): read_result(path).metrics["miou"] for point, path in results}
    return {
        "lr": protocol.lr,
        "weight_decay": protocol.weight_decay,
        "miou": miou,
        "mean_miou": sum(miou.values()) / len(miou),
        "runs": {str(point.seed): str(Path(*Path(point.output).parts[-3:])) for point, _ in results},
    }
