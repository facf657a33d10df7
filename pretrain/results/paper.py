"""The paper's Tables 1, 2, 3, 4, 5 and 7 in its own layout, with measured numbers beside the published ones.

A published number has a column under the paper's own name, and only published numbers stand there. Two
columns follow it as soon as a table has anything measured: the mean over seeds, with its standard deviation
and †, and the difference. A measured row without a published one (:mod:`pretrain.results.matching`) follows
the others of its backbone, marked as measured.

A scaled-down run stands in its row with a ‡ and a foot note, and without a difference: there is nothing to
compare. A published row stands once for each configuration of the runs that belong to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pretrain.results.layouts import ADE20K, LAYOUTS, SCORES, Layout
from pretrain.results.matching import belongs, further_deviations, is_method, same_name
from pretrain.results.merge import Measured, Score, backbone_family, backbone_label, merge
from pretrain.results.published import PublishedRow, published_rows, rows_of_tables
from pretrain.results.schema import Protocol, Result, to_json
from pretrain.results.tables import (
    MEASURED,
    NONE,
    PROTOCOL_FIELDS,
    FootNotes,
    Line,
    Table,
    comparison_table,
    epochs_text,
    is_elsewhere,
    method_fields,
    scores_of,
    seeds_note,
    signed,
)

DIFFERENCE = "Δ"
OWN_ROWS = "Not in the paper's table"
NOT_COMPARABLE = "Not comparable with the published numbers, so there is no difference."


@dataclass(frozen=True)
class TableRow:
    """One row of a table: published, measured or both.

    ``pretraining``: in what the pre-training of the measured one deviates from the published row's.
    """

    row: PublishedRow | None
    measured: Measured | None
    pretraining: Protocol | None = None

    @property
    def family(self) -> str:
        """ "ViT-S/16"."""
        if self.row is not None:
            return self.row.backbone
        assert self.measured is not None
        return backbone_family(self.measured.run.backbone)

    def scaled(self, score: str) -> tuple[Protocol, ...]:
        """The protocols from which a measured score deviates; none: it may be compared."""
        assert self.measured is not None
        _, detection, segmentation = self.measured.protocols
        tuning = segmentation if score == "ade20k_miou" else detection
        return tuple(
            protocol
            for protocol in (self.pretraining, tuning)
            if protocol is not None and protocol.deviations
        )

    def difference(self, score: str) -> float | None:
        """Measured minus published, in points; None where either is absent or the run was scaled down."""
        printed = getattr(self.row, score, None)
        measured = None if self.measured is None else scores_of(self.measured)[score]
        return None if printed is None or measured is None or self.scaled(score) else measured.mean - printed


def paper_tables(results: Sequence[Result], tables: str = "all") -> list[Table]:
    """The tables one after the other, one a backbone; runs that have no place in them are in a last one.

    The records of all have the same keys, so that they make one csv.

    Args:
        tables: "1", "1,2,4a" or "all".

    Raises:
        UserError: an unknown table.
    """
    printed = published_rows()
    wanted = dict.fromkeys(row.table for row in rows_of_tables(printed, tables))
    placed: set[str] = set()
    made = []
    for number in wanted:
        entries = _table_rows(LAYOUTS[number], results, printed)
        for entry in entries:
            if entry.measured is not None:
                placed |= {to_json(run) for run in entry.measured.runs}
        made += _panels(number, entries)
    return [
        *made,
        *_further(
            [result for result in results if result.kind == "pretrain" or to_json(result) not in placed]
        ),
    ]


def _table_rows(layout: Layout, results: Sequence[Result], printed: Sequence[PublishedRow]) -> list[TableRow]:
    """The published rows in their order, each with the measured ones that belong to it; then the others."""
    known: dict[str | None, Protocol] = {r.weights_hash: r.protocol for r in results if r.kind == "pretrain"}
    known.pop(None, None)
    found = merge([r for r in results if r.kind == "pretrain" or r.protocol.name in layout.protocols])
    before = [_pretrainings(measured, known) for measured in found]
    entries, matched = [], set()
    for row in printed:
        if not set(LAYOUTS[row.table].protocols) & set(layout.protocols):
            continue
        fitting = [
            i
            for i, measured in enumerate(found)
            if len(before[i]) == 1 and belongs(measured, before[i][0], row)
        ]
        matched |= set(fitting)
        own = [i for i in fitting if same_name(found[i].run.method, row.method)]
        if is_method(row) and own:  # the method's own run stands in for an ablation's last row
            fitting = own
        if row.table in dict(layout.parts).values():
            beside = [TableRow(row, found[i], further_deviations(before[i][0])) for i in fitting]
            entries += beside or [TableRow(row, None)]
    if layout.own_rows:
        entries += [
            TableRow(None, measured, measured.pretraining)
            for i, measured in enumerate(found)
            if i not in matched
        ]
    return entries


def _pretrainings(measured: Measured, known: Mapping[str | None, Protocol]) -> list[Protocol | None]:
    """The known protocols of the pre-trainings of a measured row, each once; [None] where none is known."""
    hashes = [run.weights_hash for run in measured.runs]
    return [*{known[name].identity: known[name] for name in hashes if name in known}.values()] or [None]


def _panels(number: str, entries: Sequence[TableRow]) -> list[Table]:
    """A table a backbone."""
    layout = LAYOUTS[number]
    families = list(dict.fromkeys(entry.family for entry in entries))
    printed = list(dict.fromkeys(entry.family for entry in entries if entry.row is not None))
    tables = []
    for family in families:
        letter = "ab"[printed.index(family)] if len(printed) > 1 and family in printed else ""
        where = (
            f"Table {number}{letter} of the paper"
            if family in printed
            else f"Beside the paper's Table {number}"
        )
        title = f"{where}: {layout.title}, {family}"
        tables.append(_panel(number, title, [entry for entry in entries if entry.family == family]))
    return tables


def _panel(number: str, title: str, entries: Sequence[TableRow]) -> Table:
    layout, notes, groups = LAYOUTS[number], FootNotes(), []
    beside = any(entry.measured is not None for entry in entries)
    n_keys, width = len(layout.keys), 3 if beside else 1
    columns = [*layout.keys]
    for head in layout.scores.values():
        columns += [head, f"measured {MEASURED}", DIFFERENCE][:width]
    columns += ["runs"] * beside
    for heading, table in (*layout.parts, (OWN_ROWS, "")):
        part = [entry for entry in entries if (entry.row.table if entry.row is not None else "") == table]
        lines = [_line(layout, entry, entries, notes, beside) for entry in part]
        if lines and heading and len(lines) < len(entries):
            lines.insert(0, Line("heading", False, (heading, *[""] * (len(columns) - 1))))
        groups += [tuple(lines)] if lines else []
    heads = [
        ("", n_keys),
        ("COCO", 2 * width),
        ("ADE20K", width * (len(layout.scores) - 2)),
        ("", int(beside)),
    ]
    scores = range(n_keys, n_keys + width * len(layout.scores))
    return Table(
        title=title,
        columns=tuple(columns),
        groups=tuple(groups),
        notes=(*_notes(layout, entries), *notes.texts(NOT_COMPARABLE)),
        numeric=frozenset([*scores, *([1] if "Eff. Ep." in layout.keys else [])]),
        records=tuple(_record(number, entry) for entry in entries),
        heads=tuple((text, span) for text, span in heads if span),
        measured=frozenset(i for i in scores if (i - n_keys) % 3) if beside else frozenset(),
    )


def _line(
    layout: Layout, entry: TableRow, entries: Sequence[TableRow], notes: FootNotes, beside: bool
) -> Line:
    row, measured = entry.row, entry.measured
    scores = {} if measured is None else scores_of(measured)
    if row is not None:
        cells = [
            *layout.cells.get(row.method, (row.method, epochs_text(row.effective_epochs))[: len(layout.keys)])
        ]
    else:
        assert measured is not None
        epochs = epochs_text(measured.run.effective_epochs) + notes.mark(entry.pretraining)
        cells = [f"{_who(measured)} {MEASURED}", epochs]
    for name in layout.scores:
        printed, score = getattr(row, name, None), scores.get(name)
        text = "" if score is None else f"{score} {MEASURED}{notes.mark(*entry.scaled(name))}"
        shown = [
            NONE if printed is None else f"{printed:.1f}",
            text,
            _signed(entry.difference(name), printed, score),
        ]
        cells += shown if beside else shown[:1]
    cells += [_runs(entry, alone=[_place(other) for other in entries].count(_place(entry)) == 1)] * beside
    scaled = any(entry.scaled(name) for name, score in scores.items() if score is not None)
    return Line("measured" if row is None else "published", scaled, tuple(cells))


def _place(entry: TableRow) -> object:
    """Equal for entries that only the configs of their runs set apart."""
    if entry.row is not None:
        return entry.row
    assert entry.measured is not None
    return entry.measured.identity


def _who(measured: Measured) -> str:
    """The method; with the registers, which the family in the title does not tell."""
    label, family = backbone_label(measured.run.backbone), backbone_family(measured.run.backbone)
    return measured.run.method + label.removeprefix(family)


def _signed(difference: float | None, printed: float | None, score: Score | None) -> str:
    """Of the numbers as shown, so that a reader finds the same."""
    if difference is None or printed is None or score is None:
        return ""
    return signed(round(float(f"{score.mean:.1f}") - printed, 1))


def _runs(entry: TableRow, alone: bool) -> str:
    """Which runs: their method if the row has another name, seeds, and configs if these set rows apart."""
    if entry.measured is None:
        return ""
    run, seeds = entry.measured.run, entry.measured.seeds
    name = "" if entry.row is None or same_name(run.method, entry.row.method) else run.method
    word = "" if ";" in seeds else "seeds " if "," in seeds else "seed "
    return "; ".join(
        text for text in (name, word + seeds, "" if alone else f"config {entry.measured.configs}") if text
    )


def _notes(layout: Layout, entries: Sequence[TableRow]) -> list[str]:
    texts = ["AP and mIoU in percent."] if ADE20K in layout.protocols else ["AP in percent."]
    measured = [entry.measured for entry in entries if entry.measured is not None]
    shown = {entry.row.method for entry in entries if entry.row is not None}
    if "Intertwined" in shown:
        texts.append("Intertwined is the paper's method.")
    if "DINOv2 (ImageNet-1K)" in shown:
        texts.append("DINOv2 (ImageNet-1K) is the paper's own baseline.")
    if "DINOv2" in shown:
        texts.append("On 142M dataset (LVD-142M): the official weights, patch 14 resampled to 16.")
    if measured:
        others = "every score without it is published, as printed in the paper"
        texts.append(f"{MEASURED} Measured with this code; {others}.")
        texts.append(f"{DIFFERENCE}: measured minus published, in points.")
    return texts + seeds_note(measured)


def _further(results: Sequence[Result]) -> list[Table]:
    """What has no place in the tables asked for."""
    table = comparison_table(results, [], "all")
    if not table.records:
        return []
    rows = merge([result for result in results if not is_elsewhere(result)])
    records = tuple(_record("", TableRow(None, row, row.pretraining)) for row in rows)
    return [replace(table, title="Runs that have no row in these tables", records=records)]


def _record(number: str, entry: TableRow) -> dict[str, str]:
    """Of the csv. ``source`` is the row's: measured numbers beside published ones have their own columns."""
    row, measured = entry.row, entry.measured
    scores = {} if measured is None else scores_of(measured)
    record = {"table": number, "source": "measured" if row is None else "published"}
    if row is not None:
        record |= method_fields(row.method, row.backbone, row.effective_epochs)
    else:
        assert measured is not None
        record |= method_fields(
            measured.run.method, backbone_label(measured.run.backbone), measured.run.effective_epochs
        )
    for name in SCORES:
        score = scores.get(name)
        record[f"{name}_published"] = _number(getattr(row, name, None))
        record[f"{name}_measured"] = _number(None if score is None else score.mean)
        record[f"{name}_std"] = _number(None if score is None else score.std)
        record[f"{name}_n"] = "" if score is None else str(score.n)
        record[f"{name}_difference"] = _number(entry.difference(name))
    return record | _origin(entry, scores) | {"note": "" if row is None else row.note}


def _origin(entry: TableRow, scores: Mapping[str, Score | None]) -> dict[str, str]:
    """The part of a record that says what was measured; empty for a published row alone."""
    names = ("protocol_is_full", "run_method", "run_backbone", "run_effective_epochs", *PROTOCOL_FIELDS[1:])
    if entry.measured is None:
        return dict.fromkeys((*names, "deviations", "seeds", "config"), "")
    run = entry.measured.run
    scaled = {
        p.identity: p for name, score in scores.items() if score is not None for p in entry.scaled(name)
    }
    protocols = ["" if protocol is None else protocol.label for protocol in entry.measured.protocols[1:]]
    values = (
        str(not scaled).lower(),
        *method_fields(run.method, run.backbone, run.effective_epochs).values(),
        *protocols,
    )
    return dict(zip(names, values)) | {
        "deviations": " | ".join(p.text for p in scaled.values()),
        "seeds": entry.measured.seeds,
        "config": entry.measured.configs,
    }


def _number(value: float | None) -> str:
    """Not rounded to a decimal; "" for None."""
    return "" if value is None else repr(round(value, 6) + 0.0)
