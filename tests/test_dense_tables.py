"""The table of dense evaluations: published anchors, seeds, marks, differences, and where it stands among
the other tables."""

import csv
import io
import re
import statistics

import pytest
from test_results import DEVIATIONS, protocol, result
from tool_fixture import load_tool

from pretrain.errors import UserError
from pretrain.results.dense import METRICS, SETS, dense_table
from pretrain.results.published import PublishedDense, published_dense
from pretrain.results.render import FORMATS, render
from pretrain.results.report import build_report, tables_of
from pretrain.results.runs import Run
from pretrain.results.schema import read_result, to_json, write_result
from pretrain.results.tables import posttraining_table, pretraining_table


def dense(name="voc2012", metrics=None, deviations=None, **changes):
    told = {"protocol": protocol(f"dense-{name}", deviations), **changes}
    return result("dense", metrics or {"linear_miou": 70.0}, **told)


def posttrained(loss="cka", value=0.3, **changes):
    metrics = {"loss": value, loss: value, "overlaps": 0.6, "img_per_s": 100.0}
    return result("pretrain", metrics, protocol=protocol("paka-25ep"), method=f"with {loss}", **changes)


def csv_rows(table):
    return list(csv.DictReader(io.StringIO(render(table, "csv"))))


def cells(line):
    """Of a row in Markdown."""
    return [cell.strip(" *") for cell in line.strip("|").split(" | ")]


# --- published numbers ------------------------------------------------------------------------------------


def test_the_published_anchors():
    """Linear and in-context mIoU on Pascal VOC."""
    shown = [
        (row.method, row.backbone, row.scores.get("linear_miou"), row.scores.get("in_context_hungarian_miou"))
        for row in published_dense()
    ]
    assert shown == [
        ("DINO", "ViT-S/16", 50.2, 46.6),
        ("iBOT", "ViT-S/16", 66.1, None),
        ("CrIBo", "ViT-S/16", 71.6, 73.2),
        ("NeCo", "ViT-S/16", 68.6, None),
        ("DINOv2R", "ViT-S/14", 74.2, 79.4),
        ("NeCo", "ViT-S/14", 81.3, 81.0),
    ]
    assert {row.set for row in published_dense()} == {"voc2012"} <= set(SETS)
    assert {name for row in published_dense() for name in row.scores} <= set(METRICS)


def test_without_measured_rows_the_published_ones_alone():
    table = dense_table([])
    assert [row["source"] for row in csv_rows(table)] == ["published"] * 6
    assert "linear mIoU" in table.columns and "clustering mIoU" not in table.columns  # no row has it
    assert dense_table([], published=[]) is None


def test_a_published_row_is_never_marked_measured_and_a_measured_one_always_is():
    table = dense_table([dense(), dense(deviations=DEVIATIONS, config_hash="another")])
    assert not [
        line
        for group in table.groups
        for line in group
        if (line.source == "measured") != ("†" in line.cells[0])
    ]
    rows = csv_rows(table)
    assert [(row["source"], row["mark"]) for row in rows] == [("published", "")] * 6 + [
        ("measured", "†"),
        ("measured", "†‡"),
    ]
    for format, mark in (
        ("md", "**measured †**"),
        ("latex", r"\textbf{measured $^\dagger$}"),
        ("html", "<b>measured †</b>"),
    ):
        lines = render(table, format).splitlines()
        published = [line for line in lines if "DINO" in line or "CrIBo" in line or "NeCo" in line]
        assert len(published) == 5 and not any(
            "†" in line or "dagger" in line or "measured" in line for line in published
        )
        assert sum(mark in line for line in lines) == 2


def test_a_published_row_stands_under_its_set_only():
    other = PublishedDense("ade20k", "CrIBo", "ViT-S/16", {"linear_miou": 22.7}, "")
    table = dense_table([dense(), dense("toy")], [*published_dense(), other])
    assert [[line.cells[0] for line in group] for group in table.groups] == [
        ["Pascal VOC 2012", *["published"] * 6, "measured †"],
        ["toy", "measured †"],
    ]
    assert "22.7" not in render(table, "md")


# --- measured numbers -------------------------------------------------------------------------------------


def test_seeds_are_averaged():
    values = (70.1, 71.4, 70.9)
    runs = [
        dense(metrics={"linear_miou": v, "knn_top1": 2 * i}, seed=i, weights_hash=f"w{i}")
        for i, v in enumerate(values)
    ]
    (row,) = [row for row in csv_rows(dense_table(runs)) if row["source"] == "measured"]
    assert float(row["linear_miou"]) == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert float(row["linear_miou_std"]) == pytest.approx(statistics.stdev(values), abs=1e-6)
    assert (row["linear_miou_n"], row["seeds"], row["knn_top1"], row["knn_top1_std"]) == (
        "3",
        "0, 1, 2",
        "2.0",
        "2.0",
    )
    text = render(dense_table(runs[::-1]), "md")
    assert (
        text == render(dense_table(runs), "md")
        and "70.8 ± 0.7 (n=3)" in text
        and "sample standard deviation" in text
    )
    assert "sample standard deviation" not in render(dense_table(runs[:1]), "md")


def test_two_checkpoints_of_one_name_are_no_seeds():
    table = dense_table(
        [dense(weights_hash=name, metrics={"linear_miou": v}) for name, v in (("a", 60.0), ("b", 70.0))]
    )
    assert [row["linear_miou"] for row in csv_rows(table)[6:]] == ["60.0", "70.0"]
    assert "config 0123456789ab" in render(table, "md")  # they look alike


def test_sets_and_configurations_have_rows_of_their_own():
    runs = [dense("toy"), dense("coco_stuff"), dense("ade20k"), dense("coco_stuff", config_hash="other")]
    table = dense_table(runs)
    heads = [line.cells[0] for group in table.groups for line in group if line.source == "heading"]
    assert heads == ["ADE20K", "COCO-Stuff", "toy"]
    assert [len(group) for group in table.groups] == [2, 3, 2] and len(csv_rows(table)) == 4


def test_columns_are_those_that_were_measured():
    metrics = {
        "clustering_k500_miou": 40.0,
        "clustering_k50_miou": 30.0,
        "clustering_miou": 20.0,
        "linear_class_iou": {"cat": 1.0},
    }
    table = dense_table([dense("toy", metrics | {"knn_top1_k10": 3.0, "clustering_miou_std": 0.5})])
    assert table.columns[4:-3] == ("clustering mIoU", "clustering mIoU, K = 50", "clustering mIoU, K = 500")
    assert cells(render(table, "md").splitlines()[5])[4:-3] == ["20.0", "30.0", "40.0"]
    assert all(len(line.cells) == len(table.columns) for group in table.groups for line in group)


def test_a_scaled_down_evaluation_never_stands_under_the_bare_name():
    table = dense_table([dense(deviations={"linear.epochs": [25, 2]})])
    for format in FORMATS:
        text = render(table, format)
        assert (
            not re.search(r"dense-voc2012(?!, scaled down \(1 change\))", text) and "linear.epochs 25" in text
        )
    assert "70.0 ‡1" in render(table, "md")


def test_the_evaluation_of_a_scaled_down_pre_training_is_marked_too():
    before = result("pretrain", {"loss": 8.0}, {"epochs": [100, 1]})
    table = dense_table([dense(), before])
    (row,) = csv_rows(table)[6:]
    assert "70.0 ‡1" in render(table, "md") and "epochs 100 → 1" in render(table, "md")
    assert (row["protocol_is_full"], row["protocol"]) == ("false", "dense-voc2012")
    assert row["pretraining_protocol"] == "imagenet1k-100ep, scaled down (1 change)"
    assert "‡" not in render(dense_table([dense(weights_hash="another"), before]), "md")


def test_html_is_escaped():
    text = render(dense_table([dense("<script>", method="<b>")]), "html")
    assert "<script" not in text and "&lt;script&gt;" in text and "&lt;b&gt;" in text


# --- before and after -------------------------------------------------------------------------------------


def test_differences_to_the_method_that_it_started_from():
    before = dense(
        metrics={"linear_miou": 66.0, "in_context_miou": 60.04},
        method="iBOT",
        weights_hash="x",
        config_hash="of a file",
    )
    after = [
        dense(metrics={"linear_miou": v, "in_context_miou": 60.0}, method="PaKA", seed=i)
        for i, v in enumerate((67, 70))
    ]
    elsewhere = [dense("toy", method="PaKA"), dense(method="PaKA", backbone="vit_base_patch16")]
    rows = csv_rows(dense_table([before, *after, *elsewhere], against="iBOT"))
    gains = {
        (r["method"], r["backbone"], r["set"]): (r["linear_miou_difference"], r["in_context_miou_difference"])
        for r in rows
        if r["source"] == "measured"
    }
    assert gains == {
        ("iBOT", "ViT-S/16", "voc2012"): ("", ""),
        ("PaKA", "ViT-S/16", "voc2012"): ("2.5", "-0.04"),
        ("PaKA", "ViT-B/16", "voc2012"): ("", ""),
        ("PaKA", "ViT-S/16", "toy"): ("", ""),
    }
    assert {row["linear_miou_difference"] for row in rows if row["source"] == "published"} == {""}
    shown = [
        (row["method"], row["set"]) for row in rows if row["source"] == "measured" and row["set"] == "voc2012"
    ]
    assert shown[0] == ("iBOT", "voc2012")  # what the others are compared with comes first
    last = dense_table([*after, before.with_changes(method="zzz")], against="zzz").records
    assert [row["method"] for row in last if row["source"] == "measured"] == ["zzz", "PaKA"]
    text = render(dense_table([before, *after], against="iBOT"), "md")
    assert "| +2.5 | 60.0 ± 0.0 (n=2) | 0.0 |" in text and "Δ" in text
    assert "Δ" not in render(dense_table([before, *after]), "md")


def test_a_network_is_called_by_its_real_patch_and_compared_with_its_like_alone():
    """DINOv2's ViT-S/14 is built under the registered name of a ViT-S/16."""
    fourteen = dense(method="NeCo", patch_px=14, metrics={"linear_miou": 80.0})
    sixteen = dense(method="DINO", metrics={"linear_miou": 50.0})
    assert dense(patch_px=16).patch_px is None and "patch_px" not in to_json(sixteen)
    assert fourteen.with_changes(backbone="vit_small_patch16_reg4").network == "vit_small_patch14_reg4"
    table = dense_table([fourteen, sixteen], against="DINO")
    rows = {row["method"]: row for row in csv_rows(table) if row["source"] == "measured"}
    assert {name: row["backbone"] for name, row in rows.items()} == {"NeCo": "ViT-S/14", "DINO": "ViT-S/16"}
    assert rows["NeCo"]["linear_miou_difference"] == ""
    assert "No Δ: NeCo, ViT-S/14 on Pascal VOC 2012 (DINO is ViT-S/16)." in table.notes
    both = dense_table([fourteen, fourteen.with_changes(method="DINOv2")], against="DINOv2")
    assert {row["linear_miou_difference"] for row in csv_rows(both)[6:]} == {"", "0.0"}
    assert not any(note.startswith("No Δ") for note in both.notes)
    # Nor are they seeds of one row.
    seeds = [dense(seed=0, weights_hash="a"), dense(seed=1, weights_hash="b", patch_px=14)]
    assert [row["linear_miou_n"] for row in csv_rows(dense_table(seeds))[6:]] == ["1", "1"]


def test_sets_of_one_name_are_not_differenced():
    numbers = {"linear_miou": 70.0, "images": 40}
    runs = [dense("toy", method="iBOT", metrics=numbers), dense("toy", metrics=numbers, labels="4 classes")]
    runs += [dense("toy", method="PaKA", metrics=numbers | {"images": 41})]
    table = dense_table(runs, against="iBOT")
    assert {row["linear_miou_difference"] for row in csv_rows(table)} == {""}
    assert any("intertwined, ViT-S/16 on toy (iBOT was evaluated otherwise)" in note for note in table.notes)


def test_every_kind_of_result_is_called_by_its_real_patch():
    runs = [
        result("detection", {"box_ap": 40.0}, patch_px=14),
        result("pretrain", {"loss": 1.0}, patch_px=14, weights_hash="another"),
    ]
    tables = tables_of(runs)
    backbones = [
        row["backbone"] for table in tables for row in csv_rows(table) if row.get("source") != "published"
    ]
    assert backbones == ["ViT-S/14", "vit_small_patch14"]
    assert "ViT-S/14" in build_report([Run(run, {}, []) for run in runs])


def test_differences_only_where_the_evaluation_is_the_same():
    runs = [
        dense(method="iBOT"),
        dense(method="PaKA", deviations={"linear.epochs": [25, 2]}, metrics={"linear_miou": 75.0}),
    ]
    table = dense_table(runs, against="iBOT")
    assert {row["linear_miou_difference"] for row in csv_rows(table)} == {""}
    assert "No Δ: PaKA, ViT-S/16 on Pascal VOC 2012 (iBOT was evaluated otherwise)." in table.notes
    with pytest.raises(UserError, match="'DINO'; there are PaKA, iBOT"):
        dense_table(runs, against="DINO")
    with pytest.raises(UserError, match="none at all"):
        dense_table([], against="DINO")


# --- among the other tables -------------------------------------------------------------------------------


def titles(results, *options, **more):
    return [table.title for table in tables_of(results, *options, **more)]


def test_dense_results_alone_make_the_dense_table_alone():
    title = dense_table([]).title
    assert titles([dense()]) == titles([dense()], "paper") == titles([], "dense") == [title]
    assert titles([dense(), posttrained()]) == [title, "Post-training runs"]
    assert titles([dense()], published="1") == ["COCO and ADE20K", title]
    both = [dense(), result(metrics={"box_ap": 40.0})]
    assert titles(both) == ["COCO and ADE20K", title] and titles(both, "dense") == [title, "COCO and ADE20K"]
    assert titles(both, "paper")[-1] == title and titles(both, "paper")[0].startswith("Table 1a of the paper")
    assert titles([]) == ["COCO and ADE20K"] and titles([posttrained()]) == [
        "COCO and ADE20K",
        "Post-training runs",
    ]


def test_make_table(tmp_path, capsys):
    main = load_tool("table").main
    write_result(dense(), tmp_path / "runs" / "a")
    write_result(posttrained(), tmp_path / "runs" / "b")
    main([str(tmp_path / "runs"), "--format", "csv"])
    told = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(told.out)))
    assert [row["source"] for row in rows] == ["published"] * 6 + ["measured"] and rows[-1][
        "linear_miou"
    ] == "70.0"
    assert told.err == "left out of csv: Post-training runs\n"
    main([str(tmp_path / "runs"), "--against", "intertwined"])
    assert "minus that of intertwined" in capsys.readouterr().out
    main(["--layout", "dense", "--format", "latex"])
    assert capsys.readouterr().out == render(dense_table([]), "latex")


# --- schema, post-training runs, report -------------------------------------------------------------------


def test_dense_metrics_are_percentages(tmp_path):
    metrics = dict.fromkeys((*METRICS, "clustering_k500_miou", "knn_top1_k10"), 50.0) | {
        "linear_class_iou": {"cat": 3.5}
    }
    run = dense(metrics=metrics)
    assert read_result(write_result(run, tmp_path)) == run
    for name in (*METRICS, "clustering_k500_miou", "knn_top1_k10"):
        out_of_range = [(value, f"{value}, not a percentage") for value in (100.5, -1)]
        for wrong, words in (*out_of_range, ({"cat": 1.0}, "should be a number")):
            with pytest.raises(UserError, match=f"metrics.{name} .*{words}"):
                dense(metrics={name: wrong})


def test_post_trainings_have_a_table_of_their_own_losses():
    runs = [posttrained(), posttrained("gram", 0.01), result("pretrain", {"loss": 8.0, "image": 2.0})]
    assert [run.stage for run in runs] == ["posttrain", "posttrain", "pretrain"] and dense().stage == "dense"
    after, before = posttraining_table(runs), pretraining_table(runs)
    assert after.columns[5:-2] == ("cka", "gram", "overlaps", "img_per_s")  # the total is the one term
    assert [line.cells[5:-2] for line in after.groups[0]] == [
        ("0.3", "–", "0.6", "100"),
        ("–", "0.01", "0.6", "100"),
    ]
    assert before.columns[5:-2] == ("loss", "image") and len(before.groups[0]) == 1
    assert posttraining_table(runs[2:]) is None and pretraining_table(runs[:2]) is None
    with_more = runs[0].with_changes(metrics={"loss": 0.4, "cka": 0.3})
    assert posttraining_table([with_more]).columns[5:-2] == ("loss", "cka")


def test_the_report_has_the_table_and_the_curves_of_a_post_training():
    log = {i: {"loss": 0.3, "cka": 0.3, "overlaps": 0.6, "feature_std": 1.0} for i in range(3)}
    page = build_report([Run(dense(), {}, []), Run(posttrained(), log, [])])
    assert "<h3>Post-training</h3>" in page and "<h3>Pre-training</h3>" not in page
    curves = page[page.index("<h3>Post-training") : page.index("Post-training runs")]
    shown = curves[: curves.index("<details>")]
    assert all(f">{term}<" in shown for term in ("loss", "cka", "overlaps")) and ">feature_std<" not in shown
    assert "Pascal VOC 2012" in page and "COCO and ADE20K" not in page
    assert "minus that of intertwined" in build_report([Run(dense(), {}, [])], against="intertwined")
