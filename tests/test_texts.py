"""Configs, lists and names that may be any file of this machine: read right, or one line that names the file and
the line, and repeats nothing of what stands there."""

import os
import signal

import pytest
from coco_fixture import write_coco
from dense_fixture import write_start
from label_set_fixture import write_folder
from photos import write_photos
from tool_fixture import ended, load_tool

from det_plugin.coco.layout import locate
from pretrain.config import load_config
from pretrain.data.box_sets import read_boxes
from pretrain.data.datasets import open_label_sets
from pretrain.data.datasets.listing import listed_stems
from pretrain.data.sources import DataSettings, open_source
from pretrain.errors import UserError
from pretrain.files import read_lines
from pretrain.results.schema import read_result

SECRET = "SeCrEt42"
NAMES = ("wall", "floor", "car", "sky")
GOOD = "".join(f"{name}\n" for name in NAMES)


def with_file(write, name):
    """A reader of a set in which a file is replaced."""

    def read(path, root):
        write(root)
        (root / name).unlink(missing_ok=True)
        os.symlink(path, root / name)
        return open_label_sets(root, "folder", 0) if write is write_folder else read_boxes(root)

    return read


def compare(path, root):
    load_tool("compare").main([str(path), "--output", str(root), "--dry-run"])


READERS = {
    "pretrain": lambda path, _: load_config(path),
    "config": lambda path, _: load_tool("config").main([str(path)]),
    "compare": compare,
    "detect": lambda path, _: locate(path, "train"),
    "labels.yaml": with_file(write_folder, "labels.yaml"),
    "classes.txt": with_file(write_folder, "classes.txt"),
    "stems": lambda path, root: read_boxes(write_coco(root), "train2017", names=path),
    "list": lambda path, _: open_source(DataSettings(root=str(path), source="list")),
    "COCO": with_file(write_coco, "annotations/instances_val2017.json"),
    "result": lambda path, _: read_result(path),
}
CONTENTS = {
    "passwd": f"root:x:0:0:root:/root:/bin/{SECRET}\n{SECRET}:x:1:1:{SECRET}:/usr:/bin/sh\n".encode(),
    "mapping": f"root:x:0:0:{SECRET}: {SECRET}:/root:/bin/sh\n".encode(),
    "twice": f"{SECRET} {SECRET}: 1\n{SECRET} {SECRET}: 2\n".encode(),
    "tag": f"a: !{SECRET}!x 1\n".encode(),
    "alias": f"a: *{SECRET}\n".encode(),
    "json": f'{{"{SECRET} {SECRET}": "{SECRET}"'.encode(),
    "list": f'["{SECRET}"]'.encode(),
    "binary": SECRET.encode() + bytes(range(256)),
    "latin-1": f"a\n{SECRET}\xe9".encode("latin-1"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_nothing_of_another_file_is_repeated(tmp_path, reader, name, capsys):
    path = tmp_path / "any.yaml"
    path.write_bytes(CONTENTS[name])
    try:
        READERS[reader](path, tmp_path / "root")
    except UserError as error:
        told = str(error)
        assert SECRET not in told and "\n" not in told and len(told) < 700
        assert "any.yaml" in told or "root" in told
    else:
        # Lines of text may be names of classes, but there are too few or too many of them.
        raise AssertionError("it was read")
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err


@pytest.mark.parametrize("kind", ["folder", "fifo", "zero", "loop", "huge"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_plain_file_is_refused_at_once(tmp_path, reader, kind):
    path = tmp_path / "any.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**42)
    else:
        os.symlink("/dev/zero" if kind == "zero" else path.name, path)

    def hangs(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    try:
        with pytest.raises((UserError, OSError)) as error:
            READERS[reader](path, tmp_path / "root")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD.encode("utf-8-sig"), ""),
        (GOOD.encode("utf-16"), ""),
        (b"\xfe\xff" + GOOD.encode("utf-16-be"), ""),
        (GOOD.replace("\n", "\r\n").encode(), ""),
        (GOOD.replace("\n", "\r").encode(), ""),
        (f"{GOOD}\n  \n".encode(), ""),
        ("wall\nfen\xeatre\ncar\nsky".encode("latin-1"), "line 2 is no UTF-8"),
        (GOOD.encode("utf-16-le"), "line 1 has control characters"),
        (GOOD.encode("utf-32"), "line 1 has control characters"),
        (GOOD.encode("utf-16")[:-1], "it begins as UTF-16 and is none"),
        (b"wall\nfl\0oor\ncar\nsky", "line 2 has control characters"),
        (b"wall\n\x1b[31mfloor\ncar\nsky", "line 2 has control characters"),
        ("wall\nfl\u2028oor\ncar\nsky".encode(), "line 2 has control characters"),
        (b"wall\n\ncar\nsky", "line 2 is empty"),
        (b"\nwall\nfloor\ncar\nsky", "line 1 is empty"),
        (b"wall\nfloor\ncar\nwall", "the lines 1 and 4 name one class"),
        (b"wall\n" + b"x" * 5000 + b"\ncar\nsky", "line 2 is more than 255 characters"),
        ("".join(f"c{i}\n" for i in range(100_000)).encode(), "names the labels 0 to 99999"),
        (b"x\n" * 2**23 + b"y", "more than 16777216"),
    ],
)
def test_names_of_classes_in_any_encoding(tmp_path, content, said):
    write_folder(tmp_path, 2, 2)
    file = tmp_path / "classes.txt"
    file.write_bytes(content)
    if not said:
        assert open_label_sets(tmp_path, "folder", 0)[0].classes == NAMES
        return
    with pytest.raises(UserError, match=said) as error:
        open_label_sets(tmp_path, "folder", 0)
    assert str(file) in str(error.value) and len(str(error.value)) < 400


def test_names_in_labels_yaml_are_held_to_the_same(tmp_path):
    write_folder(tmp_path, 2, 2)
    for names, said in (
        ("[wall, floor, car, wall]", "two of its classes are called 'wall'"),
        (f"[wall, {'x' * 300}, car, sky]", "a class has more than 255"),
        ('[wall, "fl\\noor", car, sky]', "control characters"),
        ("[wall, '', car, sky]", "a class has no name"),
    ):
        (tmp_path / "labels.yaml").write_text(f"classes: {names}\n")
        with pytest.raises(UserError, match=said) as error:
            open_label_sets(tmp_path, "folder", 0)
        assert "labels.yaml" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "labels.yaml").write_bytes(f"classes: [{', '.join(NAMES)}]\n".encode("utf-16"))
    assert open_label_sets(tmp_path, "folder", 0)[0].classes == NAMES


def test_lists_in_any_encoding(tmp_path):
    file = tmp_path / "list.txt"
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_bytes("# images\r\n\r\na/\u00e9.jpg\r\nb.png\r\n".encode(encoding))
        assert listed_stems(file) == ["\u00e9", "b"]
        source = open_source(DataSettings(root=str(file)))
        assert [source.name(i) for i in range(len(source))] == ["a/\u00e9.jpg", "b.png"]
    assert read_lines(file) == ["# images", "", "a/\u00e9.jpg", "b.png"]
    file.write_bytes(b"a.jpg\nfen\xeatre.jpg\n")
    with pytest.raises(UserError, match="list.txt is no readable list of images .line 2 is no UTF-8"):
        listed_stems(file)
    # Names of files are bytes.
    assert len(open_source(DataSettings(root=str(file)))) == 2


def test_a_line_break_in_a_folders_name_breaks_no_error(tmp_path, capsys):
    for part in ("train", "val"):
        for kind in ("a\nb\x1b[2J", "other"):
            write_photos(tmp_path / "set" / part / kind, n=2, size=(40, 30))
    (tmp_path / "set" / "val" / "a\nb\x1b[2J" / "000.jpg").write_bytes(b"no")
    weights = write_start(tmp_path / "w.safetensors", depth=1)
    words = [
        "--weights",
        weights,
        "--knn-root",
        tmp_path / "set",
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    assert ended("evaluate dense", *words, "knn.resize_px=40", "knn.crop_px=32", "knn.k=1") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "a\\nb\\x1b[2J/000.jpg cannot be read" in line
