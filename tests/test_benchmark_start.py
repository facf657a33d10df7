"""What `posfield benchmark start` measures, at a thousandth of the size."""

import json

import pytest
from tool_fixture import load_tool

from det_plugin.benchmark.start import annotations, evaluation, listing, whole_data, write_files, write_split
from det_plugin.coco.annotations import read_split
from pretrain.data.sources import DataSettings, open_source


@pytest.mark.slow
def test_the_tool_leaves_the_figures(tmp_path):
    file = tmp_path / "f.json"
    load_tool("benchmark").main(["start", "--files", "50", "--shrink", "1000", "--json", str(file)])
    found = json.loads(file.read_text())
    assert (found["files"], found["shrink"]) == (50, 1000)
    parts = {"list", "digest", "train", "val", "evaluation", "data"}
    assert found["seconds"].keys() == found["peak_mib"].keys() == parts
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_the_parts_read_what_was_made_up(tmp_path):
    write_files(tmp_path / "files", 1001)
    assert len(open_source(DataSettings(root=str(tmp_path / "files")))) == 1001
    for split in ("train", "val"):
        write_split(tmp_path / "coco", split, 5, 40)
    split = read_split(tmp_path / "coco", "val", num_classes=80, training=False)
    assert len(split.pictures) == 5 and sum(len(picture.classes) for picture in split.pictures) == 40
    works = [listing(str(tmp_path / "files"), True), evaluation(str(tmp_path / "coco"))]
    for work in [*works, annotations(str(tmp_path / "coco"), "train"), whole_data(str(tmp_path / "coco"))]:
        work()
