"""The tables: published numbers, merging of runs, what is marked, and the four formats."""

import csv
import io
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_results import DEVIATIONS, PROTOCOLS, protocol, result

from pretrain.errors import UserError
from pretrain.results.published import published_rows, rows_of_tables
from pretrain.results.render import FORMATS, latex_text, markdown_text, render, render_all
from pretrain.results.rows import Score, backbone_label, merge
from pretrain.results.runs import find_results
from pretrain.results.schema import write_result
from pretrain.results.tables import (
    comparison_table,
    duration_text,
    epochs_text,
    posttraining_table,
    pretraining_table,
)

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT / "pretrain" / "results" / "published_results.csv"


def csv_rows(table):
    return list(csv.DictReader(io.StringIO(render(table, "csv"))))


# --- a scaled-down run never has the bare name ------------------------------------------------------------


def test_a_scaled_result_never_stands_under_the_bare_name_in_any_format():
    metrics = {"box_ap": 12.3, "mask_ap": 11.1}
    runs = [
        result("detection", metrics, DEVIATIONS),
        result("segmentation", {"miou": 22.2}, {"iterations": [160000, 80]}),
        result("pretrain", {"loss": 8.0}, {"epochs": [100, 1]}, weights_hash="other"),
    ]
    for name in PROTOCOLS.values():
        bare = re.compile(re.escape(name) + r"(?!, scaled down \(\d+ changes?\))")
        for format in FORMATS:
            text = render(comparison_table(runs), format) + render(pretraining_table(runs), format)
            assert not bare.search(text), f"{name} stands alone in {format}"
            assert f"{name}, scaled down (" in text
    assert bare.search(
        render(comparison_table([result("segmentation", {"miou": 22.2})]), "md")
    )  # the check can fail


@pytest.mark.parametrize("format, mark", [("md", "‡1"), ("latex", r"$^\ddagger$1"), ("html", "‡1")])
def test_scaled_numbers_are_marked_and_the_foot_note_lists_every_deviation(format, mark):
    text = render(comparison_table([result(metrics={"box_ap": 12.3}, deviations=DEVIATIONS)]), format)
    assert f"12.3 {mark}" in text
    note = next(line for line in text.splitlines() if "22128" in line)
    assert (
        mark in note
        and "60" in note
        and "64" in note
        and "Not comparable with the published numbers." in note
    )


def test_csv_says_in_columns_what_the_marks_say():
    rows = csv_rows(comparison_table([result(metrics={"box_ap": 12.3}, deviations=DEVIATIONS)]))
    (measured,) = [row for row in rows if row["source"] == "measured"]
    assert measured["mark"] == "†‡" and measured["protocol_is_full"] == "false"
    assert measured["detection_protocol"] == "coco-12ep, scaled down (2 changes)"
    assert (
        measured["deviations"]
        == "coco-12ep, scaled down (2 changes): batch_size 64 → 2; iterations 22128 → 60"
    )
    assert all(
        row["protocol_is_full"] == "true" and row["mark"] == ""
        for row in rows
        if row["source"] == "published"
    )


def test_a_run_on_scaled_down_pre_training_is_marked_too():
    pretraining = result("pretrain", {"loss": 8.0}, {"epochs": [100, 1]})
    run = result(metrics={"box_ap": 12.3})
    table = comparison_table([run, pretraining])
    text = render(table, "md")
    assert "12.3 ‡1" in text and "imagenet1k-100ep, scaled down (1 change): epochs 100 → 1" in text
    (measured,) = [row for row in csv_rows(table) if row["source"] == "measured"]
    assert measured["protocol_is_full"] == "false" and measured["detection_protocol"] == "coco-12ep"
    assert measured["pretraining_protocol"] == "imagenet1k-100ep, scaled down (1 change)"
    elsewhere = run.with_changes(weights_hash="000000000000")
    assert "‡" not in render(comparison_table([elsewhere, pretraining]), "md")


# --- published numbers ------------------------------------------------------------------------------------


def numbers_of_the_csv(table=None):
    rows = list(csv.DictReader(CSV.read_text(encoding="utf-8").splitlines()))
    return [row for row in rows if table is None or row["table"] == table]


def test_published_rows_are_the_csv_typed():
    rows, texts = published_rows(), numbers_of_the_csv()
    assert len(rows) == len(texts) == 40
    for row, text in zip(rows, texts):
        assert (row.table, row.method, row.backbone, row.note) == tuple(
            text[key] for key in ("table", "method", "backbone", "note")
        )
        for key in ("effective_epochs", "box_ap", "mask_ap", "ade20k_miou"):
            value = getattr(row, key)
            assert value == float(text[key]) if text[key] else value is None


def test_every_published_number_is_reproduced_in_csv_and_md():
    table = comparison_table([], table="all")
    shown = csv_rows(table)
    lines = [line for line in render(table, "md").splitlines() if line.startswith("| published")]
    assert len(shown) == len(lines) == 40
    groups = [
        row
        for backbone in ("ViT-B/16", "ViT-S/16")
        for row in numbers_of_the_csv()
        if row["backbone"] == backbone
    ]
    for text, row, line in zip(groups, shown, lines):
        for key in (
            "table",
            "method",
            "backbone",
            "effective_epochs",
            "box_ap",
            "mask_ap",
            "ade20k_miou",
            "note",
        ):
            assert row[key] == text[key]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        wanted = [text[key] or "–" for key in ("effective_epochs", "box_ap", "mask_ap", "ade20k_miou")]
        assert cells[3:7] == wanted and cells[1] == markdown_text(text["method"])


def test_tables_are_chosen_by_name():
    rows = published_rows()
    assert {row.table for row in rows_of_tables(rows, "1,7")} == {"1", "7"}
    assert {row.table for row in rows_of_tables(rows, "4")} == {"4a", "4b"}
    assert {row.table for row in rows_of_tables(rows, "4a")} == {"4a"}
    assert rows_of_tables(rows, "all") == rows
    for wrong in ("6", "", "1,", "c"):
        with pytest.raises(UserError, match="no published table"):
            comparison_table([], table=wrong)


def test_only_table_2_is_50_epochs():
    rows = csv_rows(comparison_table([], table="all"))
    assert {(row["table"] == "2", row["detection_protocol"]) for row in rows} == {
        (True, "50 epochs"),
        (False, "12 epochs"),
    }


# --- merging ----------------------------------------------------------------------------------------------


def test_mean_and_standard_deviation_by_hand():
    runs = [result(metrics={"box_ap": value}, seed=i) for i, value in enumerate((40.0, 43.0, 46.0))]
    score = Score.of(runs, "box_ap")
    assert score == Score(43.0, 3.0, 3)  # sqrt((9 + 0 + 9) / 2) = 3
    assert str(score) == "43.0 ± 3.0 (n=3)"
    assert (
        Score.of(runs[:1], "box_ap") == Score(40.0, None, 1) and str(Score.of(runs[:1], "box_ap")) == "40.0"
    )
    assert Score.of(runs, "mask_ap") is None


def test_seeds_are_averaged_and_detection_joins_segmentation():
    boxes, masks, mious = (44.6, 45.1), (39.5, 40.2), (44.0, 44.5, 45.3)
    runs = [result(metrics={"box_ap": b, "mask_ap": m}, seed=i) for i, (b, m) in enumerate(zip(boxes, masks))]
    runs += [result("segmentation", {"miou": value}, seed=i) for i, value in enumerate(mious)]
    (row,) = merge(runs)
    assert [r.seed for r in row.groups[0]] == [0, 1] and [r.seed for r in row.groups[1]] == [0, 1, 2]
    assert row.seeds == "detection 0, 1; segmentation 0, 1, 2"
    table = comparison_table(runs)
    (measured,) = [r for r in csv_rows(table) if r["source"] == "measured"]
    for name, values in (("box_ap", boxes), ("mask_ap", masks), ("ade20k_miou", mious)):
        assert float(measured[name]) == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert float(measured[f"{name}_std"]) == pytest.approx(statistics.stdev(values), abs=1e-6)
        assert measured[f"{name}_n"] == str(len(values))
    assert "44.9 ± 0.4 (n=2)" in render(table, "md")  # 44.85, 0.3536
    assert (
        measured["detection_protocol"] == "coco-12ep" and measured["segmentation_protocol"] == "ade20k-160k"
    )


def test_only_like_runs_are_averaged():
    base = result(metrics={"box_ap": 40.0})
    others = [
        base.with_changes(method="dinov2_dagger"),
        base.with_changes(backbone="vit_base_patch16"),
        base.with_changes(effective_epochs=700.0),
        base.with_changes(protocol=protocol("coco-50ep")),
        base.with_changes(protocol=protocol(version=2)),
        base.with_changes(protocol=protocol(deviations=DEVIATIONS)),
        base.with_changes(config_hash="another hash"),
    ]
    assert len(merge([base, *others])) == 8
    assert all(len(row.groups[0]) == 1 and not row.groups[1] for row in merge([base, *others]))


def test_full_and_scaled_down_never_share_a_row():
    runs = [result(metrics={"box_ap": 44.8}), result("segmentation", {"miou": 5.0}, DEVIATIONS)]
    rows = merge(runs)
    assert [(bool(r.groups[0]), bool(r.groups[1]), len(r.scaled)) for r in rows] == [(1, 0, 0), (0, 1, 1)]


def test_two_pre_trainings_of_one_name_are_no_seeds():
    """Fine-tunings with the seeds 0 and 1 of either: two rows, each with its own segmentation."""
    ap = {"one": (40.0, 42.0), "two": (30.0, 32.0)}
    runs = [result(metrics={"box_ap": ap[w][seed]}, seed=seed, weights_hash=w) for seed in (0, 1) for w in ap]
    runs += [result("segmentation", {"miou": ap[w][0]}, weights_hash=w) for w in ap]
    rows = {row.run.weights_hash: row for row in merge(runs)}
    assert {w: Score.of(row.groups[0], "box_ap").mean for w, row in rows.items()} == {
        "one": 41.0,
        "two": 31.0,
    }
    assert {w: Score.of(row.groups[1], "miou").mean for w, row in rows.items()} == {"one": 40.0, "two": 30.0}


def test_a_copy_of_a_run_counts_once():
    run = result(metrics={"box_ap": 40.0})
    assert len(merge([run, run.with_changes()])[0].groups[0]) == 1


def test_a_sweep_shows_every_configuration_best_first():
    runs = [
        result("segmentation", {"miou": 40.0 + i + seed / 10}, config_hash=f"config{i}", seed=seed)
        for i in range(3)
        for seed in (0, 1)
    ]
    assert [row.configs for row in merge(runs)] == ["config2", "config1", "config0"]
    text = render(comparison_table(runs), "md")
    assert "config config1" in text and "differ in their configuration and are not averaged" in text


def test_the_order_of_the_results_does_not_matter():
    runs = [result(metrics={"box_ap": 40.0 + i}, seed=i, method=m) for i in range(3) for m in ("b", "a")]
    for format in FORMATS:
        assert render(comparison_table(runs), format) == render(comparison_table(runs[::-1]), format)


def test_other_kinds_stay_out_of_the_comparison():
    runs = [result("pretrain", {"loss": 1.0}), result("analysis", {"nmi": 0.3})]
    assert comparison_table(runs) == comparison_table([])


def test_texts():
    assert backbone_label("vit_small_patch16") == "ViT-S/16"
    assert backbone_label("vit_large_patch14_reg4") == "ViT-L/14, 4 registers"
    assert backbone_label("resnet50") == "resnet50"
    assert [epochs_text(e) for e in (1600.0, 346.94, 0.347, None)] == ["1600", "347", "0.35", "–"]
    durations = [duration_text(s) for s in (0.25, 42, 59.7, 200, 3599.6, 18180)]
    assert durations == ["0.25 s", "42 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "5 h 03 min"]


# --- tables and formats -----------------------------------------------------------------------------------


def test_rows_are_grouped_by_backbone_measured_after_published():
    runs = [
        result(metrics={"box_ap": 44.0}),
        result(metrics={"box_ap": 45.0}, backbone="vit_small_patch16_reg4"),
        result(metrics={"box_ap": 30.0}, backbone="vit_tiny_patch16"),
    ]
    groups = comparison_table(runs).groups
    assert [{line.cells[2].split(",")[0] for line in group} for group in groups] == [
        {"ViT-B/16"},
        {"ViT-S/16"},
        {"ViT-T/16"},
    ]
    assert [line.source for line in groups[1]] == ["published"] * 10 + ["measured"] * 2


@pytest.mark.parametrize(
    "format, marks",
    [
        ("md", ["| **measured †** | **intertwined** |"]),
        ("latex", [r"\textbf{measured $^\dagger$} & \textbf{intertwined} &"]),
        ("html", ['<tr class="measured">', "<b>measured †</b>"]),
        ("csv", ["\nmeasured,†,true,intertwined,"]),
    ],
)
def test_measured_rows_differ_in_every_format(format, marks):
    text = render(comparison_table([result(metrics={"box_ap": 44.0})]), format)
    plain = render(comparison_table([]), format)
    assert all(mark in text for mark in marks) and "published" in plain
    assert not any(mark in plain for mark in [*marks, "measured", "Measured", "†"])


NASTY = r"<script>alert('x')</script> a_b & 5% #1 $x$ {y} ~ ^ \cmd | *z* `q`"


def nasty_table():
    run = result(metrics={"box_ap": 1.0}, method=NASTY, backbone=NASTY, deviations={NASTY: [NASTY, "<b>"]})
    return comparison_table([run, result("pretrain", {NASTY: 1.0}, method=NASTY)])


def test_html_is_escaped_and_balanced():
    text = render(nasty_table(), "html")
    assert "<script" not in text and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; a_b &amp; 5%" in text
    open_tags, tables = [], 0

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attrs):
            nonlocal tables
            tables += tag == "table"
            open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Balance().feed(text)
    assert open_tags == [] and tables == 1


def test_markdown_is_escaped():
    text = render(nasty_table(), "md")
    assert "<script" not in text and r"&lt;script&gt;alert('x')&lt;/script&gt; a\_b &amp; 5% \#1" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert widths == {12}  # 11 columns: no cell opens another
    assert markdown_text("a\nb $x$") == r"a b \$x\$"


def test_latex_is_escaped():
    text = latex_text(NASTY)
    assert text == (
        r"\textless{}script\textgreater{}alert('x')\textless{}/script\textgreater{} a\_b \& 5\% \#1 \$x\$ \{y\} "
        r"\textasciitilde{} \textasciicircum{} \textbackslash{}cmd \textbar{} *z* `q`"
    )
    table = render(nasty_table(), "latex")
    assert text in table and all(rule in table for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {10}


def test_csv_keeps_the_text_as_it_is():
    measured = [row for row in csv_rows(nasty_table()) if row["source"] == "measured"]
    assert [row["method"] for row in measured] == [NASTY]


def test_an_unknown_format_is_refused():
    with pytest.raises(UserError, match="'pdf'"):
        render(comparison_table([]), "pdf")


def test_several_tables_make_one_text_and_one_csv_of_like_columns():
    runs = [result(metrics={"box_ap": 44.0}), result("pretrain", {"loss": 8.0})]
    one, two, other = comparison_table(runs), comparison_table([], table="2"), pretraining_table(runs)
    assert render_all([one, two, other], "md") == "\n".join(
        render(table, "md") for table in (one, two, other)
    )
    text = render_all([one, two, other], "csv")
    assert text == render(one, "csv") + render(two, "csv").partition("\n")[2]


def test_pretraining_table():
    assert pretraining_table([result()]) is None
    runs = [
        result("pretrain", {"position": 2.9, "loss": 8.31, "images_per_s": 61.4, "knn": {"top1": 5.0}}),
        result("pretrain", {"loss": 9.0}, method="dinov2_dagger", wall_time_s=200.0, peak_memory_mib=None),
    ]
    table = pretraining_table(runs)
    assert table.columns[5:] == ("loss", "position", "images_per_s", "wall time", "peak memory (MiB)")
    first, second = table.groups[0]
    assert first.cells[:1] + first.cells[5:] == ("dinov2_dagger", "9", "–", "–", "3 min 20 s", "–")
    assert second.cells[:1] + second.cells[5:] == ("intertwined", "8.31", "2.9", "61.4", "12 s", "100")


def test_a_new_methods_losses_need_no_list():
    """The sum, then the addends as the run names them, then the rest by name; beside another method's."""
    metrics = {"loss": 3.0, "zeta": 1.0, "alpha": 2.0, "entropy": 0.5}
    made_up = result("pretrain", metrics, method="made up", loss_terms=("zeta", "alpha"))
    assert pretraining_table([made_up]).columns[5:-2] == ("loss", "zeta", "alpha", "entropy")
    known = result("pretrain", {"loss": 8.0, "koleo": 0.1, "image": 2.0}, loss_terms=("image", "koleo"))
    table = pretraining_table([made_up, known])
    assert table.columns[5:-2] == ("loss", "image", "koleo", "zeta", "alpha", "entropy")
    assert table.groups[0][1].cells[5:-2] == ("3", "–", "–", "1", "2", "0.5")
    after = made_up.with_changes(post_training=True, metrics={"loss": 1.0, "zeta": 1.0}, loss_terms=("zeta",))
    assert pretraining_table([after]) is None and posttraining_table([after]).columns[5:-2] == ("zeta",)


# --- the tool ---------------------------------------------------------------------------------------------


def make_table(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "make_table.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_results_are_found_in_files_folders_and_above(tmp_path):
    a, b = (write_result(result(seed=i), tmp_path / "runs" / name) for i, name in enumerate("ab"))
    assert (
        find_results([tmp_path])
        == find_results([a, tmp_path / "runs" / "b"])
        == find_results([a, b, tmp_path])
        == [a, b]
    )
    (tmp_path / "none").mkdir()
    for wrong in ("none", "absent"):
        with pytest.raises(UserError, match=wrong):
            find_results([tmp_path / wrong])


def test_make_table(tmp_path):
    write_result(result(metrics={"box_ap": 44.0}), tmp_path / "runs" / "a")
    write_result(result("pretrain", {"loss": 8.0}), tmp_path / "runs" / "b")
    run = make_table(tmp_path / "runs", "--format", "csv", "--output", tmp_path / "out" / "t.csv")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "left out of csv: Pre-training runs\n")
    rows = list(csv.DictReader((tmp_path / "out" / "t.csv").open(encoding="utf-8")))
    assert [row["source"] for row in rows].count("measured") == 1 and len(rows) == 21
    assert "Pre-training runs" in make_table(tmp_path / "runs").stdout
    assert make_table(tmp_path / "runs", "--format", "latex").stdout.count(r"\begin{table}") == 2
    html = make_table("--tables", "2", "--format", "html").stdout  # a page of its own, with its style
    assert (
        html.startswith("<!doctype html>")
        and render(comparison_table([], table="2"), "html") in html
        and "<style>" in html
    )
    (tmp_path / "empty").mkdir()
    failed = make_table(tmp_path / "empty")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.strip().count("\n") == 0 and str(tmp_path / "empty") in failed.stderr


def test_without_runs_the_published_rows_alone():
    run = make_table("--tables", "2")
    assert run.returncode == 0 and run.stdout == render(comparison_table([], table="2"), "md")
