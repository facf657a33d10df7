"""The comparison: what a yaml may say, the shipped ones against the published tables, and the runs: done
once, and gone on with.

One comparison at the end is real, of files in two layouts; elsewhere the tools that it starts are stand-ins.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ade_fixture import write_ade
from coco_fixture import annotation_file, edit, write_coco
from tool_fixture import load_tool

from det_plugin.protocol import PROTOCOLS
from pretrain.build import build_backbone
from pretrain.cli import command
from pretrain.data.digest import hash_of_file
from pretrain.errors import Interrupted, UserError
from pretrain.files import write_json
from pretrain.jobs import compare
from pretrain.jobs.compare_config import Comparison, Entry, load_comparison, name_of
from pretrain.jobs.runner import gpu_groups
from pretrain.results.folder import unnamed
from pretrain.results.provenance import file_hash
from pretrain.results.published import published_rows, rows_of_tables
from pretrain.results.rows import backbone_family
from pretrain.results.schema import Protocol, Result, read_result, to_json, write_result
from pretrain.settings import replaced
from pretrain.weights import read_checkpoint, save_backbone

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "compare"
TINY = "vit_tiny_patch16"
ROW = {"method": "DINO", "backbone": TINY, "file": "dino.pth"}


def write_yaml(folder, *rows, **keys):
    """``folder/c.yaml``; JSON is YAML."""
    (folder / "c.yaml").write_text(json.dumps({**keys, "entries": [{**ROW, **row} for row in rows]}))
    return folder / "c.yaml"


def write_ours(file, seed=0, method="intertwined", epochs=3.5):
    """A file as a pre-training leaves it."""
    torch.manual_seed(seed)
    vit = build_backbone(TINY, depth=2, pos_encoding="field", pos_grid=6, n_registers=1)
    origin = {"method": method, "effective_epochs": epochs}
    return save_backbone(file, vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs, provenance=origin)


def write_timm(file, seed=0, **model_kwargs):
    """A flat state dict under timm's names, with a classifier."""
    torch.manual_seed(seed)
    state = build_backbone(TINY, depth=2, pos_grid=4, **model_kwargs).state_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**state, "head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}, file)
    return file


# --- the yaml ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({}, {"seed": 0}, "c.yaml: unknown key 'seed'; did you mean seeds?"),
        ({"epochs": 3}, {}, r"c.yaml: unknown key 'entries\[0\].epochs'"),
        (
            {},
            {"seeds": [0, "x"]},
            r"c.yaml: seeds=\['0', 'x'\] should be a list of values, each a whole number",
        ),
        ({}, {"seeds": []}, r"c.yaml: seeds=\[\] should be one or more different"),
        ({}, {"seeds": [1, 1]}, r"seeds=\[1, 1\] should be one or more different"),
        ({}, {"accumulate": 0}, "c.yaml: accumulate=0 should be greater than or equal to 1"),
        ({}, {"tables": "9"}, "c.yaml: tables: no published table '9'"),
        ({}, {"checkpointing": "yes"}, "c.yaml: checkpointing='yes' should be true or false"),
        ({}, {"detection": "coco-11ep"}, "c.yaml: detection='coco-11ep' is none of coco-12ep"),
        ({"detection": "coco-11ep"}, {}, r"c.yaml: entries\[0\].detection='coco-11ep' is none of coco-12ep"),
        ({}, {"segmentation": "all"}, "c.yaml: segmentation='all' should be 'sweep', 'point' or 'none'"),
        ({}, {"detection_overrides": ["lr"]}, "c.yaml: detection_overrides=.* should be a group of keys"),
        ({"file": [1]}, {}, r"c.yaml: entries\[0\].file=\['1'\] should be UTF-8 text"),
        (
            {"effective_epochs": "many"},
            {},
            r"c.yaml: entries\[0\].effective_epochs='many' should be a number",
        ),
        (
            {"effective_epochs": "inf"},
            {},
            r"c.yaml: entries\[0\].effective_epochs=inf should be a finite number",
        ),
        ({"patch_size": True}, {}, r"entries\[0\].patch_size='true' should be a whole number"),
        ({"backbone": "vit_s16"}, {}, r"c.yaml: entries\[0\]: backbone='vit_s16' is none of"),
        ({"source": "dyno"}, {}, r"entries\[0\]: source='dyno' is none of"),
        ({"subnet": "ema"}, {}, r"entries\[0\].subnet='ema' should be 'teacher' or 'student'"),
        ({"name": "a/b"}, {}, r"entries\[0\]: name='a/b' is no name of a folder"),
        ({"method": "..", "name": "weights"}, {}, "name='weights' is no name"),
        ({}, {"base": "c.yaml"}, "base: .*c.yaml -> .*c.yaml is a circle"),
        ({}, {"base": ["c.yaml"]}, "base: .*c.yaml -> .*c.yaml is a circle"),
        ({}, {"base": {"c.yaml": 1}}, r"base={'c.yaml': '1'} \(.*c.yaml\) should be the name of a file"),
        ({}, {"base": "none.yaml"}, "no file .*none.yaml"),
        (
            {"effective_epochs": -3},
            {},
            r"entries\[0\].effective_epochs=-3.0 should be greater than or equal to 0",
        ),
        ({"method": " "}, {}, r"entries\[0\]: method is empty"),
        ({}, {"seeds": [2**32]}, r"seeds=\[4294967296\] should be"),
        (
            {},
            {"detection_overrides": {"lr": [[1]]}},
            r"detection_overrides.lr=\[\['1'\]\] should be UTF-8 text",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, row, keys, message):
    with pytest.raises(UserError, match=message) as unsupported:
        load_comparison(write_yaml(tmp_path, row, **keys), detections=PROTOCOLS)
    assert str(tmp_path) in str(unsupported.value) and "\n" not in str(unsupported.value)


BOMB = (
    "[x, x, &a [y, y, y, y], "
    + ", ".join(f"&{b} [{', '.join(6 * [f'*{a}'])}]" for a, b in pairwise("abcdefghijklmn"))
    + "]"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: " + 10000 * "[", "no readable YAML"),
        ("weights: 2026-13-45", "entries is missing"),  # a folder's name
        ("weights: !!python/object/apply:os.getcwd []", r"weights=\[\] should be UTF-8 text"),
        (f"{{weights: {BOMB}, entries: []}}", "no readable YAML .*aliases"),
        (f"{{detection_overrides: {{lr: {BOMB}}}, entries: []}}", "no readable YAML .*aliases"),
        ("{detection_overrides: {lr: &a [*a]}, entries: []}", "no readable YAML .*aliases"),
        ("weights: a\nweights: b", "no readable YAML .line 2: the key stands twice"),
        ("entries: []", r"entries=\[\] should have at least 1 item"),
    ],
)
def test_yaml_that_does_harm_is_an_error_of_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/c.yaml.*{message}") as unsupported:
        load_comparison(tmp_path / "c.yaml")
    assert len(str(unsupported.value)) < 400


def test_rows_need_names_of_their_own_and_all_that_has_no_default(tmp_path):
    with pytest.raises(UserError, match="two entries are called 'dino_vitt16'"):
        load_comparison(write_yaml(tmp_path, {}, {"file": "other.pth"}))
    (tmp_path / "c.yaml").write_text("entries: [{method: DINO, backbone: vit_tiny_patch16}]")
    with pytest.raises(UserError, match=r"c.yaml: entries\[0\].file is missing"):
        load_comparison(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("weights: w")
    with pytest.raises(UserError, match="c.yaml: entries is missing"):
        load_comparison(tmp_path / "c.yaml")


def test_a_base_and_words_change_single_keys(tmp_path):
    write_yaml(
        tmp_path, {}, seeds=[1], detection_overrides={"lr": 1e-4, "amp": False, "milestones_it": [3, 4]}
    )  # an old name
    (tmp_path / "between.yaml").write_text("base: c.yaml\ndetection_overrides: {amp: true}\n")
    (tmp_path / "child.yaml").write_text("base: between.yaml\nweights: there\n")
    words = [
        "coco=here #{1}",
        "seeds=0,2",
        "detection_overrides.lr=3e-4",
        "accumulate=4",
        "segmentation=none",
    ]
    words += ["detection_overrides.backbone.drop_path=0.2"]
    read = load_comparison(tmp_path / "child.yaml", words, PROTOCOLS)
    changed = {"lr": "3e-4", "amp": "true", "milestones": "3,4", "backbone.drop_path": "0.2"}
    told = dict(
        weights="there",
        coco="here #{1}",
        seeds=(0, 2),
        accumulate=4,
        segmentation="none",
        detection_overrides=changed,
    )
    assert read == Comparison(entries=(Entry(**ROW),), **told)
    write_yaml(tmp_path, {"segmentation": "none", "detection": "none"})
    (entry,) = load_comparison(tmp_path / "c.yaml", ["segmentation=sweep"], PROTOCOLS).entries
    assert (entry.segmentation, entry.detection) == ("", "none")  # the word is for every row
    with pytest.raises(UserError, match="entries: name the rows"):
        load_comparison(tmp_path / "child.yaml", ["entries=1"])
    assert load_comparison(tmp_path / "child.yaml", ["weights=2026", "tables=2"]).weights == "2026"
    with pytest.raises(UserError, match=r"child.yaml: workers='@' \(command line\) should be a whole number"):
        load_comparison(tmp_path / "child.yaml", ["workers=@"])
    with pytest.raises(UserError, match="accumulate='x' .* should be a whole number"):
        load_comparison(tmp_path / "child.yaml", ["accumulate=x"])


def test_bases_that_lead_back_are_named(tmp_path):
    """Whatever the folder is called, and wherever the circle begins."""
    folder = tmp_path / "{a} $b"
    (folder / "more").mkdir(parents=True)
    for name, base in (("a", "more/b.yaml"), ("more/b", "../c.yaml"), ("c", "more/b.yaml")):
        (folder / f"{name}.yaml").write_text(f"base: {base}\n")
    with pytest.raises(UserError) as unsupported:
        load_comparison(folder / "a.yaml")
    message = str(unsupported.value)
    circle = message.split("base: ")[1].split(" is a circle")[0].split(" -> ")
    assert [Path(name).name for name in circle] == ["a.yaml", "b.yaml", "c.yaml", "b.yaml"]
    (folder / "c.yaml").write_text("seed: 1\n")
    with pytest.raises(
        UserError, match=r"unknown key 'seed' \(.*c.yaml\); did you mean seeds\?"
    ) as unsupported:
        load_comparison(folder / "a.yaml")
    assert str(unsupported.value).startswith(f"{folder}/a.yaml: ")


@pytest.mark.parametrize("model", [Comparison, Entry])
def test_every_key_says_where_its_value_comes_from(model):
    assert [name for name, field in model.model_fields.items() if not field.json_schema_extra["source"]] == []
    assert all(field.description for field in model.model_fields.values())


# --- the shipped ones -------------------------------------------------------------------------------------


def shipped(name):
    return load_comparison(CONFIGS / f"{name}.yaml", detections=PROTOCOLS)


def test_every_shipped_file_can_be_read():
    assert {path.stem for path in CONFIGS.iterdir()} == {
        "table1_vitb16", "table1_vits16", "table2", "table7", "coco10pct", "toy", "modern_vits16", "modern_vitb16",
        "modern_vitl16",
    }  # fmt: skip
    for path in CONFIGS.iterdir():
        assert all(entry.origin for entry in shipped(path.stem).entries), path


@pytest.mark.parametrize(
    ("name", "table", "backbone"),
    [
        ("table1_vitb16", "1", "ViT-B/16"),
        ("table1_vits16", "1", "ViT-S/16"),
        ("coco10pct", "1", "ViT-S/16"),
        ("table2", "2", "ViT-S/16"),
        ("table7", "7", None),
    ],
)
def test_every_published_row_has_an_entry(name, table, backbone):
    """In the paper's order, under its label, with its number of epochs; a file of ours says its own, and
    the tables match those."""
    read = shipped(name)
    rows = [row for row in rows_of_tables(published_rows(), table) if backbone in (row.backbone, None)]
    ours = {"Intertwined", "DINOv2 (ImageNet-1K)"}
    expected = [(r.method, r.backbone, None if r.method in ours else r.effective_epochs) for r in rows]
    assert [(e.method, backbone_family(e.backbone), e.effective_epochs) for e in read.entries] == expected
    assert read.tables == table
    for entry, row in zip(read.entries, rows):
        segmented = (entry.segmentation or read.segmentation) != "none"
        assert segmented == (row.ade20k_miou is not None and name != "coco10pct"), entry.method
        assert ("posfield pretrain " in entry.origin) == (entry.method in ours)
        if entry.method in ours:
            config = entry.origin.split("--config ")[1].split()[0]
            assert (ROOT / "configs" / "pretrain" / f"{config}.yaml").is_file()
            assert entry.file == f"{entry.origin.rpartition('/')[2]}/backbone.safetensors"


@pytest.mark.parametrize("size, letter", [("small", "s"), ("base", "b"), ("large", "l")])
def test_the_backbones_of_today_are_compared_under_one_protocol(size, letter):
    """Files are called as published; what the paper's tables hold, too, is the same entry, so runs are shared."""
    read = shipped(f"modern_vit{letter}16")
    methods = ["DINOv2", "DINOv2-reg", "DINOv3", *["MAE"] * (letter != "s"), "Intertwined"]
    assert [entry.method for entry in read.entries] == methods
    assert {(e.backbone.removesuffix("_reg4"), e.detection, e.segmentation) for e in read.entries} == {
        (f"vit_{size}_patch16", "", "")
    }
    assert (read.detection, read.segmentation) == ("coco-12ep", "sweep")
    dinov3 = read.entries[2]
    assert re.fullmatch(rf"dinov3_vit{letter}16_pretrain_lvd1689m-[0-9a-f]{{8}}\.pth", dinov3.file)
    known = [e for name in ("table1_vits16", "table1_vitb16", "table7") for e in shipped(name).entries]
    same = [entry.method for entry in read.entries if entry in known]
    assert same == ([] if letter == "l" else [method for method in methods if method != "DINOv3"])


def made_plan(comparison, output, **options):
    """The plan with all weights there."""
    weights = {
        name_of(e): compare.Weights(output / name_of(e), output / name_of(e), ("weights=0",), output / "note")
        for e in comparison.entries
    }
    return compare.plan(comparison, weights, output, **options)


def words_of(run):
    return dict(zip(run.command, [*run.command[1:], ""]))


def test_the_plans_of_the_shipped_files(tmp_path):
    two = made_plan(shipped("table2"), tmp_path)
    assert [run.name for run in two] == [
        "flsl_vits16/det_coco-50ep_seed0",
        "intertwined_vits16/det_coco-50ep_seed0",
    ]
    assert {words_of(run)["--protocol"] for run in two} == {"coco-50ep"}
    rows = {
        name_of(e): (e.file, e.source, e.method, e.effective_epochs) for e in shipped("table1_vits16").entries
    }
    assert all(
        rows[name_of(e)] == (e.file, e.source, e.method, e.effective_epochs)
        for e in shipped("table2").entries
    )  # shared
    seven = made_plan(shipped("table7"), tmp_path)
    assert (
        {run.entry.patch_size for run in seven} == {16}
        and len(seven) == 8
        and sum(("--sweep" in run.command) for run in seven) == 4
    )
    assert [run.entry.backbone for run in seven[:4]] == ["vit_base_patch16", "vit_base_patch16_reg4", "vit_small_patch16",
                                                         "vit_small_patch16_reg4"]  # fmt: skip
    base = made_plan(shipped("table1_vitb16"), tmp_path)
    assert [run.kind for run in base] == ["detect"] * 10 + ["segment"] * 7 and all(
        ("--sweep" in run.command) for run in base[10:]
    )
    several = made_plan(replaced(shipped("table1_vitb16"), {"seeds": (2, 3)}), tmp_path)
    assert [run.kind for run in several] == ["detect"] * 10 + ["segment"] * 7 + [
        "detect"
    ] * 10  # a sweep has seeds of its own
    cheap = made_plan(shipped("coco10pct"), tmp_path)
    assert len(cheap) == 30 and {run.folder.name for run in cheap} == {
        f"det_coco10pct-12ep_seed{seed}" for seed in range(3)
    }
    assert [words_of(run)["--seed"] for run in cheap] == ["0"] * 10 + ["1"] * 10 + ["2"] * 10


def test_the_tools_understand_the_commands(tmp_path):
    changes = {"seeds": (3,), "detection_overrides.lr": "2e-4", "workers": 0, "checkpointing": True}
    read = replaced(shipped("table1_vits16"), changes)
    run = made_plan(read, tmp_path, n_gpus=4)[0]
    options = load_tool("detect").parse(run.command[run.command.index("detect") + 1 :])
    assert (options.protocol, options.seed, options.accumulate, options.checkpointing) == (
        "coco-12ep",
        3,
        2,
        True,
    )
    assert (options.output, options.overrides, options.resume) == (
        tmp_path / "dino_vits16/det_coco-12ep_seed3",
        ["lr=2e-4"],
        True,
    )
    pytest.importorskip("mmseg")
    tool = load_tool("segment")
    swept, single = [
        made_plan(replaced(read, {"segmentation": kind}), tmp_path, n_gpus=2)[-1]
        for kind in ("sweep", "point")
    ]
    options = tool.parse(swept.command[3:])
    assert (options.sweep, options.jobs, options.dataset, options.resume) == ("all", 2, "ade20k", False)
    assert options.output == tmp_path / "intertwined_vits16/seg_sweep"
    options = tool.parse(single.command[single.command.index("segment") + 1 :])
    assert (options.sweep, options.seed, options.resume, options.output.name) == (None, 3, True, "seg_seed3")


def test_a_run_on_several_gpus(tmp_path, monkeypatch):
    alone, spread = (made_plan(shipped("table2"), tmp_path, n_gpus=n)[0] for n in (1, 4))
    assert alone.command[:3] == command("detect")
    own = [*compare.TORCHRUN, "--nproc-per-node", "4"]
    assert spread.command[1 : 1 + len(own)] == own
    assert spread.command[1 + len(own) :][:2] == command("detect")[1:]
    # the result does not depend on it
    assert alone.identity == spread.identity and "accumulate" not in alone.identity
    on_slurm = made_plan(shipped("table2"), tmp_path, n_gpus=4, sweep_jobs=16)[0]  # srun starts the ranks
    assert on_slurm.command[:3] == command("detect") and on_slurm.array == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,6,7,8")
    assert gpu_groups(3, 2) == ["2,5", "6,7", "2,5"]  # the last one is no pair
    assert gpu_groups(2, 1) == ["2", "5"]
    assert gpu_groups(2, 5) == [None, None]  # all of them
    with pytest.raises(UserError, match="a run on 6 GPUs: there are 5 here"):
        gpu_groups(1, 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_groups(2, 1) == [None, None]


# --- the weights ------------------------------------------------------------------------------------------


def test_a_foreign_file_becomes_one_of_ours_once(tmp_path):
    file, out = write_timm(tmp_path / "w" / "dino.pth"), tmp_path / "out"
    entry = Entry(**ROW, source="timm", effective_epochs=1600.0, patch_size=8)
    read = Comparison(entries=(entry,), weights=str(tmp_path / "w"))
    weights = compare.find_weights(read, entry, out)
    assert weights.file == out / "weights/dino_vitt16.safetensors" and not weights.is_ready
    compare.prepare(entry, weights)
    found = read_checkpoint(weights.file)
    assert weights.is_ready and (found.backbone, found.model_kwargs["patch_size"]) == (TINY, 8)
    assert (found.provenance["method"], found.provenance["effective_epochs"]) == ("DINO", 1600)
    before = weights.file.stat().st_mtime_ns
    compare.prepare(entry, weights)
    assert weights.file.stat().st_mtime_ns == before
    file.unlink()  # what was made of it is enough; and of runs that are done, the note
    assert compare.find_weights(read, entry, out) == weights and weights.is_ready
    weights.file.unlink()
    assert compare.find_weights(read, entry, out) == weights and not weights.is_ready
    with pytest.raises(UserError, match="no file .*dino.pth"):
        compare.prepare(entry, weights)
    write_timm(file, seed=1)
    other = compare.find_weights(read, entry, out)
    assert (
        other.file == weights.file
        and other.identity[0] != weights.identity[0]
        and other.identity[1:] == weights.identity[1:]
    )
    for changed in (
        {"patch_size": 16},
        {"method": "iBOT", "name": "dino_vitt16"},
        {"effective_epochs": 1.0},
        {"source": None},
    ):
        assert compare.find_weights(read, replaced(entry, changed), out).identity != other.identity


def test_a_file_of_ours_is_read_as_it_is(tmp_path):
    file, out = write_ours(tmp_path / "ours.safetensors"), tmp_path / "out"
    entry = Entry(**{**ROW, "file": "ours.safetensors"})
    read = Comparison(entries=(entry,), weights=str(tmp_path))
    weights = compare.find_weights(read, entry, out)
    with pytest.raises(UserError, match="ours.safetensors: vit_tiny_patch16, not vit_small_patch16"):
        compare.prepare(replaced(entry, {"backbone": "vit_small_patch16"}), weights)
    compare.prepare(entry, weights)
    assert weights.file == file and not list(out.rglob("*.safetensors"))
    resampled = compare.find_weights(read, replaced(entry, {"patch_size": 14}), out)
    assert resampled.file.parent == out / "weights"
    file.unlink()
    assert compare.find_weights(read, entry, out) == weights
    with pytest.raises(UserError, match="ours.safetensors: no file"):
        compare.prepare(entry, weights)


def test_the_tables_say_of_which_file_a_row_is(tmp_path):
    """Its own hash, not the converted file's; whose layout; and patches of another size, which the runs
    resample."""
    write_ours(tmp_path / "w" / "ours.safetensors")
    files = {
        "timm": write_timm(tmp_path / "w" / "t.pth", patch_size=14),
        "ours": tmp_path / "w" / "ours.safetensors",
    }
    rows = [{"name": "asked", "file": "t.pth", "patch_size": 16}, {"name": "silent", "file": "t.pth"},
            {"name": "ours", "file": "ours.safetensors"}]  # fmt: skip
    read, out = (
        load_comparison(write_yaml(tmp_path, *rows, weights=str(tmp_path / "w"), segmentation="none")),
        tmp_path / "out",
    )
    weights = compare.find_all(read, out)
    assert not compare.prepare_all(weights, read.entries)
    (lines,) = compare.weights_table(compare.plan(read, weights, out), weights).groups
    resampled = ("timm", "14 px, resampled to 16")
    expected = {"asked": resampled, "silent": resampled, "ours": ("ours", "16 px")}
    assert {line.cells[0]: line.cells[4:] for line in lines} == expected
    assert [line.cells[3] for line in lines] == [file_hash(files[name]) for name in ("timm", "timm", "ours")]


def test_a_folder_of_weights_is_there(tmp_path):
    """As Hugging Face's save_pretrained leaves it; another network in it is another identity."""
    entry, folder = Entry(**{**ROW, "file": "hub"}), tmp_path / "hub"
    read = Comparison(entries=(entry,), weights=str(tmp_path))
    assert compare.find_weights(read, entry, tmp_path / "out") is None
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    before = compare.find_weights(read, entry, tmp_path / "out")
    assert before.file != before.source == folder
    (folder / "model.safetensors").write_bytes(b"y")
    assert compare.find_weights(read, entry, tmp_path / "out").identity != before.identity


# --- the runs, with stand-ins for the tools ---------------------------------------------------------------

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output") + 1])
how = json.loads(Path(__file__).with_name("how.json").read_text()).get(f"{folder.parent.name}/{folder.name}", 0)
folder.mkdir(parents=True, exist_ok=True)
if how == "slow":
    signal.signal(signal.SIGTERM, lambda *_: (folder.joinpath("saved").touch(), sys.exit(85)))
if how in ("slow", "rude"):
    folder.joinpath("begun").write_text(str(os.getpid()))
    time.sleep(60)
if how:
    sys.exit(how)
with open(folder / "calls", "a") as calls:
    calls.write("x")
folder.joinpath("result.json").write_text(Path(__file__).with_name(Path(__file__).stem + ".json").read_text())
"""
DET, SEG = "det_coco-12ep_seed0", "seg_seed0"


def result(kind, **changes):
    fields = dict(
        kind=kind, method="told", backbone=TINY, effective_epochs=None, metrics={"box_ap": 30.0, "mask_ap": 20.0},
        protocol=Protocol(name="coco-12ep" if kind == "detection" else "ade20k-160k", version=1, full=True, deviations={}), seed=0,
        config_hash="a", weights_hash=None, git_commit=None, packages={}, hardware={}, wall_time_s=1.0, peak_memory_mib=None,
    )  # fmt: skip
    return Result(**(fields | ({"metrics": {"miou": 40.0}} if kind == "segmentation" else {}) | changes))


def wait_for(file):
    until = time.monotonic() + 30
    while not (file.is_file() and file.read_text()) and time.monotonic() < until:
        time.sleep(0.02)


class Workplace:
    """Two rows of ours, and the tool whose runs are stand-ins."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.out, self.tools = folder, folder / "out", folder / "tools"
        for name, kind in (("detect", "detection"), ("segment", "segmentation")):
            self.tools.mkdir(exist_ok=True)
            (self.tools / f"{name}.py").write_text(STAND_IN)
            (self.tools / f"{name}.json").write_text(to_json(result(kind)))
        self.happens()
        for data in ("coco", "ade"):
            (folder / data).mkdir()
        for seed, name in enumerate(("one", "two")):
            write_ours(folder / "w" / f"{name}.safetensors", seed)
        self.rows = [{"method": name, "name": name, "file": f"{name}.safetensors"} for name in ("one", "two")]
        self.module = load_tool("compare")
        monkeypatch.setattr(compare, "command", self.command)

    def command(self, name, *words):
        """In place of posfield's."""
        return [sys.executable, str(self.tools / f"{name}.py"), *words]

    def happens(self, **how):
        """{run with __ for /: exit code | "slow" | "rude": slow, and ends of a signal}."""
        (self.tools / "how.json").write_text(
            json.dumps({name.replace("__", "/"): code for name, code in how.items()})
        )

    def __call__(self, *words, rows=(), **keys):
        keys = dict(weights="w", coco="coco", ade="ade", segmentation="point", device="cpu") | keys
        keys |= {key: str(self.folder / keys[key]) for key in ("weights", "coco", "ade")}
        self.module.main(
            [
                str(write_yaml(self.folder, *self.rows, *rows, **keys)),
                "--output",
                str(self.out),
                *map(str, words),
            ]
        )

    def calls(self):
        """How often each run came to its end."""
        return {
            str(path.parent.relative_to(self.out)): len(path.read_text())
            for path in sorted(self.out.rglob("calls"))
        }


@pytest.fixture
def work(tmp_path, monkeypatch):
    return Workplace(tmp_path, monkeypatch)


def test_runs_are_done_once_and_a_failure_stops_no_other(work, capsys):
    work.happens(**{f"one__{DET}": 3})
    for _ in range(2):
        with pytest.raises(UserError, match=f"^failed: one/{DET}$"):
            work()
    assert f"failed: one/{DET}: its log is {work.out / 'one' / DET}.log" in capsys.readouterr().err
    assert work.calls() == {f"one/{SEG}": 1, f"two/{DET}": 1, f"two/{SEG}": 1}
    work("--status")
    done = [f"done             {name}" for name in (f"two/{DET}", f"one/{SEG}", f"two/{SEG}")]
    assert capsys.readouterr().out.splitlines() == [f"failed (exit code 3) one/{DET}", *done]
    work.happens()
    work("--jobs", 2)
    work("--jobs", 2, "accumulate=4")  # no setting of the result
    assert work.calls() == {f"one/{DET}": 1, f"one/{SEG}": 1, f"two/{DET}": 1, f"two/{SEG}": 1}


def test_rows_over_other_data_are_told_before_anything_is_begun(work, capsys):
    write_coco(work.folder / "own")
    work.happens(**{f"two__{DET}": 3})
    with pytest.raises(UserError, match=f"^failed: two/{DET}$"):
        work(coco="own")
    # the stand-ins leave no digest
    now = {
        s: {"annotations": hash_of_file(annotation_file(work.folder / "own", s))} for s in ("train", "val")
    }
    write_json(work.out / "one" / DET / "data.json", {"digest": now, "changes": []})
    with pytest.raises(UserError, match=f"^failed: two/{DET}$"):
        work(coco="own")
    edit(annotation_file(work.folder / "own", "val"), lambda content: content["annotations"].pop())
    work.happens()
    with pytest.raises(UserError, match=rf"^data: one/{DET} .*\(val: other annotations\); .*--data-changed$"):
        work(coco="own")
    assert f"two/{DET}" not in work.calls()
    work("--data-changed", "--dry-run", coco="own")
    assert "--data-changed" in capsys.readouterr().out
    work("--data-changed", coco="own")
    assert work.calls()[f"two/{DET}"] == 1 and "val: other annotations" in capsys.readouterr().err
    # nothing is left to begin
    work(coco="own")


def test_tables_are_written_of_what_is_done(work, capsys):
    work.happens(**{f"one__{DET}": 3, f"one__{SEG}": 3})
    with pytest.raises(UserError):
        work()
    for suffix in ("md", "csv", "tex", "html"):
        text = (work.out / f"c.{suffix}").read_text()
        assert "two" in text and "30.0" in text and "40.0" in text and "49.2" in text, (
            suffix
        )  # the last one is published
        assert "told" not in text  # a file of ours stands under the comparison's name for it
        (work.out / f"c.{suffix}").unlink()
    capsys.readouterr()
    work("--tables")
    assert work.calls() == {f"two/{DET}": 1, f"two/{SEG}": 1} and (work.out / "c.tex").is_file()
    left = [name for name in unnamed(work.out, "compare") if not name.endswith("calls")]  # of the stand-in
    assert not left
    assert capsys.readouterr().out.startswith("**Table 1a of the paper")
    for file in (work.folder / "w").iterdir():
        file.unlink()
    for words in (
        ["--only", "one", "--tables"],
        ["--only", "two"],
    ):  # all rows are in the tables, and what is done needs no weights
        (work.out / "c.md").unlink()
        work(*words)
        assert "two" in (work.out / "c.md").read_text()


def test_a_result_that_cannot_be_read_is_named_and_the_others_are_drawn(work, capsys):
    work()
    (work.out / "one" / DET / "result.json").write_text("[" * 100_000)
    (work.out / "c.md").unlink()
    stopped = subprocess.Popen([sys.executable, "-c", ""])
    stopped.wait()
    parts = [work.out / f".c.md.{stopped.pid}.partial", work.out / "one" / f".a.run.{stopped.pid}.partial"]
    for part in parts:
        part.write_text("x")
    capsys.readouterr()
    with pytest.raises(UserError, match=f"^failed: one/{DET}$"):
        work("--tables")
    said = capsys.readouterr().err
    assert f"failed: one/{DET}: {work.out / 'one' / DET / 'result.json'}: not JSON (nested more than" in said
    text = (work.out / "c.md").read_text()
    assert "30.0" in text and text.count("40.0") == 2  # detection of two, segmentation of both
    assert not any(part.exists() for part in parts)


def test_other_settings_never_replace_a_result(work, capsys):
    work()
    write_ours(work.folder / "w" / "two.safetensors", seed=7)
    with pytest.raises(UserError, match=f"^failed: one/{DET}, two/{DET}, two/{SEG}$"):
        work(detection_overrides={"lr": 1e-3})
    said = capsys.readouterr().err
    assert (
        f"{work.out / 'one' / DET}: it was begun with less, asked for is lr=0.001; move it away, or give another"
        in said
    )
    assert f"{work.out / 'two' / SEG}: it was begun with weights=" in said
    assert set(work.calls().values()) == {1}
    work("--status", detection_overrides={"lr": 1e-3})
    assert capsys.readouterr().out.splitlines()[0] == f"other settings   one/{DET}"
    work("detection=coco-50ep", "--only", "one")  # another protocol has a folder of its own
    assert (work.out / "one" / "det_coco-50ep_seed0" / "result.json").is_file()
    (work.out / "two" / DET).rename(work.folder / "away")
    work("--only", "two", "segmentation=none", detection_overrides={"lr": 1e-3})
    assert work.calls()[f"two/{DET}"] == 1


def test_missing_files_are_named_and_the_others_go_on(work, capsys):
    absent = {"method": "MAE", "file": "mae.pth", "origin": "whoever made it"}
    told = f"no weights       mae_vitt16: {work.folder / 'w' / 'mae.pth'} (whoever made it)"
    work("segmentation=none", rows=[absent])
    assert told in capsys.readouterr().out and work.calls() == {f"one/{DET}": 1, f"two/{DET}": 1}
    with pytest.raises(UserError, match="--strict: 1 of 3 files are missing"):
        work("--strict", rows=[absent])
    work("--status", rows=[absent])
    assert told in capsys.readouterr().out
    with pytest.raises(UserError, match="has no row 'three'; there are one, two"):
        work("--only", "three")
    with pytest.raises(UserError, match="unknown key 'rate'"):
        work("detection_overrides.rate=3")
    with pytest.raises(UserError, match="coco: there is no "):
        work(coco="nowhere", detection="coco-50ep")


def test_a_kill_is_passed_on_and_the_run_goes_on_later(work, capsys):
    work.happens(**{f"one__{DET}": "slow"})
    seen = []

    def kill():
        wait_for(work.out / "one" / DET / "begun")
        seen.append(compare.Stage("det", work.out / "one" / DET, ["x"]).state)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(Interrupted, match="start it again"):
        work("--jobs", 1)
    thread.join()
    assert seen == ["running"] and (work.out / "one" / DET / "saved").is_file() and work.calls() == {}
    capsys.readouterr()
    work("--status")
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"begun            one/{DET}",
        f"left             two/{DET}",
    ]
    work.happens(**{f"two__{DET}": 85})
    with pytest.raises(Interrupted, match=r"1 of 4 runs are left: start it again$"):
        work()
    work.happens()
    work()
    assert set(work.calls().values()) == {1} and len(work.calls()) == 4


def test_a_run_whose_comparison_was_killed_is_left_alone_while_it_lasts(work, capsys):
    work.happens(**{f"one__{DET}": "slow"})
    folder = work.out / "one" / DET
    folder.parent.mkdir(parents=True)
    line = work.command("detect", "--output", str(folder))
    begin = f"from pretrain.jobs.runner import Runner, Path; Runner().launch({line!r}, Path({str(folder)!r} + '.log'), 60)"
    comparison = subprocess.Popen([sys.executable, "-c", begin], cwd=ROOT)
    wait_for(work.out / "one" / DET / "begun")
    comparison.kill()
    comparison.wait()
    try:
        work("--status")
        assert f"running          one/{DET}" in capsys.readouterr().out.splitlines()
        with pytest.raises(Interrupted, match="1 of 4 runs are left"):
            work()
        assert f"one/{DET}" not in work.calls() and len(work.calls()) == 3
    finally:
        os.kill(int((work.out / "one" / DET / "begun").read_text()), signal.SIGKILL)


def test_what_a_stop_ends_has_not_failed(work, capsys):
    """Not even where it ends of the signal, before it could save."""
    work.happens(**{f"one__{DET}": "rude"})
    thread = threading.Thread(
        target=lambda: (wait_for(work.out / "one" / DET / "begun"), os.kill(os.getpid(), signal.SIGTERM))
    )
    thread.start()
    with pytest.raises(Interrupted, match="start it again"):
        work()
    thread.join()
    work("--status")
    assert f"begun            one/{DET}" in capsys.readouterr().out.splitlines()


def test_our_own_pretraining_says_whether_it_was_scaled_down(work):
    hashed = file_hash(work.folder / "w" / "one.safetensors")
    (work.tools / "detect.json").write_text(to_json(result("detection", weights_hash="of what it read")))
    scaled = Protocol(name="intertwined-100ep", version=1, full=False, deviations={"optim.epochs": [100, 3]})
    write_result(
        result("pretrain", protocol=scaled, metrics={"loss": 1.0}, weights_hash=hashed), work.folder / "w"
    )
    work("segmentation=none", "--only", "one")
    assert "optim.epochs 100 → 3" in (work.out / "c.md").read_text().replace("\\", "")
    work.out = work.folder / "elsewhere"
    converted = {"method": "one", "name": "converted", "file": "one.safetensors", "effective_epochs": 9}
    work("segmentation=none", "--only", "converted", rows=[converted])
    assert (work.out / "weights" / "converted.safetensors").is_file() and "epochs 100 → 3" in (
        work.out / "c.md"
    ).read_text()
    write_result(
        result("pretrain", protocol=scaled, metrics={"loss": 1.0}, weights_hash="another's"),
        work.folder / "w",
    )
    work("--tables", rows=[converted])
    assert "epochs 100 → 3" not in (work.out / "c.md").read_text()


def test_a_dry_run_shows_the_commands_and_writes_nothing(work, capsys):
    work("--dry-run", "--gpus-per-run", 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(
        "--nproc-per-node 2" in line and f"--output {work.out}" in line for line in lines
    )
    assert not work.out.exists()
    with pytest.raises(UserError, match="what stands behind it is for --submit"):
        work("--", "--hours", "3")


# --- SLURM ------------------------------------------------------------------------------------------------


def test_the_jobs_that_would_be_submitted(work, capfd, monkeypatch):
    pytest.importorskip("mmseg")
    monkeypatch.setattr(compare, "command", command)
    grid = {"lr_grid": [1e-4, 1e-5], "seeds": 3}
    words = [
        "--submit",
        "--dry-run",
        "--gpus-per-run",
        4,
        "--only",
        "one",
        "--",
        "--hours",
        3,
        "--partition",
        "fast",
    ]
    work(*words, segmentation="sweep", segmentation_overrides=grid, accumulate=8)
    said = capfd.readouterr().out
    detection, sweep = said.split("one/seg_sweep: ")
    assert (
        "#SBATCH --partition=fast" in detection
        and "#SBATCH --time=180" in detection
        and "--array" not in detection
    )
    assert "#SBATCH --gpus-per-node=4" in detection and "#SBATCH --ntasks-per-node=4" in detection
    assert "#SBATCH --job-name=one.det_coco-12ep_seed0" in detection and "--accumulate 2" in detection
    assert (
        "#SBATCH --array=0-11" in sweep and "#SBATCH --gpus-per-node=1" in sweep and "job 11" in sweep
    )  # 2 x 2 x 3
    assert "--sweep 0" in sweep and not work.out.exists()


def test_what_waits_in_the_queue_is_not_submitted_again(work, capfd, monkeypatch):
    programs, record = work.folder / "bin", work.folder / "sbatch"
    programs.mkdir()
    bodies = {
        "sbatch": f"echo x >> {record}; echo Submitted batch job 4242",
        "srun": "",
        "squeue": f"cat {work.folder / 'queue'}",
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(compare, "command", command)
    monkeypatch.chdir(work.folder)
    words = ["--only", "one", "segmentation=none", "device=auto"]
    (work.folder / "queue").write_text("4242 PENDING\n")
    for _ in range(2):
        work(*words, "--submit")
    assert record.read_text() == "x\n"
    work(*words, "--status")
    assert capfd.readouterr().out.splitlines()[-1] == f"in the queue (job 4242) one/{DET}"
    with pytest.raises(Interrupted, match="1 of 1 runs are left"):  # nor is it run here
        work(*words)
    (work.folder / "queue").write_text(
        ""
    )  # it ended: without a result it may be submitted again, with one it is done
    work(*words, "--submit")
    assert record.read_text() == "x\nx\n"
    write_result(result("detection"), work.out / "one" / DET)
    work(*words, "--submit")
    assert record.read_text() == "x\nx\n"


# --- for real ---------------------------------------------------------------------------------------------


def test_two_layouts_side_by_side(tmp_path, capsys):
    """A file of timm's layout and one of ours, through the shipped toy comparison; a third is cut off."""
    pytest.importorskip("mmseg")
    write_coco(tmp_path / "coco")
    write_ade(tmp_path / "ade")
    whole = write_timm(tmp_path / "w" / "dino.pth").read_bytes()
    (tmp_path / "w" / "cut.pth").write_bytes(whole[: len(whole) // 2])
    write_ours(tmp_path / "w" / "ours.safetensors")
    rows = [
        {"source": "timm", "effective_epochs": 1600},
        {"method": "MAE", "file": "cut.pth"},
        {"method": "intertwined", "file": "ours.safetensors", "segmentation": "none"},
    ]
    config = write_yaml(tmp_path, *rows, base=str(CONFIGS / "toy.yaml"))
    folders = [word for key in ("coco", "ade") for word in (f"--{key}", str(tmp_path / key))]
    words = [
        str(config),
        "segmentation_overrides.num_classes=4",
        "--output",
        str(tmp_path / "out"),
        "--jobs",
        "2",
        *folders,
    ]
    tool = load_tool("compare")
    for _ in range(2):
        with pytest.raises(UserError, match="^failed: mae_vitt16$"):
            tool.main([*words, "--weights", str(tmp_path / "w")])
    said = capsys.readouterr()
    assert said.out.count("exit code 0") == 3  # in both calls together
    assert said.err.count("failed: mae_vitt16: weights: ") == 2 and "cut.pth" in said.err
    detection, segmentation = (read_result(tmp_path / "out" / "dino_vitt16" / name) for name in (DET, SEG))
    ours = read_result(tmp_path / "out" / "intertwined_vitt16" / DET)
    for found, origin in (
        (detection, ("DINO", 1600)),
        (segmentation, ("DINO", 1600)),
        (ours, ("intertwined", 3.5)),
    ):
        assert (found.method, found.effective_epochs) == origin and found.backbone == TINY
    assert detection.protocol.name == "coco-12ep" and not detection.protocol.full
    text = (tmp_path / "out" / "c.md").read_text()
    assert (
        "**DINO †**" in text and "**intertwined †**" in text and f"{segmentation.metrics['miou']:.1f}" in text
    )
