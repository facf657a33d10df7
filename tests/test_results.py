"""The results room: result.json, provenance, published numbers, merging and tables."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pretrain.errors import UserError
from pretrain.results import folder
from pretrain.results.provenance import (
    config_hash,
    file_hash,
    git_commit,
    hardware,
    packages_in_use,
    peak_memory_mib,
    provenance,
)
from pretrain.results.schema import (
    Protocol,
    Result,
    finished,
    ordered_terms,
    planned,
    read_result,
    to_json,
    write_result,
)

ROOT = Path(__file__).resolve().parents[1]
PROTOCOLS = {"pretrain": "imagenet1k-100ep", "detection": "coco-12ep", "segmentation": "ade20k-160k"}
DEVIATIONS = {"iterations": [22128, 60], "batch_size": [64, 2]}


def protocol(name="coco-12ep", deviations=None, version=1):
    deviations = deviations or {}
    return Protocol(name=name, version=version, full=not deviations, deviations=deviations)


def result(kind="detection", metrics=None, deviations=None, **changes):
    fields = {
        "kind": kind,
        "method": "intertwined",
        "backbone": "vit_small_patch16",
        "effective_epochs": 346.9,
        "protocol": protocol(PROTOCOLS.get(kind, "attention"), deviations),
        "metrics": metrics or {},
        "seed": 0,
        "config_hash": "0123456789ab",
        "weights_hash": "ba9876543210",
        "git_commit": None,
        "packages": {"torch": "2.15.0"},
        "hardware": {"cpu": "a", "cores": 2, "gpus": []},
        "wall_time_s": 12.5,
        "peak_memory_mib": 100.0,
        "created": "2026-01-31T12:00:00+00:00",
    }
    return Result(**(fields | changes))


# --- schema -----------------------------------------------------------------------------------------------


def test_a_written_result_reads_back_equal(tmp_path):
    written = result(metrics={"box_ap": 44.8, "per_class": {"cat": 1.5}}, deviations=DEVIATIONS)
    path = write_result(written, tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "result.json"
    assert read_result(path) == written == read_result(path.parent)
    left = sorted(p.name for p in path.parent.iterdir())
    assert left == [folder.README, "result.json"]  # no partial file stays


def test_the_file_is_sorted_readable_json_and_the_same_every_time(tmp_path):
    metrics = {"mask_ap": 39.8, "box_ap": 44.8}
    path = write_result(result(metrics=metrics), tmp_path)
    first = path.read_bytes()
    assert write_result(result(metrics=dict(reversed(metrics.items()))), tmp_path).read_bytes() == first
    content = json.loads(first)
    assert list(content) == sorted(content) and list(content["metrics"]) == ["box_ap", "mask_ap"]
    assert first.count(b"\n") > len(content) and first.endswith(b"}\n")


def test_numpy_numbers_and_tuples_become_plain_json(tmp_path):
    written = result(
        metrics={"box_ap": np.float32(44.5), "n": np.int64(3)}, deviations={"lr_steps": [(1, 2), (3, 4)]}
    )
    assert type(written.metrics["box_ap"]) is float and type(written.metrics["n"]) is int
    assert read_result(write_result(written, tmp_path)) == written
    assert written.protocol.deviations == {"lr_steps": [[1, 2], [3, 4]]}


def test_created_is_now_in_utc_when_left_out():
    fields = {name: getattr(result(), name) for name in Result.model_fields if name != "created"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", Result(**fields).created)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kind": "training"}, "kind='training' should be 'pretrain', 'detection'"),
        ({"metrics": {"box_ap": math.nan}}, "metrics.box_ap is nan"),
        ({"metrics": {"per_class": {"cat": math.inf}}}, "metrics.per_class.cat is inf"),
        ({"metrics": {"box_ap": "44.8"}}, "metrics.box_ap should be a number"),
        ({"metrics": {"box_ap": True}}, "metrics.box_ap should be a number"),
        ({"metrics": {"box_ap": 448.0}}, "metrics.box_ap is 448.0"),
        ({"metrics": {"miou": -1.0}}, "metrics.miou is -1.0"),
        ({"metrics": {"box_ap": {"all": 1.0}}}, "metrics.box_ap should be a number"),
        ({"metrics": {1: 2.0}}, "key 1"),
        ({"hardware": {"gpus": {"a"}}}, "hardware.gpus is set"),
        ({"wall_time_s": math.nan}, "wall_time_s is nan"),
        ({"wall_time_s": -1.0}, "wall_time_s=-1.0 should be greater than or equal to 0"),
        ({"seed": 0.5}, "seed=0.5 should be a valid integer"),
        ({"seed": True}, "seed=True should be a valid integer"),
        ({"method": None}, "method=None should be a valid string"),
        ({"effective_epochs": "350"}, "effective_epochs='350' should be a valid number"),
        ({"protocol": {"name": "coco-12ep"}}, "protocol: version is missing"),
        ({"created": "yesterday"}, "'yesterday'"),
        ({"created": "2026-01-31T12:00:00"}, "'2026-01-31T12:00:00'"),
        ({"created": "2026-01-31T12:00:00+01:00"}, "+01:00"),
        ({"schema_version": 2}, "schema_version=2 should be 1"),
        ({"loss_terms": "image"}, "loss_terms='image' should be"),
        ({"sed": 1}, "unknown key 'sed'"),
    ],
)
def test_a_bad_value_is_refused_by_name(changes, words):
    with pytest.raises(UserError) as error:
        result(**changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda c: c.pop("seed"), "seed is missing"),
        (lambda c: c.update(sed=1), "unknown key 'sed'"),
        (lambda c: c["protocol"].pop("full"), "protocol: full is missing"),
        (lambda c: c["protocol"].update(complete=True), "protocol: unknown key 'complete'"),
        (lambda c: c.update(protocol="coco-12ep"), "protocol='coco-12ep' should be"),
        (lambda c: c.update(seed="0"), "seed='0' should be a valid integer"),
        (lambda c: c["protocol"].update(version="1"), "protocol: version='1' should be a valid integer"),
        (lambda c: c["protocol"].update(deviations=DEVIATIONS), "protocol: full is True"),
    ],
)
def test_a_malformed_file_is_refused_with_its_name_and_key(tmp_path, spoil, words):
    path = write_result(result(), tmp_path)
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_result(path)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": NaN'])
def test_a_file_that_is_no_json_object_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "result.json"))):
        read_result(tmp_path)


def test_an_absent_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(UserError, match=r"result\.json"):
        read_result(tmp_path)


OF_2C21771 = """{
  "backbone": "vit_tiny_patch16",
  "config_hash": "0123456789ab",
  "created": "2026-01-31T12:00:00+00:00",
  "effective_epochs": 350,
  "git_commit": null,
  "hardware": {
    "cores": 2
  },
  "kind": "pretrain",
  "method": "paka",
  "metrics": {
    "broken_images": 0,
    "cka": 0.3,
    "loss": 0.3,
    "overlaps": 0.6
  },
  "packages": {
    "torch": "2.10"
  },
  "peak_memory_mib": null,
  "protocol": {
    "deviations": {
      "crops.global_scale": [
        [
          0.25,
          1.0
        ],
        [
          0.5,
          1
        ]
      ]
    },
    "full": false,
    "name": "paka-25ep",
    "version": 1
  },
  "schema_version": 1,
  "seed": 0,
  "wall_time_s": 12.5,
  "weights_hash": null
}
"""


def test_a_file_of_before_the_runs_named_their_losses(tmp_path):
    """Written by commit 2c21771: it reads, is written again to the byte, and is a post-training by its
    metrics."""
    (tmp_path / "result.json").write_text(OF_2C21771, encoding="utf-8")
    old = read_result(tmp_path)
    assert to_json(old) == OF_2C21771 and (old.loss_terms, old.post_training) == ((), False)
    assert old.stage == "posttrain"
    assert ordered_terms([old], ["overlaps", "a", "cka", "loss"]) == ["loss", "cka", "overlaps"]
    assert old.with_changes(metrics={"loss": 1.0, "image": 1.0}).stage == "pretrain"
    assert old.with_changes(loss_terms=("cka",)).stage == "pretrain"  # a run that names its losses says it


def test_a_run_names_its_losses(tmp_path):
    run = result("pretrain", {"loss": 3.0, "b": 1.0, "a": 2.0}, loss_terms=("b", "a"), post_training=True)
    assert read_result(write_result(run, tmp_path)) == run and run.stage == "posttrain"
    assert json.loads(to_json(run))["loss_terms"] == ["b", "a"]
    assert ordered_terms([run], run.metrics) == ["loss", "b", "a"]
    assert result(post_training=True).stage == "detection"  # no other kind has two stages


@pytest.mark.parametrize("model", [Protocol, Result])
def test_every_field_has_a_source(model):
    assert [name for name, field in model.model_fields.items() if not field.json_schema_extra["source"]] == []
    assert all(field.description.endswith("]") for field in model.model_fields.values())


def test_nothing_is_written_when_a_number_became_nan(tmp_path):
    run = result(metrics={"box_ap": 44.8})
    run.metrics["box_ap"] = math.nan
    with pytest.raises(ValueError):
        write_result(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_records_are_frozen_and_hold_copies():
    deviations = {"iterations": [1, 2]}
    scaled = protocol(deviations=deviations)
    deviations.clear()
    assert scaled.label == "coco-12ep, scaled down (1 change)"
    with pytest.raises(ValidationError, match="frozen"):
        scaled.full = True


# --- a scaled-down run never has the bare name ------------------------------------------------------------


@pytest.mark.parametrize("full, deviations", [(True, DEVIATIONS), (False, {})])
def test_full_means_no_deviations(full, deviations):
    with pytest.raises(UserError, match="protocol: full"):
        Protocol(name="coco-12ep", version=1, full=full, deviations=deviations)


@pytest.mark.parametrize("pair", [[1, 1], [1], [1, 2, 3], "ab", 3, [(1, 2), [1, 2]]])
def test_a_deviation_is_two_different_values(pair):
    with pytest.raises(UserError, match="protocol: deviations.iterations"):
        protocol(deviations={"iterations": pair})


def test_labels():
    assert protocol().label == str(protocol()) == "coco-12ep"
    assert protocol(version=2).label == "coco-12ep v2"
    nine = {f"field{i}": [0, i + 1] for i in range(9)}
    changed = protocol()
    changed.deviations["iterations"] = [2, 1]
    assert changed.label == "coco-12ep, scaled down (1 change)"
    assert str(protocol(deviations=nine)) == "coco-12ep, scaled down (9 changes)"
    assert protocol(deviations=DEVIATIONS).changes == "batch_size 64 → 2; iterations 22128 → 60"


def test_to_json_is_the_identity_of_a_run():
    assert to_json(result(seed=1)) == to_json(result(seed=1)) != to_json(result(seed=2))


# --- provenance -------------------------------------------------------------------------------------------


def test_config_hash():
    config = {
        "optim": {"lr": 1e-3, "steps": (1, 2)},
        "seed": 0,
        "weights": "a",
        "run": {"output": "x", "seed": 1},
    }
    same = {"run": {"seed": 7}, "seed": 5, "optim": {"steps": [1, 2], "lr": 0.001}}
    assert config_hash(config) == config_hash(same)
    assert re.fullmatch("[0-9a-f]{12}", config_hash(config))
    assert config_hash(config) != config_hash({"optim": {"lr": 2e-3, "steps": [1, 2]}, "run": {}})
    assert config_hash({"seed": 0}, without=()) != config_hash({"seed": 1}, without=())
    # printf '{"a":1,"b":[true,null]}' | sha256sum
    assert config_hash({"b": [True, None], "a": 1}) == "1cc69c7fa236"
    for wrong in ({"a": math.nan}, {"a": {1}}, {"a": object()}):
        with pytest.raises(UserError, match="cannot be hashed"):
            config_hash(wrong)


def test_file_hash(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_hash(tmp_path / "f") == "ba7816bf8f01"  # the standard's own example
    with pytest.raises(UserError, match="absent"):
        file_hash(tmp_path / "absent")


def git(folder, *arguments):
    names = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *names, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def test_git_commit(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert git_commit(tmp_path) is None and git_commit(tmp_path / "absent") is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None
    (tmp_path / "f").write_text("1")
    git(tmp_path, "add", "f")
    assert git_commit(tmp_path) is None  # no commit yet
    git(tmp_path, "commit", "-q", "--no-verify", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "untracked").mkdir()
    (tmp_path / "untracked" / "g").write_text("1")
    assert git_commit(tmp_path) == commit
    assert git_commit(tmp_path / "untracked") is None  # as an installed package in someone's repository
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "untracked"))  # as inside a hook
    (tmp_path / "f").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+dirty"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert git_commit(tmp_path) is None  # no git


def test_packages_and_hardware_are_named_but_not_the_host():
    pytest.importorskip("scipy")  # matches clusters to classes
    packages, machine = packages_in_use(), hardware()
    assert "scipy" in packages
    assert packages["python"].count(".") == 2 and packages["numpy"] == np.__version__
    assert set(machine) == {"cpu", "cores", "memory_gib", "gpus", "processes"}
    assert machine["cores"] >= 1 and machine["memory_gib"] > 0 and machine["cpu"]
    assert peak_memory_mib() > 1
    assert not any("/" in text for text in [*packages.values(), *machine["gpus"]])


def test_provenance_completes_a_result(tmp_path):
    (tmp_path / "w").write_bytes(b"abc")
    found = provenance({"lr": 1.0}, tmp_path / "w")
    given = {"method", "backbone", "effective_epochs", "protocol", "metrics", "seed", "kind", "wall_time_s"}
    run = Result(**{name: getattr(result(), name) for name in given}, **found)
    assert run.weights_hash == "ba7816bf8f01" and run.config_hash == config_hash({"lr": 1.0})
    assert read_result(write_result(run, tmp_path)) == run
    assert provenance({})["weights_hash"] is None


def test_the_room_is_a_leaf_and_light():
    code = (
        "import sys, pretrain.results, pretrain.results.report, pretrain.results.runs\n"
        "names = {m for m in sys.modules if m.startswith(('pretrain', 'torch', 'matplotlib'))}\n"
        "print(sorted(m for m in names if not m.startswith('pretrain.results')))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['pretrain', 'pretrain.errors', 'pretrain.files', 'pretrain.settings']"


FIELDS = {
    "kind": "detection",
    "method": "ours",
    "backbone": "vit_tiny_patch16",
    "effective_epochs": 3.0,
    "protocol": Protocol(name="p", version=1, full=True, deviations={}),
    "metrics": {"box_ap": 1.0},
    "seed": 0,
    "config_hash": "0" * 12,
    "weights_hash": None,
    "git_commit": None,
    "packages": {},
    "hardware": {},
    "wall_time_s": 1.0,
    "peak_memory_mib": None,
}


@pytest.mark.parametrize(
    "fault, told",
    [
        ({"effective_epochs": math.inf}, "effective_epochs is inf"),
        ({"method": "o\ud800"}, r"method='o\ud800' is no UTF-8 text"),
        ({"metrics": {"box_ap": 1.0, "of": {"a\udcff": 2.0}}}, r"metrics.of.a\udcff="),
        ({"metrics": {"box_ap": 1.0, "of": {"a": math.nan}}}, "metrics.of.a is nan"),
    ],
)
def test_what_could_not_be_written_is_refused_at_the_start_and_left_out_at_the_end(
    fault, told, tmp_path, capsys
):
    planned(tmp_path, **FIELDS)
    with pytest.raises(UserError) as error:
        planned(tmp_path, **{**FIELDS, **fault})
    assert str(error.value).startswith("result.json: ") and told in str(error.value)
    write_result(finished(**{**FIELDS, **fault}), tmp_path)
    assert read_result(tmp_path).metrics["box_ap"] == 1.0
    assert told in capsys.readouterr().err


def test_a_result_at_the_end_has_no_negative_time_and_no_percentage_beyond_100(tmp_path, capsys):
    faults = {"wall_time_s": -5.0, "metrics": {"box_ap": 101.0, "mask_ap": 7.0}}
    write_result(finished(**{**FIELDS, **faults}), tmp_path)
    found = read_result(tmp_path)
    assert (found.wall_time_s, found.metrics) == (0.0, {"mask_ap": 7.0})
    assert "metrics.box_ap=101.0 is no percentage" in capsys.readouterr().err


def test_the_page_of_a_runs_files_is_the_table():
    assert (ROOT / "docs" / "run-folder.md").read_text() == folder.page()


def test_a_folder_says_what_its_files_are_and_what_no_kind_of_run_leaves_is_told(tmp_path):
    write_result(finished(**FIELDS), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert (tmp_path / folder.README).read_text() == folder.readme(FIELDS["kind"])
    assert folder.unnamed(tmp_path, FIELDS["kind"]) == ["notes.txt"]
