"""The page of some runs, and which tables the given results make."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from pretrain.results import tables
from pretrain.results.bars import charts
from pretrain.results.curves import MOST_POINTS, Curve, panel, style_of, terms_of
from pretrain.results.dense import dense_table
from pretrain.results.pages import from_template
from pretrain.results.paper import paper_tables
from pretrain.results.published import published_dense
from pretrain.results.render import render
from pretrain.results.rows import backbone_label, seeds_of
from pretrain.results.runs import Run, run_names
from pretrain.results.schema import KINDS, Result
from pretrain.results.strips import strips
from pretrain.results.tables import NONE, Table, duration_text, epochs_text, memory_text

LAYOUTS = ("list", "paper", "dense")
MOST_TERMS = 60  # that are drawn of a stage: a panel takes a tenth of a second
STAGES = {  # of a result, and their heads
    "pretrain": "Pre-training",
    "posttrain": "Post-training",
    "detection": "Detection and instance segmentation",
    "segmentation": "Semantic segmentation",
    "dense": "Dense evaluation without fine-tuning",
    "analysis": "Analysis",
}


def tables_of(
    results: Sequence[Result], layout: str = "list", published: str = "", against: str = ""
) -> list[Table]:
    """All tables that have something to show, the one that was asked for first.

    Args:
        layout: "list": a row for each method and source; "paper": the paper's tables; "dense": published and
            measured dense evaluations. Of dense results alone there is no other table, unless ``published``
            asks for it.
        published: the paper's tables to show ("1", "1,2,7" or "all"); "": list 1, paper all; "none": no published
            row of any source, in the layout "list".
        against: of :func:`dense_table`.

    Raises:
        UserError: an unknown published table, or method to compare with.
    """
    kinds, is_alone = {result.kind for result in results}, published == "none" and layout == "list"
    of_authors = [] if is_alone else published_dense()
    dense = dense_table(results, of_authors, against) if "dense" in kinds or layout == "dense" else None
    has_others = bool(kinds & {"detection", "segmentation"})
    comparisons: list[Table] = []
    if is_alone:
        comparisons = [tables.comparison_table(results, [], "all")] if has_others else []
    elif layout == "paper" and (has_others or published or dense is None):
        comparisons = paper_tables(results, published or "all")
    elif has_others or layout == "list" and (published or dense is None):
        comparisons = [tables.comparison_table(results, table=published or "1")]
    first = [dense, *comparisons] if layout == "dense" else [*comparisons, dense]
    others = (tables.segmentation_table, tables.posttraining_table, tables.pretraining_table)
    return [table for table in (*first, *(make(results) for make in others)) if table is not None]


def build_report(
    runs: Sequence[Run],
    title: str = "Results",
    table: str = "",
    layout: str = "list",
    against: str = "",
    n_left_out: int = 0,
) -> str:
    """The page: bars and tables, pictures side by side, curves, figures, and what repeats the runs; the same bytes
    each time.

    Args:
        runs: in any order: they are sorted by kind, method, backbone and seed.
        table: the published tables to show beside the measured rows: "1", "1,2,7" or "all"; "": none, in the
            layout "paper" 1.
        layout, against: of :func:`tables_of`.
        n_left_out: runs and files that could not be read, which the page says.

    Raises:
        UserError: an unknown table.
    """

    def order(run: Run) -> tuple:
        r = run.result
        key = (list(STAGES).index(r.stage), r.method, r.network, r.protocol.label)
        return *key, r.seed, r.created, r.config_hash, run.folder

    runs = sorted(runs, key=order)
    results, names = [run.result for run in runs], run_names(runs)
    found = tables_of(results, layout, table or {"paper": "1", "list": "none"}.get(layout, ""), against)
    training = tables.posttraining_table(results), tables.pretraining_table(results)
    shared, others = strips(runs, names, STAGES)
    days = sorted({result.created[:10] for result in results})
    return from_template(
        "report.html",
        title=title,
        n_runs=len(runs),
        methods=sorted({result.method for result in results}),
        dates=" to ".join(dict.fromkeys([*days[:1], *days[-1:]])),
        n_left_out=n_left_out,
        n_scaled=sum(bool(result.protocol.deviations) for result in results),
        charts=charts(results, names),
        tables=_drawn(table for table in found if table not in training),
        training=_drawn(table for table in found if table in training),
        strips=shared,
        curves=_curves(runs, names),
        figures=[
            (f"{STAGES[r.stage]}: {name}", r, own) for r, name, own in zip(results, names, others) if own
        ],
        **_about(results, names),
    )


def _about(results: Sequence[Result], names: Sequence[str]) -> dict[str, Any]:
    """What repeats the runs: what each was, where, with which versions, and all that it measured."""
    times = {kind: [r.wall_time_s for r in results if kind in (r.kind, "all")] for kind in (*KINDS, "all")}
    owners = [f"{result.kind}: {name}" for result, name in zip(results, names)]
    overview, hashes, metrics = [], [], []
    for r, name in zip(results, names):
        cost = [duration_text(r.wall_time_s), memory_text(r.peak_memory_mib, " MiB")]
        trained = [backbone_label(r.network), epochs_text(r.effective_epochs), r.protocol.label]
        overview.append([r.kind, name, *trained, *cost])
        commit, _, dirty = (r.git_commit or NONE).partition("+")
        digests = [r.config_hash, r.weights_hash or NONE, commit[:12] + f"+{dirty}" * bool(dirty)]
        hashes.append([r.kind, name, seeds_of([r]), *digests, r.created[:19].replace("T", " ")])
        metrics.append((f"{STAGES[r.stage]}: {name}", r.protocol.text, _entries(_flat(r.metrics))))
    return dict(
        overview=overview,
        times=[[kind, len(each), duration_text(sum(each))] for kind, each in times.items() if each],
        hardware=_distinct([result.hardware for result in results], owners),
        versions=_distinct([result.packages for result in results], owners),
        hashes=hashes,
        metrics=metrics,
    )


def shown(table: Table) -> Table:
    """A table without the columns in which no row says anything."""
    lines = [line for group in table.groups for line in group if line.source != "heading"]
    if table.heads or not lines:  # heads span a number of columns
        return table
    kept = [i for i in range(len(table.columns)) if any(line.cells[i] not in ("", NONE) for line in lines)]
    return replace(
        table,
        columns=_at(kept, table.columns),
        groups=tuple(
            tuple(replace(line, cells=_at(kept, line.cells)) for line in group) for group in table.groups
        ),
        numeric=frozenset(n for n, i in enumerate(kept) if i in table.numeric),
        measured=frozenset(n for n, i in enumerate(kept) if i in table.measured),
    )


def _drawn(found: Iterable[Table]) -> list[tuple[Markup, tuple[str, ...]]]:
    """Tables and, apart, their foot notes."""
    return [(Markup(render(replace(each, notes=()), "html")), each.notes) for each in map(shown, found)]


def _at(kept: Iterable[int], cells: Sequence[str]) -> tuple[str, ...]:
    return tuple(cells[i] for i in kept)


def _distinct(
    mappings: Sequence[Mapping[str, Any]], owners: Sequence[str]
) -> list[tuple[list[str], dict[str, str]]]:
    """Equal mappings once, with the runs that share them."""
    shared: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for mapping, owner in zip(mappings, owners):
        shared.setdefault(tuple(_entries(mapping).items()), []).append(owner)
    return [(who, dict(entries)) for entries, who in shared.items()]


def _curves(
    runs: Sequence[Run], names: Sequence[str]
) -> list[tuple[str, list[Curve], list[Markup], list[Markup], bool, int]]:
    """By stage: its head, curves, panels of the terms to show and of the others, whether a curve is long, how many
    terms are too many."""
    methods = list(dict.fromkeys(sorted(run.result.method for run in runs)))
    found = []
    for stage, head in STAGES.items():
        curves: list[Curve] = []
        for run, name in zip(runs, names):
            if run.result.stage == stage and run.log:
                nth = [curve.result.method for curve in curves].count(run.result.method)
                curves.append(Curve(run.result, name, run.log, *style_of(run.result.method, methods, nth)))
        if curves:
            shown, others = terms_of(curves)
            lone = [term for term in shown if not _is_curve(term, curves)]
            shown, others = [term for term in shown if term not in lone], [*lone, *others]
            terms = [*shown, *others][:MOST_TERMS]
            panels = [Markup(panel(term, curves, f"{stage}-{i}")) for i, term in enumerate(terms)]
            is_long = max(len(curve.log) for curve in curves) > MOST_POINTS
            n_more = len(shown) + len(others) - len(terms)
            found.append((head, curves, panels[: len(shown)], panels[len(shown) :], is_long, n_more))
    return found


def _is_curve(term: str, curves: Sequence[Curve]) -> bool:
    """Whether a run has two values of it."""
    return any(sum(term in terms for terms in curve.log.values()) > 1 for curve in curves)


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"per_class": {"cat": 1.0}} -> {"per_class / cat": 1.0}."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        flat |= _flat(value, f"{prefix}{name} / ") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _entries(mapping: Mapping[str, Any]) -> dict[str, str]:
    return {key: _words(value) for key, value in sorted(mapping.items())}


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
