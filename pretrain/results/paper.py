"""The paper's Tables 1, 2, 3, 4, 5 and 7 in its own layout, with measured numbers beside the published ones.

A published number has a column under the paper's own name, and only published numbers stand there. Two
columns follow it as soon as a table has anything measured: the mean over seeds, with its standard deviation
and †, and the difference. A measured row without a published one (:mod:`pretrain.results.matching`) follows
the others of its backbone, marked as measured.

A scaled-down run stands in its row with a ‡ and a foot note, and without a difference: there is nothing to
compare. A published row stands once for each configuration of the runs that belong to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pretrain.results import tables
from pretrain.results.matching import METHOD, belongs, further_deviations, same_name
from pretrain.results.published import PublishedRow, published_rows, rows_of_tables
from pretrain.results.rows import Measured, backbone_family, backbone_label, merge
from pretrain.results.schema import Protocol, Result, to_json
from pretrain.results.tables import DIFFERENCE, MEASURED, NONE, FootNotes, Line, Table

COCO, ADE20K = "coco-12ep", "ade20k-160k"  # the protocols of all tables but the second
SCORES = {"box_ap": "AP box", "mask_ap": "AP mask", "ade20k_miou": "mIoU"}


@dataclass(frozen=True)
class Layout:
    """One of the paper's tables.

    Attributes:
        title: what it shows.
        protocols: the fine-tunings whose scores it holds.
        keys: the columns that say what a row is.
        parts: (heading, table of the csv) of its groups of rows; none: one, of the table itself.
        cells: {method in the csv: what stands under ``keys``}; of any other, its name and its effective
            epochs.
        own_rows: whether measured rows without a published one stand in it.
    """

    title: str
    protocols: tuple[str, ...] = (COCO,)
    keys: tuple[str, ...] = ("Method", "Eff. Ep.")
    parts: tuple[tuple[str, str], ...] = ()
    cells: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_rows: bool = False

    @property
    def scores(self) -> dict[str, str]:
        """{name in the csv: column}."""
        has_miou = ADE20K in self.protocols
        return {name: head for name, head in SCORES.items() if name != "ade20k_miou" or has_miou}


def _ablation(title: str, key: str, cells: Mapping[str, str]) -> Layout:
    return Layout(title, keys=(key,), cells={method: (cell,) for method, cell in cells.items()})


LAYOUTS = {
    "1": Layout("COCO and ADE20K", (COCO, ADE20K), own_rows=True),
    "2": Layout("COCO after 50 epochs of fine-tuning", ("coco-50ep",), own_rows=True),
    "3": Layout(
        "what the two parts bring", keys=("Pos. enc. sampling", "L_pos"),
        cells={
            "no position sampling no L_pos": ("", ""), "position sampling": ("✓", ""),
            "L_pos": ("", "✓"), "position sampling + L_pos": ("✓", "✓"),
        },
    ),
    "4a": _ablation(
        "distribution of s", "Dist.",
        {"s constant": "Const.", "s uniform": "Uniform", "s Beta(2,5)": "Beta(2, 5)"},
    ),
    "4b": _ablation("resolution of P", "Pos. size", {"P 19x19": "19 × 19", "P 50x50": "50 × 50"}),
    "5a": _ablation(
        "shape of the position masks", "Pos. mask",
        {"box-wise position mask": "Box-wise", "cross-wise position mask": "Cross-wise"},
    ),
    "5b": _ablation(
        "share of the images with either mask", "Content vs. pos.",
        {"100% content": "100% content masks", "100% position": "100% position masks"},
    ),
    "7": Layout(
        "COCO and ADE20K, with the official DINOv2", (COCO, ADE20K), parts=(("", "1"), ("On 142M dataset", "7")),
        own_rows=True,
    ),
}  # fmt: skip
KEYS = [
    *("table", "source", *tables.METHOD_FIELDS),
    *(f"{name}_{end}" for name in SCORES for end in ("published", "measured", "std", "n", "difference")),
    *("protocol_is_full", *(f"run_{key}" for key in tables.METHOD_FIELDS)),
    *("detection_protocol", "segmentation_protocol", "deviations", "seeds", "config", "note"),
]
ABOUT_METHODS = {
    "Intertwined": "Intertwined is the paper's method.",
    "DINOv2 (ImageNet-1K)": "DINOv2 (ImageNet-1K) is the paper's own baseline.",
    "DINOv2": "On 142M dataset (LVD-142M): the official weights, patch 14 resampled to 16.",
}
OWN_ROWS = "Not in the paper's table"
NOT_COMPARABLE = "Not comparable with the published numbers, so there is no difference."


@dataclass(frozen=True)
class TableRow:
    """One row of a table: published, measured or both; of a measured one alone, ``row`` is of no table.

    ``pretraining``: in what the pre-training of the measured one deviates from the published row's.
    """

    row: PublishedRow
    measured: Measured | None = None
    pretraining: Protocol | None = None

    @classmethod
    def alone(cls, measured: Measured) -> "TableRow":
        """A measured row without a published one."""
        run = measured.run
        about = ("", run.method, backbone_family(run.network), run.effective_epochs)
        return cls(PublishedRow(*about, None, None, None, ""), measured, measured.pretraining)

    def scaled(self, score: str) -> tuple[Protocol, ...]:
        """The protocols from which a measured score deviates; none: it may be compared."""
        protocols = (self.pretraining, self.measured.protocol(score) if self.measured else None)
        return tuple(protocol for protocol in protocols if protocol is not None and protocol.deviations)

    def difference(self, score: str) -> float | None:
        """Measured minus published, in points; None where either is absent or the run was scaled down."""
        printed, measured = self.row.scores[score], self.measured.score(score) if self.measured else None
        return None if printed is None or measured is None or self.scaled(score) else measured.mean - printed


def paper_tables(results: Sequence[Result], published: str = "all") -> list[Table]:
    """The tables one after the other, one a backbone; runs that have no place in them are in a last one.

    The records of all have the same keys, so that they make one csv.

    Args:
        published: "1", "1,2,4a" or "all".

    Raises:
        UserError: an unknown table.
    """
    printed = published_rows()
    wanted = dict.fromkeys(row.table for row in rows_of_tables(printed, published))
    placed: set[str] = set()
    made: list[Table] = []
    for number in wanted:
        entries = _table_rows(number, results, printed)
        placed |= {to_json(run) for entry in entries if entry.measured for run in entry.measured.runs}
        made += _panels(number, entries)
    others = [r for r in results if r.kind == "pretrain" or to_json(r) not in placed]
    further = tables.comparison_table(others, [], "all")
    if further.records:
        rows = merge([result for result in others if not tables.is_elsewhere(result)])
        records = tuple(_record("", TableRow.alone(row)) for row in rows)
        made.append(replace(further, title="Runs that have no row in these tables", records=records))
    return made


def _table_rows(number: str, results: Sequence[Result], printed: Sequence[PublishedRow]) -> list[TableRow]:
    """The published rows in their order, each with the measured ones that belong to it; then the others."""
    layout = LAYOUTS[number]
    known = {r.weights_hash: r.protocol for r in results if r.kind == "pretrain" and r.weights_hash}
    found = merge([r for r in results if r.kind == "pretrain" or r.protocol.name in layout.protocols])
    # Of each: the known protocols of its pre-trainings, each once; [None] where none is known.
    hashes = [[run.weights_hash for run in measured.runs] for measured in found]
    told = [{known[h].identity: known[h] for h in each if h in known} for each in hashes]
    before: list[list[Protocol | None]] = [[*each.values()] or [None] for each in told]
    entries, matched = [], set()
    for row in printed:
        if not set(LAYOUTS[row.table].protocols) & set(layout.protocols):
            continue
        ours = [i for i, known_before in enumerate(before) if len(known_before) == 1]
        fitting = [i for i in ours if belongs(found[i], before[i][0], row)]
        matched |= set(fitting)
        own = [i for i in fitting if same_name(found[i].run.method, row.method)]
        if own and (row.recipe, row.changes) == (METHOD, ""):
            fitting = own  # the method's own run stands in for an ablation's last row
        if row.table in dict(layout.parts or [("", number)]).values():
            beside = [TableRow(row, found[i], further_deviations(before[i][0])) for i in fitting]
            entries += beside or [TableRow(row)]
    if layout.own_rows:
        entries += [TableRow.alone(measured) for i, measured in enumerate(found) if i not in matched]
    return entries


def _panels(number: str, entries: Sequence[TableRow]) -> list[Table]:
    """A table a backbone."""
    printed = list(dict.fromkeys(entry.row.backbone for entry in entries if entry.row.table))
    panels = []
    for family in dict.fromkeys(entry.row.backbone for entry in entries):
        letter = "ab"[printed.index(family)] if len(printed) > 1 and family in printed else ""
        of_paper = f"Table {number}{letter} of the paper"
        where = of_paper if family in printed else f"Beside the paper's Table {number}"
        title = f"{where}: {LAYOUTS[number].title}, {family}"
        panels.append(_panel(number, title, [entry for entry in entries if entry.row.backbone == family]))
    return panels


def _panel(number: str, title: str, entries: Sequence[TableRow]) -> Table:
    layout, notes, groups = LAYOUTS[number], FootNotes(), []
    beside = any(entry.measured is not None for entry in entries)
    n_keys, width = len(layout.keys), 3 if beside else 1
    columns = [*layout.keys]
    for head in layout.scores.values():
        columns += [head, f"measured {MEASURED}", DIFFERENCE][:width]
    columns += ["runs"] * beside
    for heading, table in (*(layout.parts or [("", number)]), (OWN_ROWS, "")):
        part = [entry for entry in entries if entry.row.table == table]
        lines = [_line(layout, entry, entries, notes, beside) for entry in part]
        if lines and heading and len(lines) < len(entries):
            lines.insert(0, tables.heading_line(heading, columns))
        groups += [lines] * bool(lines)
    heads = [("", n_keys), ("COCO", 2 * width)]
    heads += [("ADE20K", width * (len(layout.scores) - 2)), ("", int(beside))]
    scores = range(n_keys, n_keys + width * len(layout.scores))
    measured = frozenset(i for i in scores if (i - n_keys) % width)
    numeric = [*scores, *[1] * ("Eff. Ep." in layout.keys)]
    texts = [*_notes(layout, entries), *notes.texts(NOT_COMPARABLE)]
    records = [_record(number, entry) for entry in entries]
    spans = tuple((text, span) for text, span in heads if span)
    return Table.of(title, columns, groups, texts, numeric, records, heads=spans, measured=measured)


def _line(
    layout: Layout, entry: TableRow, entries: Sequence[TableRow], notes: FootNotes, beside: bool
) -> Line:
    row, measured = entry.row, entry.measured
    usual = (row.method, tables.epochs_text(row.effective_epochs))
    cells = [*layout.cells.get(row.method, usual[: len(layout.keys)])]
    if measured is not None and not row.table:
        # The registers, too, which the family in the title does not tell.
        registers = backbone_label(measured.run.network).removeprefix(row.backbone)
        cells = [f"{row.method}{registers} {MEASURED}", usual[1] + notes.mark(entry.pretraining)]
    scaled = False
    for name in layout.scores:
        printed, text, difference = row.scores[name], "", ""
        if measured is not None and (score := measured.score(name)) is not None:
            scaled |= bool(entry.scaled(name))
            text = f"{score} {MEASURED}{notes.mark(*entry.scaled(name))}"
            if printed is not None and not entry.scaled(name):
                # Of the numbers as shown, so that a reader finds the same.
                difference = tables.signed(round(float(f"{score.mean:.1f}") - printed, 1))
        shown = [NONE if printed is None else f"{printed:.1f}", text, difference]
        cells += shown if beside else shown[:1]
    cells += [_runs(entry, alone=[_place(other) for other in entries].count(_place(entry)) == 1)] * beside
    return Line("published" if row.table else "measured", scaled, tuple(cells))


def _place(entry: TableRow) -> object:
    """Equal for entries that only the configs of their runs set apart."""
    return entry.row if entry.row.table else entry.measured and entry.measured.identity


def _runs(entry: TableRow, alone: bool) -> str:
    """Which runs: their method if the row has another name, seeds, and configs if these set rows apart."""
    if entry.measured is None:
        return ""
    run, seeds = entry.measured.run, entry.measured.seeds
    name = "" if same_name(run.method, entry.row.method) else run.method
    word = "" if ";" in seeds else "seeds " if "," in seeds else "seed "
    config = "" if alone else f"config {entry.measured.configs}"
    return "; ".join(text for text in (name, word + seeds, config) if text)


def _notes(layout: Layout, entries: Sequence[TableRow]) -> list[str]:
    measured = [entry.measured for entry in entries if entry.measured is not None]
    shown = {entry.row.method for entry in entries if entry.row.table}
    texts = ["AP and mIoU in percent." if ADE20K in layout.protocols else "AP in percent."]
    texts += [text for method, text in ABOUT_METHODS.items() if method in shown]
    if measured:
        others = "every score without it is published, as printed in the paper"
        texts.append(f"{MEASURED} Measured with this code; {others}.")
        texts.append(f"{DIFFERENCE}: measured minus published, in points.")
    return texts + tables.seeds_note(measured, SCORES)


def _record(number: str, entry: TableRow) -> dict[str, str]:
    """Of the csv. ``source`` is the row's: measured numbers beside published ones have their own columns."""
    row, measured = entry.row, entry.measured
    values: dict[str, str] = {}
    if measured is not None:
        run = measured.run
        fields = tables.method_fields(run.method, run.network, run.effective_epochs)
        values = tables.measured_values(measured, ()) | {f"run_{key}": text for key, text in fields.items()}
        found = {name: score for name in SCORES if (score := measured.score(name)) is not None}
        scaled = {p.identity: p.text for name in found for p in entry.scaled(name)}
        values |= {"protocol_is_full": str(not scaled).lower(), "deviations": " | ".join(scaled.values())}
        for name, score in found.items():
            values |= tables.score_values(name, score, "_measured")
    if row.table:
        values |= tables.method_fields(row.method, row.backbone, row.effective_epochs) | {"note": row.note}
    for name in SCORES:
        values[f"{name}_published"] = tables.number_text(row.scores[name])
        values[f"{name}_difference"] = tables.number_text(entry.difference(name))
    source = "published" if row.table else "measured"
    return tables.record(KEYS, values | {"table": number, "source": source})
