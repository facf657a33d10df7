"""The pages of docs/extending: what they show is written to its file and run, at tiny size."""

import re
import shutil
import sys
import zipfile

import numpy as np
import pytest
from dense_fixture import write_start
from docs_fixture import DOCS, blocks, made_tiny, posfield_words, split_name, with_fields
from photos import write_photos
from runs_fixture import ROOT, lines_of
from tool_fixture import ended

import seg_plugin.data
import seg_plugin.protocol
from pretrain.data import sources
from pretrain.data.datasets import SETS
from pretrain.registry import BACKBONES
from pretrain.results.schema import read_result
from pretrain.weights import read_checkpoint

PAGES = DOCS / "extending"
FILE = re.compile(r'^```[^\n]*title="([\w.]+)"[^\n]*\n(.*?)^```', re.M | re.S)
REGISTRIES = (BACKBONES._obj_map, sources.OWN, SETS, seg_plugin.data.DATASETS, seg_plugin.protocol.PROTOCOLS)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder to work in, photographs in it; what the page's modules register is taken out again."""
    held = [dict(of) for of in REGISTRIES]

    def forget():
        for of, before in zip(REGISTRIES, held):
            of.clear()
            of.update(before)

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_photos(tmp_path / "photos", n=6)
    yield tmp_path, forget
    forget()
    own = [
        name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))
    ]
    for name in own:
        del sys.modules[name]


def run_page(name, world, monkeypatch, **fields):
    """Write the files that a page shows, then run its other blocks in order.

    Args:
        fields: ``key=value`` words of a command, over those of tiny size.
    """
    page, shown, (folder, forget) = PAGES / name, set(), world
    for file, text in FILE.findall(page.read_text()):
        included = re.fullmatch(r'--8<-- "(.+)"\n', text)
        (folder / file).write_text((ROOT / included[1]).read_text() if included else text)
        shown.add(text.rstrip("\n"))
    for block in (block for block in blocks(page) if block.text not in shown):
        for variable, value in re.findall(r"^export (\w+)=(\S+)$", block.text, re.M):
            monkeypatch.setenv(variable, value)
        for words in filter(None, map(posfield_words, block.commands)):
            command, words = split_name(words)
            words = with_fields(made_tiny(command, words), fields.get(command.replace(" ", "_"), []))
            assert ended(command, *words) == 0, f"{block.where}: {command} {words}"
        if block.language == "python":
            forget()  # what the commands before have registered in this process
            exec(compile(block.text, block.where, "exec"), {"__name__": "page"})


def test_a_backbone_is_one_file(world, coco, ade, monkeypatch):
    folder, _ = world
    shutil.copytree(coco, folder / "COCO")
    shutil.copytree(ade, folder / "ADE")
    run_page("backbone.md", world, monkeypatch, pretrain=["backbone.name=vit_tiny_patch16_stem"])
    for name, kind in (("stem_coco", "detection"), ("stem_ade", "segmentation")):
        result = read_result(folder / "runs" / name)
        assert (result.kind, result.backbone, result.method) == (kind, "vit_tiny_patch16_stem", "intertwined")
    weights = folder / "runs" / "stem" / "backbone.safetensors"
    assert "patch_embed.layers.0.0.weight" in read_checkpoint(weights).state
    for name, more, code in (("timm", ["--size", 64], 2), ("onnx", ["--size", 64], 0), ("posfield", [], 0)):
        path = folder / {"timm": "out", "onnx": "out.onnx"}.get(name, "out.safetensors")
        assert ended("export", "--weights", weights, "--format", name, "--output", path, *more) == code, name


def test_a_method_is_one_file(world, coco, monkeypatch):
    folder, _ = world
    shutil.copytree(coco, folder / "COCO")
    run_page("method.md", world, monkeypatch, pretrain=["crops.n_local=0"])
    assert all(
        line["loss"] == pytest.approx(line["info_nce"]) for line in lines_of(folder / "runs" / "simclr")
    )
    assert read_result(folder / "runs" / "simclr_coco").method == "simclr"


def test_a_loss_is_one_file(world, monkeypatch):
    folder, _ = world
    run_page("loss.md", world, monkeypatch, pretrain=["spread.weight=0.5"])
    for line in lines_of(folder / "runs" / "spread"):
        terms = ("image", "content", "position", "variance", "koleo")
        assert 0 < line["variance"] <= 0.5 and line["loss"] == pytest.approx(sum(line[key] for key in terms))
    result = read_result(folder / "runs" / "spread")
    changed = result.protocol.deviations
    assert "variance" in result.loss_terms and changed["spread.weight"] == [1.0, 0.5]
    assert changed["method"] == ["intertwined", "spread_method"]


def test_data_sets_are_one_file_each(world, monkeypatch):
    folder, _ = world
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for file in sorted((folder / "photos").iterdir()):
            archive.write(file, f"inside/{file.name}")
    for part in ("train", "val"):
        write_photos(folder / "ARRAYS" / part, n=4, size=(56, 40))
        for k, file in enumerate(sorted((folder / "ARRAYS" / part).glob("*.jpg"))):
            values = np.full((40, 56), 9, np.uint8)
            values[:30, :30], values[30:] = k % 2, 1 - k % 2
            np.save(file.with_suffix(".npy"), values)
    (folder / "runs" / "mine").mkdir(parents=True)
    write_start(folder / "runs" / "mine" / "backbone.safetensors")
    dense = ["linear.image_px=64", "linear.epochs=1", "linear.batch_size=2", "linear.augment=false"]
    run_page("dataset.md", world, monkeypatch, segment=["val_every=2"], evaluate_dense=dense)
    found = {name: read_result(folder / "runs" / name) for name in ("zip", "arrays", "arrays_dense")}
    assert {name: (result.kind, result.protocol.name) for name, result in found.items()} == {
        "zip": ("pretrain", "intertwined-100ep"),
        "arrays": ("segmentation", "arrays-40k"),
        "arrays_dense": ("dense", "dense-arrays"),
    }
    # Their own classes, and images that were read: four of validation
    assert found["arrays_dense"].metrics["images"] == 4
    assert found["arrays_dense"].metrics["in_context_class_iou"].keys() == {"road", "car"}


def test_a_module_or_source_that_is_not_there_is_told(world, monkeypatch, capsys):
    words = ["--config", "toy", "data.root=photos", "data.source=zip"]
    assert ended("pretrain", *words) == 2
    told = "error: data.source=zip is none of auto, folder, list, coco, tar, parquet, huggingface"
    assert told in capsys.readouterr().err
    monkeypatch.setenv("POSFIELD_IMPORT", "gone.py")
    assert ended("pretrain", *words) == 2
    assert "error: POSFIELD_IMPORT: gone.py cannot be imported" in capsys.readouterr().err
