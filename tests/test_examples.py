"""The notebooks of examples/, run from their first cell to their last, at tiny size."""

import json
import os
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from coco_fixture import write_coco
from photos import TINY, write_photos
from test_det_plan import WORDS
from test_torchvision_run import backbone_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, folder, **parameters):
    """Execute the code cells of a notebook in a folder; parameters take the place of the tagged cell's values. What the
    cells leave."""
    cells = [c for c in json.loads((EXAMPLES / name).read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["metadata"].get("tags") for c in cells] == [["parameters"], *[None] * (len(cells) - 1)]
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells)
    space, before = {"__name__": "notebook"}, os.getcwd()
    matplotlib.use("Agg")
    os.chdir(folder)
    try:
        for cell in cells:
            exec(compile("".join(cell["source"]), name, "exec"), space)
            if cell["metadata"].get("tags"):
                assert parameters.keys() <= space.keys()
                space |= parameters
    finally:
        os.chdir(before)
        plt.close("all")
    return space


def test_own_photographs(tmp_path):
    write_photos(tmp_path / "photos")
    settings = {}
    for word in [*TINY, "log.every=1", "optim.epochs=2"]:
        key, _, value = word.partition("=")
        group, _, name = key.partition(".")
        settings.setdefault(group, {})[name] = value
    left = run("own_photographs.ipynb", tmp_path, SETTINGS=settings)
    assert (tmp_path / left["run"] / "backbone.safetensors").is_file() and len(left["lines"]) == 4
    assert left["vectors"].shape == (6, 192) and len({*left["nearest"]} & {*left["names"]}) == 5


@pytest.mark.parametrize("masks", [True, False])
def test_own_labels(tmp_path, masks):
    data = write_coco(tmp_path / "export")
    if not masks:
        for file in (data / "annotations").glob("*.json"):
            content = json.loads(file.read_text())
            for annotation in content["annotations"]:
                annotation["segmentation"] = []
            file.write_text(json.dumps(content))
    weights = backbone_file(tmp_path / "backbone.safetensors", seed=0)
    words = [word.split("=") for word in WORDS if not word.startswith("backbone.")]
    fields = {**dict(words), "epochs": 1}
    options = {"device": "cpu", "workers": 0, "engine": "torchvision", "accumulate": 2}
    left = run("own_labels.ipynb", tmp_path, WEIGHTS=str(weights), FIELDS=fields, OPTIONS=options)
    assert left["looked"].returncode == 0 and "images" in left["looked"].stdout
    assert ("mask_ap" in left["metrics"]) == masks and left["detector"].protocol.has_masks == masks
    assert left["drawn"].shape[2] == 3 and left["found"].labels is not None
