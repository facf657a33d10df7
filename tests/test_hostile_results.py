"""Some 90 hostile folders of results: every table and page is made of what is sound, the rest is left out and named."""

import csv
import json
import os
import re
import struct
import zlib

import pytest
from test_report import png
from test_results import result
from tool_fixture import ended

from pretrain.errors import one_line
from pretrain.files import csv_text, read_csv
from pretrain.results.render import FORMATS, latex_text, markdown_text
from pretrain.results.report import LAYOUTS
from pretrain.results.schema import to_json

DEEP = "[" * 100_000 + "]" * 100_000
NESTED = '{"a":' * 500 + "1.0" + "}" * 500
NUMBERS = ["1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 5000, "1e308", "-1e308", "1e999", "NaN", "Infinity"]
# Fields of a result.json; HERE stands where a number is put
HERE = "HERE"
PLACES = {
    "time": {"wall_time_s": HERE},
    "memory": {"peak_memory_mib": HERE},
    "epochs": {"effective_epochs": HERE},
    "seed": {"seed": HERE},
    "metric": {"metrics": {"box_ap": 40.0, "loss": HERE}},
    "class": {"metrics": {"box_ap": 40.0, "classes": {"a": HERE}}},
    "hardware": {"hardware": {"cores": HERE}},
    "deviation": {"protocol": {"name": "a", "version": 1, "full": False, "deviations": {"lr": [1, HERE]}}},
    "version": {"protocol": {"name": "a", "version": HERE, "full": True, "deviations": {}}},
}
FORMULAS = ("=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1")


def of_result(**changes):
    return to_json(result(metrics={"box_ap": 40.0}, **changes))


def damaged_results():
    """{name: bytes of a result.json}."""
    sound = of_result()
    for name, fields in PLACES.items():
        text = json.dumps({**json.loads(sound), **fields})
        for i, number in enumerate(NUMBERS):
            yield f"{name}{i}", text.replace(f'"{HERE}"', number).encode()
    yield "deep", DEEP.encode()
    yield "nested", sound.replace('"metrics": {', f'"metrics": {{"x": {NESTED},').encode()
    yield "nested_hardware", sound.replace('"hardware": {', f'"hardware": {{"x": {NESTED},').encode()
    yield "surrogate", sound.replace('"config_hash": "', '"config_hash": "\\ud800').encode()
    yield "surrogate_key", sound.replace('"metrics": {', '"metrics": {"\\udfff": 1.0,').encode()
    yield "bytes", sound.encode().replace(b'"config_hash": "', b'"config_hash": "\xff')
    yield "utf16", sound.encode("utf-16")
    yield "cut", sound[:-9].encode()
    yield "empty", b""
    yield "null", b"null"
    yield (
        "many",
        sound.replace(
            '"metrics": {', '"metrics": {' + "".join(f'"m{i}": 1,' for i in range(100_000))
        ).encode(),
    )
    yield "large", b'"' + b"x" * (17 << 20) + b'"'
    sweep = sound.replace('"metrics": {', '"metrics": {"miou": 50.0, "miou_by_seed": %s,')
    for i, seeds in enumerate(("3.0", '{"0": {"a": 1.0}}', '{"0": 1e90}', '{"=1": 1.0}')):
        yield f"seeds{i}", (sweep % seeds).encode()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb():
    """A PNG of 60000 x 60000 px, and one whose text fills 500 MB."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    texts = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(50_000_000), 9)) for i in range(10))
    small = png()
    return png()[:8] + header + data + small[-12:], small[:33] + texts + small[33:]


def write_damaged_files(root):
    """Runs whose result is sound, and something else is not; {folder: file that has to be named}."""
    named = {}

    def run(name, file, data=None, **files):
        folder = root / name
        (folder / "figures").mkdir(parents=True)
        (folder / "result.json").write_text(of_result(method=name))
        if data is not None:
            (folder / file).write_bytes(data)
        named[name] = file
        return folder / file

    line = b'{"iteration": 0, "loss": 1.0}\n'
    for i, number in enumerate(NUMBERS):
        run(f"log{i}", "metrics.jsonl", line + b'{"iteration": 1, "loss": %s}\n' % number.encode())
        if number not in ("NaN",):
            at = b'{"iteration": %s, "loss": 1.0}\n' % number.encode()
            run(f"iteration{i}", "probes.jsonl", at + line)
    run("log_deep", "metrics.jsonl", DEEP.encode() + b"\n" + line)
    run("log_surrogate", "metrics.jsonl", b'{"iteration": 0, "loss\\ud800": 1.0}\n')
    run("log_noise", "metrics.jsonl", bytes(range(256)) * 10 + b"\n" + line)
    run("log_line", "metrics.jsonl", b"x" * 3_000_000)
    run("no_png", "figures/a.png", b"GIF89a")
    run("cut_png", "figures/a.png", png()[:43])
    for i, data in enumerate(bomb()):
        run(f"bomb{i}", "figures/a.png", data)
    for i, text in enumerate(
        (DEEP, "[]", "{", '{"../a.png": {"title": "a", "caption": ""}}', '{"a.png": 1}')
    ):
        run(f"captions{i}", "figures/captions.json", text.encode())
    secret = root.parent / "secret.png"
    secret.write_bytes(png())
    run("link_figure", "figures/a.png").symlink_to(secret)
    run("link_self", "figures/a.png").symlink_to("a.png")
    run("link_zero", "metrics.jsonl").symlink_to("/dev/zero")
    run("link_log", "metrics.jsonl").symlink_to(root.parent / "secret.png")
    os.mkfifo(run("pipe", "metrics.jsonl"))
    run("folder", "metrics.jsonl").mkdir()
    folder = run("link_folder", "figures")
    folder.rmdir()
    folder.symlink_to(root.parent)
    return named


def write_links(root):
    """Runs whose result.json is no file of theirs."""
    (root.parent / "other.json").write_text(of_result())
    for name, target in {
        "out": "../../other.json",
        "self": "result.json",
        "zero": "/dev/zero",
        "nothing": "x",
    }.items():
        (root / name).mkdir()
        (root / name / "result.json").symlink_to(target)
    (root / "pipe_result").mkdir()
    os.mkfifo(root / "pipe_result" / "result.json")
    (root / "dir" / "result.json").mkdir(parents=True)
    return ["out", "self", "zero", "nothing", "pipe_result", "dir"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder of all, the names of those without a sound result, {name: file} of the others."""
    root = tmp_path_factory.mktemp("hostile") / "runs"
    unread = []
    for name, data in damaged_results():
        (root / name).mkdir(parents=True)
        (root / name / "result.json").write_bytes(data)
        unread.append(name)
    named = write_damaged_files(root)
    unread += write_links(root)
    (root / "good").mkdir()
    (root / "good" / "result.json").write_text(of_result(method="sound"))
    return root, unread, named


def left_out(said):
    return [line for line in said.splitlines() if line.startswith("left out: ") and "of csv" not in line]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_table_is_made_of_what_is_sound(hostile, capfd, format, layout, tmp_path):
    root, unread, _ = hostile
    assert len(unread) > 55
    words = ["--format", format, "--layout", layout, "--output", tmp_path / "table"]
    assert ended("table", root, *words) == 2
    said, text = capfd.readouterr().err, (tmp_path / "table").read_text(encoding="utf-8")
    told = left_out(said)
    for name in unread:
        assert [str(root / name / "result.json") in line for line in told].count(True) == 1, name
    assert len(told) == len(unread) and max(map(len, told)) < 700
    assert "Traceback" not in said and said.splitlines()[-1].startswith(f"error: {len(unread)} left out")
    assert "0" * 300 not in text and "NaN" not in text
    # One table a csv: of this layout the first is the published one
    assert "sound" in text or (format, layout) == ("csv", "dense")


@pytest.mark.parametrize("of_all", [True, False])
def test_the_page_is_drawn_of_what_is_sound(hostile, capfd, of_all, tmp_path):
    root, unread, named = hostile
    runs = [root] if of_all else [root / name for name in (*named, "good")]
    assert ended("report", *runs, "--output", tmp_path / "page.html") == 2
    said, page = capfd.readouterr().err, (tmp_path / "page.html").read_text(encoding="utf-8")
    told = left_out(said)
    for name, file in named.items():
        assert [f"{root / name / file}:" in line for line in told].count(True) == 1, (name, file)
        assert f">{name}<" in page or f": {name}<" in page
    assert len(told) == len(named) + of_all * len(unread)
    assert f"{len(told)} runs, files or figures could not be read" in page
    assert "Traceback" not in said and "<img" not in page and "<svg" in page


def test_of_bad_runs_alone_there_is_a_page_and_a_table(hostile, capfd, tmp_path):
    root, unread, _ = hostile
    assert ended("report", root / unread[0], "--output", tmp_path / "page.html") == 2
    assert "0 runs.</p>" in (tmp_path / "page.html").read_text()
    assert ended("table", root / unread[0], "--format", "csv") == 2
    assert "published" in capfd.readouterr().out


def test_sound_runs_end_with_code_0(tmp_path, capfd):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "result.json").write_text(of_result())
    assert ended("table", tmp_path) == ended("report", tmp_path, "--output", tmp_path / "page.html") == 0
    assert "left out" not in capfd.readouterr().err


def test_thousands_of_terms_are_not_drawn(tmp_path, capfd):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "result.json").write_text(of_result())
    terms = {f"term{i}": 1.0 for i in range(1000)}
    (tmp_path / "good" / "metrics.jsonl").write_text(json.dumps({"iteration": 0, **terms}) + "\n")
    assert ended("report", tmp_path, "--output", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 60 and "940 more terms are not drawn" in page


@pytest.mark.parametrize("text", FORMULAS)
def test_a_csv_holds_no_formula(text, tmp_path):
    record = {text: text, "plain": "a=b", "number": -0.3, "negative": "-0.3", "exponent": "+1e-05"}
    file = tmp_path / "a.csv"
    file.write_text(csv_text([record]), encoding="utf-8", newline="")
    with open(file, newline="", encoding="utf-8") as opened:
        (head, row) = csv.reader(opened)
    assert head[0] == row[0] and head[0][0] == "'" and row[1:] == ["a=b", "-0.3", "-0.3", "+1e-05"]
    kept = text.replace("\r", "\n")
    assert read_csv(file) == [{**dict.fromkeys([kept], kept), "plain": "a=b", "number": "-0.3", "negative": "-0.3",
                               "exponent": "+1e-05"}]  # fmt: skip


@pytest.mark.parametrize("text", ["'=1", "''-x", "'quoted'", "-0.5", "", "'"])
def test_what_csv_protects_is_read_as_it_was(text, tmp_path):
    (tmp_path / "a.csv").write_text(csv_text([{"a": text}, {"a": "x"}]), encoding="utf-8", newline="")
    assert read_csv(tmp_path / "a.csv") == [{"a": text}, {"a": "x"}]


def test_formulas_stand_in_no_table(tmp_path, capfd):
    for i, text in enumerate(FORMULAS):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "result.json").write_text(of_result(method=text))
        (tmp_path / f"p{i}").mkdir()
        of_pretraining = result("pretrain", {"loss": 1.0, text: 2.0}, method=text, weights_hash=str(i))
        (tmp_path / f"p{i}" / "result.json").write_text(to_json(of_pretraining))
    for folders in (tmp_path.glob("[0-9]"), tmp_path.glob("p*")):
        assert ended("table", *folders, "--format", "csv", "--output", tmp_path / "t.csv") == 0
        with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        begun = [cell for cell in cells if cell[:1] and cell[0] in "=+-@\t\r\n＝"]
        assert [cell for cell in begun if not re.fullmatch(r"[-+]?[\d.e-]+", cell)] == []


def test_latex_rows_begin_with_no_option():
    assert latex_text("[2cm] a") == "{[}2cm] a" and latex_text(" * b") == "{*} b"
    assert latex_text("a [b]") == "a [b]"
    assert latex_text("a\0b\x1b[31m") == "a?b?[31m"
    assert latex_text(r"\input{x}") == r"\textbackslash{}input\{x\}"


def test_markdown_names_stay_in_their_cell():
    assert markdown_text("a|b\nc\u2028d\x1b[31m\u202e") == r"a\|b c d?\[31m?"


def test_what_is_left_out_is_one_line():
    assert one_line("a\nb\x1b[31m\udcff") == r"a\nb\x1b[31m\udcff"
