"""The table of an ablation: pre-trainings that differ in a few settings, each fine-tuned, over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.errors import UserError
from pretrain.results.rows import Score, backbone_label
from pretrain.results.schema import Protocol, Result
from pretrain.results.tables import (
    MEASURED,
    NONE,
    FootNotes,
    Line,
    Table,
    record,
    score_values,
    shown_scores,
)

METRICS = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP"}
SCORE_KEYS = [f"{name}{end}" for name in (*METRICS, "box_ap_gain") for end in ("", "_std")]


@dataclass(frozen=True)
class Trial:
    """One pre-training and the fine-tuning that started from it."""

    pretraining: Result
    finetuning: Result


def ablation_table(trials: Sequence[Trial], reference: str, title: str = "Ablation") -> Table:
    """A row a method, in the order of the trials: mean and sample standard deviation over its seeds.

    The protocols of the pre-trainings, not the method's name, say what a row changes.

    Args:
        trials: of one seed or more a method; a seed counts once.
        reference: the method that the others are compared with, seed by seed.

    Raises:
        UserError: trials of one method that differ in more than their seed, a fine-tuning that differs
            between methods, or one that did not start from its pre-training.
    """
    rows: dict[str, dict[int, Trial]] = {}
    for trial in trials:
        rows.setdefault(trial.pretraining.method, {})[trial.pretraining.seed] = trial
    _check_alike(rows)
    notes, lines, records = FootNotes(), [], []
    base = rows.get(reference, {})
    metrics = shown_scores(METRICS, [trial.finetuning.metrics for trial in trials])
    start = next((trial.pretraining.protocol for trial in base.values()), None)
    for method, by_seed in rows.items():
        some = next(iter(by_seed.values()))
        scores = {name: Score.of([trial.finetuning for trial in by_seed.values()], name) for name in metrics}
        gain = None if method == reference else _gain(by_seed, base, "box_ap")
        changed = NONE if start is None else changes(start, some.pretraining.protocol)
        cells = [f"measured {MEASURED}", method, changed or NONE]
        cells += [notes.score(score, some.finetuning.protocol) for score in scores.values()]
        sign = "" if gain is None or gain.mean < 0 else "+"
        cells += [NONE if gain is None else f"{sign}{gain}", ", ".join(map(str, sorted(by_seed)))]
        lines.append(Line("measured", bool(some.finetuning.protocol.deviations), tuple(cells)))
        row = {"method": method, "changed": changed, "seeds": cells[-1]}
        for name, score in {**scores, "box_ap_gain": gain}.items():
            row |= score_values(name, score)
        records.append(record(["method", "changed", *SCORE_KEYS, "seeds"], row))
    heads = (f"changed from {reference!r}", *metrics.values(), "box AP against it")
    texts = _notes(rows, reference, notes)
    return Table.of(
        title, ("source", "method", *heads, "seeds"), [lines], texts, range(3, 4 + len(metrics)), records
    )


def changes(base: Protocol, other: Protocol) -> str:
    """In which settings one pre-training differs from another, "positions.reference crops → image", or "".

    Both follow one recipe: a setting in which neither deviates from it is the same in both.
    """
    found: dict[str, list[Any]] = {}
    for key in sorted({*base.deviations, *other.deviations}):
        recipe = (base.deviations.get(key) or other.deviations[key])[0]
        before, after = (protocol.deviations.get(key, [recipe, recipe])[1] for protocol in (base, other))
        if before != after:
            found[key] = [before, after]
    return Protocol(name="changes", version=1, full=not found, deviations=found).changes


def _check_alike(rows: dict[str, dict[int, Trial]]) -> None:
    """Each fine-tuning read what its pre-training left; one configuration a method, one protocol for all."""
    for method, by_seed in rows.items():
        for seed, trial in by_seed.items():
            if trial.pretraining.weights_hash != trial.finetuning.weights_hash:
                what = f"the fine-tuning of {method!r}, seed {seed}"
                told = f"ablation: {what}, read other weights than its pre-training left"
                raise UserError(f"{told}; remove its folder and run it again")
        for what in ("pretraining", "finetuning"):
            runs = [getattr(trial, what) for trial in by_seed.values()]
            if len({(run.protocol.identity, run.config_hash) for run in runs}) > 1:
                raise UserError(f"ablation: the {what} runs of {method!r} differ in more than their seed")
    protocols = {trial.finetuning.protocol.identity for trials in rows.values() for trial in trials.values()}
    if len(protocols) > 1:
        raise UserError(f"ablation: {len(protocols)} fine-tuning protocols in one table")


def _gain(by_seed: dict[int, Trial], base: dict[int, Trial], metric: str) -> Score | None:
    """Mean difference to the reference, seed by seed: the noise that a seed brings to both is gone."""
    seeds = sorted(by_seed.keys() & base.keys())
    pairs = [(by_seed[seed].finetuning.metrics, base[seed].finetuning.metrics) for seed in seeds]
    both = [(own[metric], other[metric]) for own, other in pairs if metric in own.keys() & other.keys()]
    return Score.over([own - other for own, other in both])


def _notes(rows: dict[str, dict[int, Trial]], reference: str, notes: FootNotes) -> list[str]:
    texts = [
        "AP in percent; a ± b (n=c): mean and sample standard deviation over c seeds, of pre-training and fine-tuning alike.",
        f"{MEASURED} Measured with this code.",
    ]
    if reference in rows:
        run = next(iter(rows[reference].values())).pretraining
        epochs = "" if run.effective_epochs is None else f", {run.effective_epochs:g} effective epochs"
        of_run = f"{backbone_label(run.network)}{epochs}, {run.protocol.label}."
        departs = f" It departs in: {run.protocol.changes}." if run.protocol.deviations else ""
        texts.append(f"Pre-training of {reference!r}: {of_run}{departs}")
    return texts + notes.texts()
