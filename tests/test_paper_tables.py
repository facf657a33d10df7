"""The paper's tables in its own layout: every number read back out of every format, and which run stands
beside which row."""

import csv
import html
import io
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from recipe_fixture import ABLATIONS, recipe
from test_results import DEVIATIONS, protocol, result
from test_tables import NASTY
from tool_fixture import load_tool

from pretrain.config import run_protocol
from pretrain.errors import UserError
from pretrain.results.matching import METHOD, changed_settings, varied_keys
from pretrain.results.paper import LAYOUTS, paper_tables
from pretrain.results.published import published_rows
from pretrain.results.render import _LATEX, FORMATS, latex_text, render_all
from pretrain.results.schema import write_result
from pretrain.settings import read_yaml
from pretrain.weights.sources import SOURCES

ROOT = Path(__file__).resolve().parents[1]
IMAGENET_1K = 1_281_167  # training images
CSV = list(csv.DictReader((ROOT / "pretrain" / "results" / "published_results.csv").open(encoding="utf-8")))
SCORES = ("box_ap", "mask_ap", "ade20k_miou")
DRAWN = ("md", "latex", "html")
# The paper's tables: (tables of the csv, columns, first cells of the ablations' rows). One a backbone, in the
# csv's order.
ABLATION = ("AP box", "AP mask")
PAPER = {
    "1": (("1",), ("Method", "Eff. Ep.", "AP box", "AP mask", "mIoU"), None),
    "2": (("2",), ("Method", "Eff. Ep.", "AP box", "AP mask"), None),
    "3": (("3",), ("Pos. enc. sampling", "L_pos", *ABLATION), [("", ""), ("✓", ""), ("", "✓"), ("✓", "✓")]),
    "4a": (("4a",), ("Dist.", *ABLATION), [("Const.",), ("Uniform",), ("Beta(2, 5)",)]),
    "4b": (("4b",), ("Pos. size", *ABLATION), [("19 × 19",), ("50 × 50",)]),
    "5a": (("5a",), ("Pos. mask", *ABLATION), [("Box-wise",), ("Cross-wise",)]),
    "5b": (
        ("5b",),
        ("Content vs. pos.", *ABLATION),
        [("100% content masks",), ("100% position masks",), ("50% each",)],
    ),
    "7": (("1", "7"), ("Method", "Eff. Ep.", "AP box", "AP mask", "mIoU"), None),
}


def expected():
    """[(columns, rows)] of every table, one a backbone: from the csv and the layout above alone."""
    tables = []
    for tables_of_csv, columns, keys in PAPER.values():
        rows = [row for row in CSV if row["table"] in tables_of_csv]
        for backbone in sorted({row["backbone"] for row in rows}):
            here = [row for row in rows if row["backbone"] == backbone]
            first = keys or [(row["method"], row["effective_epochs"] or "–") for row in here]
            scores = SCORES[: len(columns) - len(first[0])]
            cells = [
                [*key, *(row[score] or "–" for score in scores)] for key, row in zip(first, here, strict=True)
            ]
            tables.append((list(columns), cells))
    return tables


def read_md(text):
    tables, plain = [], re.compile(r"\\([\\`*_\[\]|~#])")
    for line in text.splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            tables[-1].append(
                [
                    html.unescape(plain.sub(r"\1", cell.removeprefix("**").removesuffix("**")))
                    for cell in cells
                ]
            )
        elif line.startswith("**"):
            tables.append([])
    return [(table[0], [row for row in table[2:] if any(row[1:])]) for table in tables]


def read_latex(text):
    def plain(cell):
        cell = re.sub(r"^\\textbf\{(.*)\}$", r"\1", cell.strip())
        for character, code in sorted(_LATEX.items(), key=lambda item: -len(item[1])):
            cell = cell.replace(code, character)
        return cell

    tables = []
    for table in text.split(r"\begin{table}")[1:]:
        rows = [line.removesuffix(r" \\") for line in table.splitlines() if line.endswith(r" \\")]
        rows = [
            [plain(cell) for cell in re.split(r"(?<!\\)&", row)] for row in rows if "\\multicolumn" not in row
        ]
        tables.append((rows[0], [row for row in rows[1:] if any(row[1:])]))
    return tables


class Tables(HTMLParser):
    """The cells of every table; fails where tags do not balance."""

    def __init__(self):
        super().__init__()
        self.open, self.tables, self.classes = [], [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        attributes = dict(attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.classes.append(attributes.get("class", ""))
        elif tag in ("td", "th"):
            self.tables[-1][-1] += [""] * int(attributes.get("colspan", 1))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def read_html(text):
    page = Tables()
    page.feed(text)
    assert page.open == []
    assert all(len({len(row) for row in table}) == 1 for table in page.tables)  # spans cover the columns
    return [(table[1], [row for row in table[2:] if any(row[1:])]) for table in page.tables]


READ = {"md": read_md, "latex": read_latex, "html": read_html}


def as_measured(row, seeds=(0,), spread=0.0):
    """The runs whose means are a row of the csv; the k-th of three seeds is off by -spread, 0, spread."""
    scores = {name: float(row[name]) for name in SCORES if row[name]}
    registers = "_reg4" if row["method"] == "DINOv2-reg" else ""
    size = {"ViT-B/16": "base", "ViT-S/16": "small"}[row["backbone"]]
    fields = {
        "method": row["method"],
        "backbone": f"vit_{size}_patch16{registers}",
        "effective_epochs": float(row["effective_epochs"]) if row["effective_epochs"] else None,
        "weights_hash": None,
    }
    runs = []
    for k, seed in enumerate(seeds):
        shifted = {name: value + (k - 1) * spread for name, value in scores.items()}
        coco = protocol("coco-50ep" if row["table"] == "2" else "coco-12ep")
        runs.append(
            result("detection", {n: shifted[n] for n in SCORES[:2]}, seed=seed, protocol=coco, **fields)
        )
        if "ade20k_miou" in shifted:
            runs.append(result("segmentation", {"miou": shifted["ade20k_miou"]}, seed=seed, **fields))
    return runs


def drawn(runs, format, tables="all"):
    return render_all(paper_tables(runs, tables), format)


def records(runs, tables="all"):
    return list(csv.DictReader(io.StringIO(drawn(runs, "csv", tables))))


def with_measured(rows):
    return [row for row in rows if row["protocol_is_full"]]


# --- every published number -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", DRAWN)
def test_without_runs_the_tables_are_the_papers_and_nothing_is_marked(format):
    text = drawn([], format)
    assert READ[format](text) == expected()
    assert not re.search(r"measured|†|‡|dagger|Δ|Delta", text, re.I)
    assert (
        len(paper_tables([])) == 10 and sum(len(rows) for _, rows in expected()) == 60
    )  # 40, and Table 1's 20 again in 7


def test_without_runs_the_csv_has_published_rows_alone():
    rows = records([])
    wanted = [
        r for table in PAPER for r in CSV if r["table"] == table or (table == "7" and r["table"] == "1")
    ]
    key = ("method", "backbone", "effective_epochs", "note", *SCORES)
    given = [tuple(r[name if name in r else f"{name}_published"] for name in key) for r in rows]
    assert sorted(given) == sorted(tuple(r[name] for name in key) for r in wanted)
    assert {r["table"] for r in rows} == set(PAPER) and {r["source"] for r in rows} == {"published"}
    empty = re.compile("measured|_std|_n$|difference|run_|protocol|deviations|seeds|config")
    assert not any(row[name] for row in rows for name in row if empty.search(name))


@pytest.mark.parametrize("format", DRAWN)
@pytest.mark.parametrize("seeds, spread, shown", [((0,), 0.0, "{} †"), ((0, 1, 2), 0.3, "{} ± 0.3 (n=3) †")])
def test_the_csv_as_if_measured_gives_every_number_twice(format, seeds, spread, shown):
    runs = [run for row in CSV for run in as_measured(row, seeds, spread)]
    tables = READ[format](drawn(runs, format))
    assert len(tables) == len(expected())  # no table of runs without a row
    for (columns, rows), (wanted_columns, wanted) in zip(tables, expected(), strict=True):
        first = wanted_columns.index("AP box")
        heads = [name for head in wanted_columns[first:] for name in (head, "measured †", "Δ")]
        assert columns == [*wanted_columns[:first], *heads, "runs"]
        assert [row[:first] for row in rows] == [
            row[:first] for row in wanted
        ]  # each row once, and none besides
        for row, numbers in zip(rows, wanted):
            for i, number in enumerate(numbers[first:]):
                triple = row[first + 3 * i : first + 3 * i + 3]
                assert triple == (
                    [number, "", ""] if number == "–" else [number, shown.format(number), "0.0"]
                )
            assert row[-1] == ("seed 0" if len(seeds) == 1 else "seeds 0, 1, 2")


@pytest.mark.parametrize("seeds, spread", [((0,), 0.0), ((0, 1, 2), 0.3)])
def test_the_csv_as_if_measured_as_csv(seeds, spread):
    runs = [run for row in CSV for run in as_measured(row, seeds, spread)]
    rows = records(runs)
    assert len(rows) == 60 and {row["source"] for row in rows} == {
        "published"
    }  # the row is; what was measured has its columns
    originals = {(r["table"], r["method"], r["backbone"]): r for r in CSV}
    originals |= {("7", r["method"], r["backbone"]): r for r in CSV if r["table"] == "1"}
    for row in rows:
        original = originals[row["table"], row["method"], row["backbone"]]
        for name in SCORES:
            number = original[name]
            assert row[f"{name}_published"] == row[f"{name}_measured"] == number
            assert row[f"{name}_difference"] == ("0.0" if number else "")
            assert row[f"{name}_n"] == (str(len(seeds)) if number else "")
            assert row[f"{name}_std"] == (repr(spread) if number and spread else "")
        assert (row["protocol_is_full"], row["run_method"], row["deviations"]) == ("true", row["method"], "")
    named = {row["table"]: row["detection_protocol"] for row in rows}
    assert named == {table: "coco-50ep" if table == "2" else "coco-12ep" for table in PAPER}


def test_a_published_number_never_has_a_mark_and_a_measured_one_always_has():
    runs = [
        run for row in CSV for run in as_measured({**row, "box_ap": "33.3", "mask_ap": "33.3"})
    ]  # 33.3 is none of the paper's
    for format in DRAWN:
        for columns, rows in READ[format](drawn(runs, format)):
            for row in rows:
                for head, cell in zip(columns, row):
                    assert ("33.3" in cell) <= (head == "measured †") and (
                        head == "measured †" and cell != ""
                    ) == ("†" in cell)
    sources = re.findall(r'<tr class="(\w+)', drawn(runs, "html"))
    assert set(sources) == {"published", "heading"} and sources.count("published") == 60


def test_mean_deviation_and_difference():
    boxes, masks, mious = (44.6, 45.1, 45.3), (39.0, 39.5, 39.6), (44.0, 44.5)
    runs = [result(metrics={"box_ap": b, "mask_ap": m}, seed=i) for i, (b, m) in enumerate(zip(boxes, masks))]
    runs += [result("segmentation", {"miou": value}, seed=i) for i, value in enumerate(mious)]
    (row,) = with_measured(records(runs, "1"))
    for name, values, published in zip(SCORES, (boxes, masks, mious), (44.8, 39.8, 44.8)):
        assert float(row[f"{name}_measured"]) == pytest.approx(statistics.fmean(values), abs=1e-6)
        assert float(row[f"{name}_std"]) == pytest.approx(statistics.stdev(values), abs=1e-6)
        assert float(row[f"{name}_difference"]) == pytest.approx(
            statistics.fmean(values) - published, abs=1e-6
        )
        assert row[f"{name}_n"] == str(len(values))
    line = next(line for line in drawn(runs, "md", "1").splitlines() if "†" in line and "Intertwined" in line)
    # box 45.0, mask 39.367, miou 44.25: shown with one decimal, and the difference is that of the numbers
    # shown
    assert (
        "| 44.8 | 45.0 ± 0.4 (n=3) † | +0.2 | 39.8 | 39.4 ± 0.3 (n=3) † | −0.4 | 44.8 | 44.2 ± 0.4 (n=2) † | −0.6 |"
        in line
    )
    assert line.endswith("| detection 0, 1, 2; segmentation 0, 1 |")
    assert r"$-$0.4" in drawn(runs, "latex", "1")


# --- which row --------------------------------------------------------------------------------------------

CONFIGS = {
    "intertwined_vits16": {
        ("1", "Intertwined"),
        ("7", "Intertwined"),
        ("3", "position sampling + L_pos"),
        ("4a", "s Beta(2,5)"),
    }
    | {("4b", "P 50x50"), ("5a", "cross-wise position mask"), ("5b", "50% each")},
    "intertwined_vits16_1gpu": {
        ("1", "Intertwined"),
        ("7", "Intertwined"),
        ("3", "position sampling + L_pos"),
    }
    | {("4a", "s Beta(2,5)"), ("4b", "P 50x50"), ("5a", "cross-wise position mask"), ("5b", "50% each")},
    "dinov2_vits16": {("1", "DINOv2 (ImageNet-1K)"), ("7", "DINOv2 (ImageNet-1K)")},
    "ablation/table3_none": {("3", "no position sampling no L_pos")},
    "ablation/table3_sampling": {("3", "position sampling")},
    "ablation/table3_lpos": {("3", "L_pos")},
    "ablation/table4a_constant": {("4a", "s constant")},
    "ablation/table4a_uniform": {("4a", "s uniform")},
    "ablation/table4b_19": {("4b", "P 19x19")},
    "ablation/table5a_box": {("5a", "box-wise position mask")},
    "ablation/table5b_content": {("5b", "100% content")},
    "ablation/table5b_position": {("5b", "100% position")},
    # the paper has none of these
    "ablation/reference_image": {("1", "intertwined, s of the image"), ("7", "intertwined, s of the image")},
    "coco_vits16": {("1", "intertwined, COCO images"), ("7", "intertwined, COCO images")},
    "highres_vits16": {("1", "intertwined, high resolution"), ("7", "intertwined, high resolution")},
    "intertwined_vits16_small": {("1", "intertwined, batch 64"), ("7", "intertwined, batch 64")},
}


def runs_of_config(name, *overrides, images=IMAGENET_1K, **changes):
    """A pre-training by one of our configs and a fine-tuning of what it left."""
    config = recipe(name, *overrides)
    followed = run_protocol(config, images)
    fields = {"method": config.run.name, "weights_hash": name, **changes}
    return [
        result("pretrain", {"loss": 8.0}, protocol=followed, **fields),
        result(metrics={"box_ap": 40.0}, **fields),
    ]


def test_the_configs_of_the_ablations_are_all_here():
    there = {f"ablation/{path.stem}" for path in ABLATIONS.glob("*.yaml")}
    assert there == {name for name in CONFIGS if "/" in name}
    rows = {row for name in CONFIGS for row in CONFIGS[name]}
    assert rows >= {(r["table"], r["method"]) for r in CSV if r["table"] in ("3", "4a", "4b", "5a", "5b")}
    named = {f"ablation/{row.changes}": row for row in published_rows() if row.changes}
    assert {name: {(row.table, row.method)} for name, row in named.items()} == {
        name: rows for name, rows in CONFIGS.items() if name.startswith("ablation/table")
    }
    bases = {
        row.recipe: read_yaml(ABLATIONS / f"{row.changes}.yaml").values["base"] for row in named.values()
    }
    assert bases == {METHOD: METHOD}
    assert all(set(layout.cells) <= {row.method for row in published_rows()} for layout in LAYOUTS.values())


def test_what_an_ablation_changes_stands_in_its_file_alone():
    off = {"masks.position_share": 0.0, "losses.position": 0.0}
    assert changed_settings("table3_none") == {
        "positions.encoding": "standard",
        "positions.augment": False,
        **off,
    }
    assert changed_settings("table4b_19") == {"positions.grid": 19} and changed_settings("") == {}
    rows = [row for row in published_rows() if row.changes]
    assert varied_keys() == {key for row in rows for key in changed_settings(row.changes)}
    assert {row.recipe for row in rows} == {METHOD} and not [
        key for key in varied_keys() if key.startswith("run.")
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_is_the_row_that_it_says(name):
    pretraining, run = runs_of_config(name)
    places = {(row["table"], row["method"]) for row in with_measured(records([pretraining, run]))}
    assert places == CONFIGS[name]  # by its protocol
    paper = {(r["table"], r["method"]) for r in CSV} | {("7", r["method"]) for r in CSV if r["table"] == "1"}
    assert {(row["table"], row["method"]) for row in with_measured(records([run]))} == places  # by its name
    other = [pretraining.with_changes(method="mine"), run.with_changes(method="mine")]
    places = {(row["table"], row["method"]) for row in with_measured(records(other))}
    assert places == (CONFIGS[name] if CONFIGS[name] <= paper else {("1", "mine"), ("7", "mine")})
    if CONFIGS[name] <= paper:
        assert {row["protocol_is_full"] for row in with_measured(records([pretraining, run]))} == {"true"}


def test_a_known_pre_training_outvotes_the_name():
    runs = runs_of_config("intertwined_vits16", "positions.scale=constant")
    assert runs[1].method == "intertwined"
    (row,) = with_measured(records(runs))
    assert (row["table"], row["method"], row["box_ap_difference"]) == ("4a", "s constant", "-3.0")


def test_both_parts_off_is_not_the_baseline():
    """41.3 / 37.2 in Table 3, 41.9 / 37.7 in Table 1."""
    runs = [*runs_of_config("dinov2_vits16"), *runs_of_config("ablation/table3_none")]
    for given in (runs, [run for run in runs if run.kind == "detection"]):
        found = {
            (row["table"], row["box_ap_published"], row["run_method"])
            for row in with_measured(records(given, "1,3"))
        }
        assert found == {("1", "41.9", "dinov2"), ("3", "41.3", "intertwined, no sampling, no L_pos")}


@pytest.mark.parametrize(
    "method, backbone, epochs, rows",
    [
        ("dinov2", "vit_small_patch16", 346.9, {("1", "41.9"), ("7", "41.9")}),  # our config's
        ("DINOv2 (ImageNet-1K)", "vit_small_patch16", None, {("1", "41.9"), ("7", "41.9")}),
        ("DINOv2", "vit_small_patch16", None, {("7", "47.4")}),  # the official file
        ("DINOv2-reg", "vit_small_patch16_reg4", None, {("7", "46.5")}),
        ("DINOv2-reg", "vit_small_patch16", None, {("7", "46.5")}),
        ("DINOv2", "vit_small_patch16_reg4", None, {("7", "46.5")}),
        ("dinov2", "vit_small_patch16", 34.7, {("1", ""), ("7", "")}),  # neither: too short
        ("dinov2", "vit_small_patch16_reg4", 346.9, {("1", ""), ("7", "")}),
        ("intertwined", "vit_small_patch16_reg4", 346.9, {("1", ""), ("7", "")}),
        ("DINOv2", "vit_small_patch14", None, {("1", ""), ("7", "")}),
        ("ibot", "vit_base_patch16", None, {("1", "47.6"), ("7", "47.6")}),
        ("iBOT", "vit_base_patch16", 1600.0, {("1", "47.6"), ("7", "47.6")}),
        ("iBOT", "vit_base_patch16", 400.0, {("1", ""), ("7", "")}),
        ("CrOC", "vit_base_patch16", None, {("1", ""), ("7", "")}),  # the paper has ViT-S alone
        ("NeCo", "vit_small_patch16", None, {("1", ""), ("7", "")}),
        ("from scratch", "vit_tiny_patch16", None, {("1", ""), ("7", "")}),
    ],
)
def test_names_epochs_and_registers(method, backbone, epochs, rows):
    run = result(metrics={"box_ap": 40.0}, method=method, backbone=backbone, effective_epochs=epochs)
    found = with_measured(records([run]))
    assert {(row["table"], row["box_ap_published"]) for row in found} == rows
    assert {row["source"] for row in found} == ({"measured"} if ("1", "") in rows else {"published"})
    if ("1", "") in rows:
        suffix = ", 4 registers" if "reg4" in backbone else ""
        assert f"| **{method}{suffix} †** |" in drawn([run], "md", "1")


def test_the_sources_of_public_weights_name_their_methods_as_the_tables_do():
    public = {r["method"] for r in CSV if r["table"] in "17"} - {"Intertwined", "DINOv2 (ImageNet-1K)"}
    assert public - {source.method for source in SOURCES} == {
        "DINOv2-reg"
    }  # told from DINOv2 by the registers in the file


def test_50_epochs_and_12_never_meet():
    methods = {"FLSL": None, "intertwined": 346.9, "DINO": None, "intertwined, s constant": 346.9}
    base = result(metrics={"box_ap": 40.0}, protocol=protocol("coco-50ep"))
    at_50 = [
        base.with_changes(method=name, effective_epochs=epochs, weights_hash=name)
        for name, epochs in methods.items()
    ]
    found = {(row["table"], row["method"], row["box_ap_published"]) for row in with_measured(records(at_50))}
    alone = {("2", "DINO", ""), ("2", "intertwined, s constant", "")}  # the paper's Table 2 has no such row
    assert found == {("2", "FLSL", "48.0"), ("2", "Intertwined", "48.7")} | alone
    at_12 = [run.with_changes(protocol=protocol()) for run in at_50]
    assert "2" not in {row["table"] for row in with_measured(records(at_12))}


def test_a_missing_metric_leaves_its_cells_empty():
    (row,) = with_measured(records([result(metrics={"mask_ap": 40.0})], "1"))
    assert [row[f"box_ap_{what}"] for what in ("published", "measured", "std", "n", "difference")] == [
        "44.8",
        "",
        "",
        "",
        "",
    ]
    assert row["mask_ap_difference"] == "0.2"
    assert "| 44.8 |  |  | 39.8 | 40.0 † | +0.2 | 44.8 |  |  |" in drawn(
        [result(metrics={"mask_ap": 40.0})], "md", "1"
    )


def test_two_configurations_of_a_row_are_two_lines():
    runs = [result(metrics={"box_ap": 40.0 + i}, config_hash=f"config{i}") for i in range(2)]
    lines = [
        line
        for line in drawn(runs, "md", "1").splitlines()
        if line.startswith("| Intertwined") and "†" in line
    ]
    assert [re.search("config config.", line)[0] for line in lines] == ["config config1", "config config0"]
    assert all("| 44.8 | 4" in line for line in lines)


def test_fine_tunings_of_two_recipes_under_one_name_are_no_seeds_of_a_row():
    ours, other = (
        runs_of_config("intertwined_vits16", method="mine"),
        runs_of_config("dinov2_vits16", method="mine"),
    )
    runs = [*ours, other[0], other[1].with_changes(seed=1)]
    assert {row["source"] for row in with_measured(records(runs))} == {"measured"}


def test_runs_without_a_place_are_in_a_last_table():
    runs = [
        result(metrics={"box_ap": 50.5}, protocol=protocol("coco-100ep")),
        result(metrics={"box_ap": 44.5}, method="DINOv2", effective_epochs=None),
        result("segmentation", {"miou": 44.5}, method="intertwined, s constant"),
        result(
            "segmentation", {"miou": 70.0}, protocol=protocol("voc2012-40k")
        ),  # has a table of its own in make_table
    ]
    *_, last = paper_tables(runs, "1")
    assert last.title == "Runs that have no row in these tables"
    pairs = sorted((record["box_ap_measured"], record["ade20k_miou_measured"]) for record in last.records)
    assert pairs == [("", "44.5"), ("44.5", ""), ("50.5", "")]
    assert all(record["table"] == "" and record["source"] == "measured" for record in last.records)
    everywhere = {row["box_ap_measured"]: row["table"] for row in with_measured(records(runs))}
    assert everywhere["44.5"] == "7" and everywhere["50.5"] == ""


def test_no_run_is_lost_and_their_order_does_not_matter():
    names = ("intertwined_vits16", "dinov2_vits16", "ablation/table3_lpos", "ablation/reference_image")
    runs = [run for name in names for run in runs_of_config(name)]
    runs = [
        r.with_changes(metrics={"box_ap": 40.0 + i / 8}) if r.kind == "detection" else r
        for i, r in enumerate(runs)
    ]
    for tables in ("1", "2", "3", "4", "7", "all"):
        shown = {row["box_ap_measured"] for row in records(runs, tables)} - {""}
        assert shown == {repr(r.metrics["box_ap"]) for r in runs if r.kind == "detection"}, tables
    for format in FORMATS:
        assert drawn(runs, format) == drawn(runs[::-1], format)


# --- scaled down ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", DRAWN)
def test_a_scaled_down_run_is_marked_and_has_no_difference(format):
    tuning = [result(metrics={"box_ap": 44.9}, deviations=DEVIATIONS)]
    pretraining = runs_of_config("intertwined_vits16", "optim.epochs=10")
    for runs, change in ((tuning, "iterations 22128 → 60"), (pretraining, "optim.epochs 100 → 10")):
        text = drawn(runs, format, "1")
        row = next(row for _, rows in READ[format](text) for row in rows if "†" in "".join(row))
        assert row[:2] == ["Intertwined", "350"] and row[2:5] == [
            "44.8",
            f"{runs[-1].metrics['box_ap']} † ‡1",
            "",
        ]
        note = next(line for line in text.splitlines() if "Not comparable" in line)
        words = {"latex": latex_text(change), "md": change.replace("_", "\\_")}.get(format, change)
        assert words in note and "scaled down (" in note
    for runs in (tuning, pretraining):
        (row,) = with_measured(records(runs, "1"))
        assert (row["protocol_is_full"], row["box_ap_difference"]) == ("false", "") and "→" in row[
            "deviations"
        ]


def test_a_full_and_a_scaled_down_run_of_one_row_are_two_lines():
    runs = [result(metrics={"box_ap": 20.0}, deviations=DEVIATIONS), result(metrics={"box_ap": 45.0})]
    found = [(row["box_ap_measured"], row["box_ap_difference"]) for row in with_measured(records(runs, "1"))]
    assert found == [("45.0", "0.2"), ("20.0", "")]


def test_a_scaled_down_ablation_keeps_its_row():
    runs = runs_of_config("ablation/table3_none", "optim.epochs=10", images=1000)
    (row,) = with_measured(records(runs))
    assert (row["table"], row["method"], row["box_ap_difference"]) == (
        "3",
        "no position sampling no L_pos",
        "",
    )
    assert (
        row["deviations"]
        == "intertwined-100ep, scaled down (2 changes): data.n_images 1281167 → 1000; optim.epochs 100 → 10"
    )


def test_a_setting_that_no_row_has_makes_a_row_of_its_own():
    runs = runs_of_config("intertwined_vits16", "positions.grid=30")
    found = with_measured(records(runs))
    assert {(row["table"], row["source"], row["protocol_is_full"]) for row in found} == {
        ("1", "measured", "false"),
        ("7", "measured", "false"),
    }
    assert "| **intertwined †** | **347 ‡1** | – | 40.0 † ‡1 |  |" in drawn(runs, "md", "1")


# --- formats ----------------------------------------------------------------------------------------------


def every_kind_of_row():
    nasty = result(metrics={"box_ap": 1.0}, method=NASTY, backbone=NASTY, deviations={NASTY: [NASTY, "<b>"]})
    family = nasty.with_changes(backbone="vit_small_patch16")
    return [*runs_of_config("ablation/table4a_constant"), result(metrics={"box_ap": 44.0}), nasty, family]


def test_latex_is_well_formed():
    text = drawn(every_kind_of_row(), "latex")
    assert latex_text(NASTY) in text
    bare = re.sub(r"\\[\\&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    assert not re.search(r"[^\x00-\x7f]", text)  # no character that needs a font or an encoding
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    for command in set(re.findall(r"\\([a-zA-Z]+)", bare)):
        assert command in (
            *(
                "begin",
                "end",
                "caption",
                "centering",
                "resizebox",
                "ifdim",
                "width",
                "linewidth",
                "else",
                "fi",
                "usepackage",
                "par",
                "footnotesize",
                "textbf",
            ),
            *(
                "toprule",
                "midrule",
                "bottomrule",
                "cmidrule",
                "multicolumn",
                "dagger",
                "ddagger",
                "pm",
                "rightarrow",
                "times",
            ),
            *(
                "Delta",
                "checkmark",
                "textbackslash",
                "textasciitilde",
                "textasciicircum",
                "textbar",
                "textless",
                "textgreater",
            ),
        ), command
    for table in text.split(r"\begin{table}")[1:]:
        columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", table)[1])
        for row in (line for line in table.splitlines() if line.endswith(r"\\")):
            spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            cells = len(re.findall(r"(?<!\\)&", row)) + 1
            assert cells - len(spans) + sum(spans) == columns
        rules = [tuple(map(int, pair)) for pair in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", table)]
        assert rules and all(1 < a <= b <= columns for a, b in rules)
        assert (
            table.count(r"\begin{tabular}") == table.count(r"\end{tabular}") == table.count(r"\toprule") == 1
        )


def test_html_and_markdown_are_escaped():
    page = drawn(every_kind_of_row(), "html")
    assert "<script" not in page and html.escape(NASTY) in page and len(read_html(page)) == 12
    text = drawn(every_kind_of_row(), "md")
    assert "<script" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert [row for row in records(every_kind_of_row()) if row["method"] == NASTY]


def test_measured_columns_and_rows_are_tinted_in_html():
    page = drawn([result(metrics={"box_ap": 44.0})], "html", "1")
    assert (
        page.count('<td class="number measured">44.0 †</td>') == 1 and '<td class="number">44.8</td>' in page
    )
    own = drawn([result(metrics={"box_ap": 44.0}, method="NeCo")], "html", "1")
    assert own.count('<tr class="measured">') == 1 and '<tr class="measured">' not in page


# --- the tools --------------------------------------------------------------------------------------------


def test_make_table_in_the_papers_layout(tmp_path, capsys):
    runs = [*runs_of_config("ablation/table4a_constant"), result(metrics={"box_ap": 44.0})]
    for i, run in enumerate(runs):
        write_result(run, tmp_path / "runs" / str(i))
    make_table = load_tool("table").main
    make_table(["--layout", "paper", "--tables", "3,7", "--format", "latex"])
    assert capsys.readouterr().out == drawn([], "latex", "3,7")
    arguments = [
        str(tmp_path / "runs"),
        "--layout",
        "paper",
        "--format",
        "csv",
        "--output",
        str(tmp_path / "t.csv"),
    ]
    make_table(arguments)
    assert capsys.readouterr().err == "left out of csv: Pre-training runs\n"
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == drawn(runs, "csv")
    make_table([str(tmp_path / "runs"), "--layout", "paper"])
    assert drawn(runs, "md") in (shown := capsys.readouterr().out) and "**Pre-training runs**" in shown
    with pytest.raises(UserError, match="no published table '6'"):
        make_table(["--layout", "paper", "--tables", "6"])


def test_the_report_in_the_papers_layout(tmp_path):
    write_result(result(metrics={"box_ap": 44.0}), tmp_path / "run")
    page = tmp_path / "report.html"
    load_tool("report").main(
        [str(tmp_path / "run"), "--output", str(page), "--layout", "paper", "--tables", "1,2"]
    )
    tables = re.findall(
        r"<table.*?</table>", drawn([result(metrics={"box_ap": 44.0})], "html", "1,2"), re.DOTALL
    )
    assert len(tables) == 3 and all(table in page.read_text(encoding="utf-8") for table in tables)
