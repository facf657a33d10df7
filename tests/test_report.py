"""The report: run folders in, one self-contained page out."""

import base64
import io
import json
import re
import struct
import subprocess
import sys
import warnings
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.analysis.colors import _lab
from pretrain.analysis.picture_pages import Cell, save_page
from pretrain.errors import UserError
from pretrain.results import pages
from pretrain.results.curves import COLORS, MOST_POINTS, Curve, _thinned, panel, style_of, terms_of
from pretrain.results.report import build_report
from pretrain.results.runs import Run, find_results, read_figures, read_log, read_run, run_names
from pretrain.results.schema import Protocol, Result, write_result

ROOT = Path(__file__).resolve().parents[1]
NASTY = "<script>alert('x')</script> & <b>"


def png():
    """One white pixel."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0\xff"))
        + chunk(b"IEND", b"")
    )


def result(kind="detection", deviations=None, **changes):
    deviations = deviations or {}
    names = {"pretrain": "imagenet1k-100ep", "detection": "coco-12ep", "segmentation": "ade20k-160k"}
    name = names.get(kind, "attention")
    fields = {
        "kind": kind,
        "method": "intertwined",
        "backbone": "vit_small_patch16",
        "effective_epochs": 346.9,
        "protocol": Protocol(name=name, version=1, full=not deviations, deviations=deviations),
        "metrics": {},
        "seed": 0,
        "config_hash": "0123456789ab",
        "weights_hash": None,
        "git_commit": "f" * 40 + "+dirty",
        "packages": {"torch": "2.15.0"},
        "hardware": {"cpu": "a", "cores": 2, "gpus": []},
        "wall_time_s": 100.0,
        "peak_memory_mib": None,
        "created": "2026-01-31T12:00:00+00:00",
    }
    return Result(**(fields | changes))


def write_run(folder, run, log=(), figures=None):
    write_result(run, folder)
    if log:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if figures:
        (folder / "figures").mkdir()
        for name in figures:
            (folder / "figures" / name).write_bytes(png())
        (folder / "figures" / "captions.json").write_text(json.dumps(figures))
    return folder


@pytest.fixture
def folder(tmp_path):
    losses = [
        {"iteration": i, "loss": 9.0 - i / 10, "image": 2.0, "lr": 1e-3, "seconds": 0.1}
        for i in range(0, 50, 5)
    ]
    scaled = {"iterations": [22128, 60]}
    figures = {"a.png": {"title": "Position field", "caption": "Of the teacher."}}
    write_run(
        tmp_path / "pre", result("pretrain", {"epochs": [100, 1]}, metrics={"loss": 4.5}), losses, figures
    )
    write_run(tmp_path / "pre2", result("pretrain", {"epochs": [100, 1]}, method="dinov2_dagger"), losses)
    for seed in (0, 1):
        run = result(
            "detection", scaled, metrics={"box_ap": 12.0 + seed, "per_class": {"cat": 7.25}}, seed=seed
        )
        write_run(tmp_path / f"det{seed}", run, [{"iteration": 1, "loss": 2.0}])
    write_run(tmp_path / "seg", result("segmentation", metrics={"miou": 22.0}, hardware={"cpu": "b"}))
    return tmp_path


def page_of(folder, **options):
    return build_report([read_run(path) for path in find_results([folder])], **options)


class Page(HTMLParser):
    """Checks that tags balance; collects text, attributes and ids."""

    VOID = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.loads, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.take(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.take(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def take(self, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


# --- the page ---------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_loads_nothing(folder):
    text = page_of(folder)
    page = Page(text)
    assert page.tags.count("svg") == 5  # loss, image, lr, seconds; loss
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    for load in page.loads:
        assert load.startswith("data:image/png;base64,") or (load.startswith("#") and load[1:] in page.ids)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", text)
    used = re.findall(r"url\(#([^)]+)\)", text)
    assert used and set(used) <= set(page.ids)


def test_every_section_is_there_in_order(folder):
    heads = re.findall(r"<h2>(.*?)</h2>", page_of(folder))
    assert heads == ["Results", "Training", "Figures", "Runs"]
    assert f"data:image/png;base64,{base64.b64encode(png()).decode()}" in page_of(folder)
    assert "<b>Position field</b> Of the teacher." in page_of(folder)


def test_a_large_photograph_is_a_webp_and_a_large_drawing_is_not(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    smooth = np.asarray(Image.fromarray(noise[::20, ::20]).resize((320, 320), Image.Resampling.BICUBIC))
    for pixels, kind in ((smooth, "webp"), (np.zeros((320, 320, 3), np.uint8), "png")):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        for least, shown_as in ((1, kind), (10**9, "png")):
            monkeypatch.setattr(pages, "LARGE_BYTES", least)
            uri = pages.data_uri(file.getvalue())
            held = base64.b64decode(uri.removeprefix(f"data:image/{shown_as};base64,"), validate=True)
            again = np.asarray(Image.open(io.BytesIO(held)).convert("RGB")).astype(float)
            assert again.shape == pixels.shape and np.abs(again - pixels).mean() < 3


def test_probes_are_curves_beside_the_losses(tmp_path):
    log = [{"iteration": i, "loss": 2.0 - i / 10} for i in range(0, 10, 3)]
    probes = [
        {"iteration": i, "probe/dense_linear_miou": 30.0 + i, "probe/position_error": 0.1} for i in (3, 8)
    ]
    write_run(tmp_path, result("pretrain"), log)
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in probes))
    run = read_run(tmp_path / "result.json")
    assert list(run.log) == [0, 3, 6, 8, 9] and run.log[3] == {
        "loss": 1.7,
        "probe/dense_linear_miou": 33.0,
        "probe/position_error": 0.1,
    }
    page = build_report([run])
    curves = page[page.index('<section id="training">') : page.index('<section id="runs">')]
    assert (
        ">probe/dense_linear_miou<" in curves
        and ">probe/position_error<" in curves
        and "Other terms" not in curves
    )


def test_sections_without_content_are_left_out(tmp_path):
    write_run(tmp_path / "run", result())
    assert re.findall(r"<h2>(.*?)</h2>", page_of(tmp_path)) == ["Results", "Runs"]


def test_the_summary_adds_the_times_and_separates_the_machines(folder):
    text = page_of(folder)
    assert "<td>pretrain</td><td class=number>2</td><td class=number>3 min 20 s</td>" in text
    assert "<td>all</td><td class=number>5</td><td class=number>8 min 20 s</td>" in text
    assert '<p class="soft">segmentation: intertwined, seg</p><dl><dt>cpu</dt><dd>b</dd></dl>' in text
    assert text.count("<dt>torch</dt>") == 1  # the same versions in all runs, shown once
    assert "4 of 5 runs were scaled down" in text


def test_the_reproducibility_block(folder):
    text = page_of(folder)
    block = text[text.index('<section id="runs">') :]
    assert (
        "<td>0123456789ab</td>" in block and "<td>ffffffffffff+dirty</td>" in block and "<td>–</td>" in block
    )
    assert "<dt>per_class / cat</dt><dd>7.25</dd>" in block
    assert "imagenet1k-100ep, scaled down (1 change): epochs 100 → 1" in block


def test_a_scaled_run_never_stands_under_the_bare_name(folder):
    text = "".join(Page(page_of(folder)).text)
    for name in ("coco-12ep", "imagenet1k-100ep"):
        assert f"{name}, scaled down (1 change)" in text
        assert not re.search(re.escape(name) + r"(?!, scaled down \(1 change\))", text)
    assert re.search(r"ade20k-160k(?!, scaled down)", text)  # a full run keeps its name


def test_the_page_is_the_same_every_time(folder):
    runs = [read_run(path) for path in find_results([folder])]
    assert build_report(runs) == build_report(runs[::-1])
    code = (
        "import sys; from pretrain.results.report import build_report; from pretrain.results.runs import *\n"
        "sys.stdout.write(build_report([read_run(p) for p in find_results([sys.argv[1]])]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert other.stdout == build_report(runs)


def test_everything_is_escaped(tmp_path):
    run = result(
        "detection",
        {NASTY: [NASTY, 1]},
        **dict.fromkeys(("method", "backbone", "config_hash", "weights_hash", "git_commit"), NASTY),
        metrics={NASTY: 1.0},
        packages={NASTY: NASTY},
        hardware={NASTY: [NASTY]},
    )
    write_run(tmp_path / "run", run, [{"iteration": 1, NASTY: 1.0, "loss $x": 2.0}])
    (tmp_path / "run" / "figures").mkdir()
    (tmp_path / "run" / "figures" / "a.png").write_bytes(png())
    words = {"title": f'"{NASTY}', "caption": NASTY}
    (tmp_path / "run" / "figures" / "captions.json").write_text(json.dumps({"a.png": words}))
    text = page_of(tmp_path, title=NASTY)
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert "".join(page.text).count(NASTY) > 15


def test_published_tables_can_be_chosen(folder):
    assert "50-epoch fine-tuning" in page_of(folder, table="1,2") and "50-epoch fine-tuning" not in page_of(
        folder
    )
    with pytest.raises(UserError, match="'6'"):
        page_of(folder, table="6")


def test_published_rows_stand_on_the_page_only_where_asked_for(folder):
    write_run(
        folder / "dense",
        result(
            "dense",
            protocol=Protocol(name="dense-ade20k", version=1, full=True, deviations={}),
            metrics={"linear_miou": 30.0},
        ),
    )
    assert '<tr class="published">' not in page_of(folder)
    asked = page_of(folder, table="1")
    assert '<tr class="published">' in asked and "Pascal" not in asked
    assert '<tr class="published">' in page_of(folder, layout="dense")


def test_a_column_that_says_nothing_is_left_out(folder):
    heads = re.findall(r"<th[^>]*>(.*?)</th>", page_of(folder / "seg"))
    assert "ADE20K mIoU" in heads and not {"box AP", "detection protocol", "note"} & set(heads)
    both = re.findall(r"<th[^>]*>(.*?)</th>", page_of(folder))
    assert {"box AP", "ADE20K mIoU", "detection protocol"} <= set(both) and "mask AP" not in both


def test_the_best_of_each_chart_is_marked(tmp_path):
    scaled = {"iterations": [22128, 60]}
    for name, ap, deviations in (
        ("a", 10.0, scaled),
        ("b", 20.04, scaled),
        ("c", 19.96, scaled),
        ("d", 40.0, {}),
    ):
        write_run(
            tmp_path / name, result("detection", deviations, metrics={"box_ap": ap}, method=f"m_{name}")
        )
    write_run(tmp_path / "zero", result("segmentation", metrics={"miou": 0.0}, method="m_a"))
    page = page_of(tmp_path)
    first, second, third = re.findall(r'<figure class="chart">.*?</figure>', page, re.S)
    bars = re.findall(r'<li( class="best")?><span class="name">(.*?)</span>.*?width:([\d.]+)%', first, re.S)
    assert [(name, bool(best)) for best, name, _ in bars] == [
        ("m_b, b", True),
        ("m_c, c", True),
        ("m_a, a", False),
    ]
    assert [float(width) for *_, width in bars] == [100.0, 99.6, 49.9]
    assert (
        "scaled down (1 change)" in first and ">coco-12ep<" in second
    )  # not measured alike: a chart of its own
    assert "best" not in second and "best" not in third and "width:0.0%" in third
    assert page.index('class="chart"') < page.index("<table")


def test_losses_stand_with_their_curves_and_not_with_the_results(folder):
    sections = re.split("<section id=", page_of(folder))
    results, training = (
        next(text for text in sections if text.startswith(f'"{name}"')) for name in ("results", "training")
    )
    assert "Pre-training runs" in training and "Pre-training runs" not in results and "ADE20K" in results


def test_curve_colors_are_seen_on_both_pages_and_by_every_eye():
    style = (ROOT / "pretrain/results/templates/style.css").read_text()
    colors, pages_of = (
        np.array([rgb(c) for c in COLORS]),
        [rgb(c) for c in re.findall("--page: (#.{6})", style)],
    )
    assert len(pages_of) == 2
    for page in pages_of:
        assert min(contrast(color, page) for color in colors) > 2.9
    lab = _lab(colors)
    distances = np.linalg.norm(lab[:, :, None] - lab[:, None], axis=-1)
    distances[:, np.arange(len(colors)), np.arange(len(colors))] = np.inf
    assert distances.min() > 15


def rgb(color):
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def contrast(one, other):
    """Of two colors, as WCAG 2.1 has it."""
    linear = [
        np.where(np.array(c) <= 0.04045, np.array(c) / 12.92, ((np.array(c) + 0.055) / 1.055) ** 2.4)
        for c in (one, other)
    ]
    low, high = sorted(float(c @ [0.2126, 0.7152, 0.0722]) for c in linear)
    return (high + 0.05) / (low + 0.05)


# --- pictures ---------------------------------------------------------------------------------------------


def write_page_of_pictures(folder, level, truth=50, rows=("a.jpg", "b.jpg")):
    """A page as both plug-ins draw it; what was predicted is of one gray level."""
    cells = []
    for i, row in enumerate(rows):
        cells.append(Cell(row, "ground truth", np.full((40, 60, 3), truth + i, np.uint8)))
        cells.append(Cell(row, "prediction", np.full((40, 60, 3), level + i, np.uint8)))
    save_page(
        folder / "figures/p.png", cells, 4, title="P", caption="Found.", legend=[("cat <b>", (255, 0, 16))]
    )


def test_predictions_of_several_runs_stand_side_by_side_on_equal_pictures(tmp_path):
    for name, level in (("one", 100), ("two", 200)):
        write_run(tmp_path / name, result(method=f"m_{name}"))
        write_page_of_pictures(tmp_path / name, level)
    write_run(tmp_path / "other", result(method="z"))
    write_page_of_pictures(tmp_path / "other", 100, truth=60)  # other data, of the same names
    page = page_of(tmp_path)
    Page(page)
    rows = re.findall(r'<div class="strip".*?</div>', page, re.S)
    columns = [re.findall("<figcaption>(.*?)</figcaption>", row) for row in rows]
    shared = ["ground truth", "m_one, one", "m_two, two"]
    assert columns == [shared, shared, ["ground truth", "z, other"], ["ground truth", "z, other"]]
    levels = []
    for row in rows:
        pictures = [
            Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall('base64,(.*?)"', row)
        ]
        assert all(picture.size == (60, 40) for picture in pictures)
        levels.append([picture.getpixel((30, 20))[0] for picture in pictures])
    assert levels == [[50, 100, 200], [51, 101, 201], [60, 100], [61, 101]]
    assert "background:#ff0010" in page and "cat &lt;b&gt;" in page
    assert '<section id="figures">' not in page  # nothing is shown twice
    assert (
        page.index('<section id="results">')
        < page.index('<section id="predictions">')
        < page.index('id="runs"')
    )


@pytest.mark.parametrize(
    "entry",
    [
        {"cells": 3}, {"cells": [3]}, {"cells": [{"row": "a", "column": "b"}]},
        {"cells": [{"row": "a", "column": "b", "box": [0, 0, 1.5, 1]}]},
        {"cells": [{"row": "a", "column": "b", "box": [0, 0, 2, 1]}]},  # beyond its one pixel
        {"cells": [{"row": "a", "column": "b", "box": [0, 0, 1, 1]}] * 201},
        {"legend": [["cat", "red;x:url(//a)"]]}, {"legend": ["c"]},
    ],
)  # fmt: skip
def test_malformed_cells_are_left_out_and_the_figure_stays(tmp_path, entry):
    run = write_run(tmp_path, result(), figures={"a.png": {"title": "A", "caption": "", **entry}})
    read = read_run(run / "result.json")
    assert len(read.left_out) == 1 and "the cells or the legend of 'a.png' are malformed" in read.left_out[0]
    assert "<b>A</b>" in build_report([read]) and "strip" not in re.sub(
        "<style>.*</style>", "", build_report([read]), flags=re.S
    )


def test_a_picture_that_webp_cannot_hold_stops_no_page(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (17_000, 8, 3), np.uint8)).save(file, "PNG")
    write_run(tmp_path, result(), figures={"a.png": {"title": "Tall", "caption": ""}})
    (tmp_path / "figures" / "a.png").write_bytes(file.getvalue())
    assert f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" in page_of(tmp_path)
    assert pages.data_uri(b"x" * 300_000).startswith("data:image/png;")


# --- curves -----------------------------------------------------------------------------------------------


def test_terms_are_ordered_and_the_rest_set_aside():
    log = {
        1: dict.fromkeys(
            ("seconds", "lr", "loss_mask", "koleo", "loss", "mask_ap", "knn_top1", "grad_norm"), 1.0
        )
    }
    shown, others = terms_of([Curve(result("pretrain"), "a", log, "red", "solid")])
    assert shown == ["loss", "koleo", "mask_ap", "lr", "knn_top1", "loss_mask"] and others == [
        "grad_norm",
        "seconds",
    ]


def test_a_new_methods_losses_are_shown_without_a_list(tmp_path):
    run = result(
        "pretrain", metrics={"loss": 3.0, "zeta": 1.0}, method="made up", loss_terms=("zeta", "alpha")
    )
    log = [
        {"iteration": i, "alpha": 2.0, "entropy": 0.5, "loss": 3.0, "zeta": 1.0, "lr": 1e-3} for i in range(3)
    ]
    other = result("pretrain", loss_terms=("image", "koleo"))
    known = Curve(other, "b", {0: {"koleo": 1.0, "loss": 1.0}}, "red", "solid")
    read = read_run(write_run(tmp_path, run, log) / "result.json")
    curve = Curve(read.result, "a", read.log, "red", "solid")
    assert terms_of([curve]) == (["loss", "zeta", "alpha", "lr"], ["entropy"])
    assert terms_of([known, curve]) == (["loss", "koleo", "zeta", "alpha", "lr"], ["entropy"])
    page = build_report([read])
    shown = page[page.index("<h3>Pre-training</h3>") : page.index("<details><summary>Other terms (1)")]
    assert all(f">{term}<" in shown for term in ("loss", "zeta", "alpha")) and ">entropy<" not in shown
    assert ">zeta</th>" in page[page.index('<section id="training">') :]
    later = build_report([Run(run.with_changes(post_training=True), read.log, [])])
    assert "<h3>Post-training</h3>" in later and "<h3>Pre-training</h3>" not in later


def test_long_curves_become_means_with_their_band():
    points = [(i, float(i % 2)) for i in range(2 * MOST_POINTS)]
    x, mean, low, high = _thinned(points)
    assert x == [2 * i + 0.5 for i in range(MOST_POINTS)]
    assert set(mean) == {0.5} and set(low) == {0.0} and set(high) == {1.0}
    x, mean, low, high = _thinned(points[:7])
    assert x == list(range(7)) and mean == low == high == [float(i % 2) for i in range(7)]
    assert len(_thinned(points[:-1] + [(9999, 1.0)] * 5)[0]) <= MOST_POINTS


def test_a_panel_overlays_the_runs_in_their_colors():
    log = {i: {"loss": float(i)} for i in range(20)}
    curves = [
        Curve(result(), name, log, *style_of(name, ["a", "b"], n))
        for name, n in (("a", 0), ("b", 0), ("b", 1))
    ]
    assert curves[1].color == curves[2].color != curves[0].color
    assert [curve.dash for curve in curves] == ["solid", "solid", "dashed"]
    svg = panel("loss", curves, "p1")
    Page(svg)
    assert all(svg.count(f"stroke: {curve.color}") >= 1 for curve in curves) and "stroke-dasharray" in svg
    assert "currentColor" in svg and "#010203" not in svg and "xmlns" not in svg
    assert set(re.findall(r'\bid="([^"]+)"', svg)) and all(
        i.startswith("p1-") for i in re.findall(r'\bid="([^"]+)"', svg)
    )


# --- run folders ------------------------------------------------------------------------------------------


def test_a_log_is_read_by_iteration(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"iteration": 2, "loss": 1}\n{"iteration": 0, "loss": 3.0, "phase": "train", "ok": true, "x": null}\n\n'
        '{"iteration": 2, "loss": 0.5, "koleo": NaN}\n'
    )
    left = []
    assert read_log(path, left) == {
        0: {"loss": 3.0},
        2: {"loss": 0.5},
    }  # the last of a repeated iteration counts
    assert left == [f"{path}: 1 numbers that no axis can show, the first: koleo in line 4"]
    assert list(read_log(path, [])) == [0, 2]


@pytest.mark.parametrize("cut", range(1, 28))
def test_a_last_line_that_was_cut_off_is_skipped_with_a_warning(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    line = '{"iteration": 1, "loss": 3.5}'
    path.write_text('{"iteration": 0, "loss": 4.0}\n' + line[:cut])
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:2: the last line is cut off"):
        assert read_log(path, []) == {0: {"loss": 4.0}}


def test_a_complete_last_line_without_newline_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "loss": 4.0}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_log(tmp_path / "metrics.jsonl", []) == {0: {"loss": 4.0}}


@pytest.mark.parametrize(
    "line",
    [
        '{"iteration": 1, "lo',
        "loss 3",
        "[1, 2]",
        "3",
        '{"loss": 1.0}',
        '{"iteration": 1.5}',
        '{"iteration": true}',
    ],
)
@pytest.mark.parametrize("after", ["\n", '\n{"iteration": 2}\n'])
def test_a_malformed_line_is_refused_with_file_and_line(tmp_path, line, after):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n' + line + after)
    with pytest.raises(UserError) as error:
        read_log(path, [])
    assert f"{path}:2:" in str(error.value) and "\n" not in str(error.value)


def test_figures_come_in_the_order_of_the_captions_then_by_name(tmp_path):
    for name in ("a.png", "b_c.png", "z.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "captions.json").write_text(json.dumps({"z.png": {"title": "Z", "caption": "last letter"}}))
    assert [(f.title, f.caption) for f in read_figures(tmp_path, [])] == [
        ("Z", "last letter"),
        ("a", ""),
        ("b c", ""),
    ]
    left = []
    assert read_figures(tmp_path / "absent", left) == left == []


@pytest.mark.parametrize(
    "captions, words",
    [
        ("{", "not JSON"),
        ("[]", "must hold an object"),
        ('{"a.png": "x"}', "'a.png' has no text 'title'"),
        ('{"a.png": {"title": "x"}}', "'a.png' has no text 'caption'"),
        ('{"b.png": {"title": "x", "caption": ""}}', "b.png: cannot be read (No such file"),
        ('{"../a.png": {"title": "x", "caption": ""}}', "'../a.png' is not the name of a file"),
    ],
)
def test_malformed_captions_are_left_out(tmp_path, captions, words):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "captions.json").write_text(captions)
    left = []
    assert [figure.png for figure in read_figures(tmp_path, left)] == [png()]
    assert len(left) == 1 and str(tmp_path) in left[0] and words in left[0]


def test_a_figure_that_is_no_png_is_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(b"GIF89a")
    (tmp_path / "b.png").write_bytes(png())
    left = []
    assert [figure.title for figure in read_figures(tmp_path, left)] == ["b"]
    assert len(left) == 1 and f"{tmp_path / 'a.png'}: not a PNG" in left[0]


def test_runs_are_named_by_method_and_by_as_much_of_the_folder_as_sets_them_apart():
    folders = ("/a/one/seed_0", "/a/two/seed_0", "/b/two/seed_0", "/a/mae", "/a/\udcff")
    methods = ("x", "x", "x", "mae", "x")
    runs = [Run(result(method=m), {}, [], folder=Path(f)) for m, f in zip(methods, folders)]
    assert run_names(runs) == ["x, one/seed_0", "x, a/two/seed_0", "x, b/two/seed_0", "mae", r"x, \udcff"]
    assert run_names([Run(result(), {}, [])]) == ["intertwined"]


# --- the tool ---------------------------------------------------------------------------------------------


def test_make_report(folder, tmp_path):
    def make_report(*arguments):
        command = [sys.executable, str(ROOT / "tools" / "make_report.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    output = tmp_path / "out" / "report.html"
    run = make_report(folder / "pre", folder / "det0", "--output", output, "--title", "A & B")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"{output}: 2 runs" and "<h1>A &amp; B</h1>" in output.read_text(
        encoding="utf-8"
    )
    (folder / "pre" / "metrics.jsonl").write_text("x\n")
    failed = make_report(folder, "--output", output)
    assert (
        failed.returncode == 2 and "metrics.jsonl:1" in failed.stderr and "error: 1 left out" in failed.stderr
    )
