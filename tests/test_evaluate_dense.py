"""tools/evaluate_dense.py as users run it: the evaluators' numbers, deviations by name, nothing done
twice, bad input by name."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_fixture import write_start
from label_set_fixture import write_folder, write_voc
from photos import write_photos
from PIL import Image
from reference_vit import DinoViT, filled, saved
from tool_fixture import ended, load_tool

from pretrain.build import build_backbone
from pretrain.cli import REQUEUE_CODE
from pretrain.data.class_folders import open_class_folders
from pretrain.data.datasets import open_label_set
from pretrain.errors import Interrupted, UserError
from pretrain.evaluation import dense
from pretrain.evaluation.dense import (
    KNN,
    N_IMAGES,
    TASKS,
    deviations_of_data,
    protocol_of,
    settings_of,
)
from pretrain.evaluation.features import Features, frozen
from pretrain.evaluation.knn import knn_classification
from pretrain.results.dense import dense_table
from pretrain.results.folder import unnamed
from pretrain.results.provenance import file_hash
from pretrain.results.runs import read_run
from pretrain.results.schema import Protocol, Result, read_result, write_result
from pretrain.settings import replaced
from pretrain.signals import StopSignals
from pretrain.weights import read_checkpoint, save_backbone

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[1]
LINEAR = ["linear.image_px=32", "linear.label_px=16", "linear.epochs=2", "linear.batch_size=2"]
IN_CONTEXT = ["in_context.image_px=32", "in_context.memory_size=12", "in_context.passes=1", "in_context.k=3"]
CLUSTERING = [
    "clustering.image_px=32",
    "clustering.label_px=16",
    "clustering.overclusters=6",
    "clustering.restarts=1",
]
OF_SET = [*LINEAR, *IN_CONTEXT, *CLUSTERING]
KNN_WORDS = ["--knn-root", "/nowhere"]
OF_KNN = ["knn.resize_px=40", "knn.crop_px=32", "knn.k=1,3"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Weights of ours and of DINO's layout, a folder of masks, Pascal VOC without SBD, and a folder of
    classes."""
    home = tmp_path_factory.mktemp("dense")
    write_start(home / "ours.safetensors", depth=1)
    saved(home, filled(DinoViT(depth=1, side=2), seed=3).state_dict(), "dino.pth")
    write_folder(home / "toy", 4, 2)
    write_voc(home / "voc", 3, 2, augmented=False)
    for part in ("train", "val"):
        for seed, name in enumerate(("bird", "cat")):
            write_photos(home / "classes" / part / name, n=3, size=(60, 44), seed=2 * seed + (part == "val"))
    return home


def words(home, output, *extra, weights="ours.safetensors", data="toy"):
    where = ["--data", home / data] if data else []
    return list(
        map(str, ["--weights", home / weights, *where, "--output", output, "--device", "cpu", *extra])
    )


def evaluate(*given, figures=False, **named):
    tool = load_tool("evaluate dense")
    if not figures:
        tool.draw = lambda *nothing: None
    tool.main(words(*given, **named))


def features_of(weights, **model_kwargs):
    backbone = build_backbone("vit_tiny_patch16", weights, **model_kwargs).eval()
    return Features(backbone, CPU, nullcontext())


def test_all_tasks_give_the_evaluators_own_numbers_and_one_result_a_set(home, tmp_path, capsys):
    knn = ["--knn-root", home / "classes", *OF_KNN]
    evaluate(home, tmp_path / "out", *OF_SET, *knn, "--seed", 3, "--before", home / "dino.pth", figures=True)
    weights, said = home / "ours.safetensors", capsys.readouterr().out
    features, settings = features_of(weights), settings_of(list(TASKS), [*OF_SET, *OF_KNN], seed=3)
    parts = [open_label_set(home / "toy", part) for part in ("train", "val")]
    expected = {}
    with frozen(features.backbone):
        for task in dense.DENSE_TASKS:
            expected |= dense.EVALUATORS[task](features, *parts, settings[task], 0).metrics
        of_classes = knn_classification(
            features, *open_class_folders(home / "classes"), settings[KNN]
        ).metrics

    run = read_run(tmp_path / "out" / "result.json")
    result, other = run.result, read_result(tmp_path / "out" / "knn")
    assert result.metrics == expected | {"images": 2} and other.metrics == of_classes | {"images": 6}
    assert other.labels == "2 classes of classes"
    assert {
        "linear_miou",
        "in_context_miou",
        "in_context_hungarian_miou",
        "clustering_miou",
        "clustering_k6_miou",
    } <= set(expected)
    assert set(of_classes) == {"knn_top1_k1", "knn_top1_k3", "largest_class"}
    assert (result.kind, result.method, result.effective_epochs, result.seed) == ("dense", "earlier", 12.5, 3)
    assert (result.backbone, result.weights_hash) == ("vit_tiny_patch16", file_hash(weights))
    assert (result.protocol.name, other.protocol.name) == ("dense-toy", "dense-knn")
    assert set(result.protocol.deviations) == {word.partition("=")[0] for word in OF_SET}
    assert result.protocol.deviations["clustering.overclusters"] == [[500], [6]]
    assert (
        "published" not in (tmp_path / "out" / "tasks" / "linear.json").read_text()
    )  # as a folder of one's own never was
    assert set(other.protocol.deviations) == {
        "train_images",
        "val_images",
        "knn.resize_px",
        "knn.crop_px",
        "knn.k",
    }
    assert other.protocol.deviations["train_images"] == [1_281_167, 6]
    assert 0 < result.wall_time_s < 120 and result.peak_memory_mib > 10
    assert [figure.title for figure in run.figures] == [
        "Segmentation and clusters",
        "Principal components of the patches",
    ]
    assert "those of DINO" in run.figures[1].caption  # two rows, the one before first
    assert (
        f"linear_miou {expected['linear_miou']:.2f}" in said
        and "linear, train, pass 1: 4 of 4 images" in said
    )


def test_a_file_of_dinos_on_voc_says_all_deviations(home, tmp_path):
    some = ["--patch-size", 8, "--bf16", "--max-images", 2, "--tasks", "in_context", *IN_CONTEXT]
    evaluate(
        home, tmp_path / "out", *some, weights="dino.pth", data="voc"
    )  # --tasks takes the words after it, too
    result = read_result(tmp_path / "out")
    mious = {"in_context_miou", "in_context_hungarian_miou", "in_context_class_iou"}
    assert set(result.metrics) == mious | {"val_classes", "images"}
    assert (result.method, result.backbone, result.effective_epochs) == ("DINO", "vit_tiny_patch16", None)
    changed = result.protocol.deviations
    assert result.protocol.name == "dense-voc2012" and set(changed) == {
        *("patch_size", "precision", "max_images", "train_images", "val_images", "train_set"),
        *(word.partition("=")[0] for word in IN_CONTEXT),
    }
    assert (
        changed["patch_size"] == [16, 8]
        and changed["precision"] == ["float32", "bf16"]
        and changed["max_images"] == ["all", 2]
    )
    assert changed["train_images"] == [10_582, 3] and changed["val_images"] == [1_449, 2]
    assert changed["train_set"][0] == "as published" and "trainaug" in changed["train_set"][1]


def test_k_nn_alone_is_one_result(home, tmp_path):
    evaluate(home, tmp_path, "--knn-root", home / "classes", *OF_KNN, data=None)
    assert read_result(tmp_path).protocol.name == "dense-knn" and not (tmp_path / "knn").exists()
    assert not (tmp_path / "figures").exists()


def test_runs_that_differ_in_their_seed_alone_are_one_configuration(home, tmp_path):
    for output, *extra in (
        ["a"],
        ["b", "--seed", 1],
        ["c", "linear.lr=0.02"],
        ["d", "--max-images", 3],
        ["e", "--seed", 0],
    ):
        evaluate(home, tmp_path / output, "--tasks", "linear", *LINEAR, *extra)
    a, b, c, d, e = (read_result(tmp_path / name) for name in "abcde")
    assert a.config_hash == b.config_hash and a.protocol == b.protocol and (a.seed, b.seed) == (0, 1)
    assert a.metrics != b.metrics and a.metrics == e.metrics  # drawn from the seed, and from nothing else
    assert len({a.config_hash, c.config_hash, d.config_hash}) == 3 and d.protocol.deviations[
        "max_images"
    ] == ["all", 3]


def test_each_training_is_evaluated_with_its_own_seed_and_three_make_one_row(home, tmp_path):
    """Three post-trainings that differ in their seed, as the tool is called without a thought of seeds."""
    start = read_checkpoint(home / "ours.safetensors")
    for said in (0, 1, 2, True, -1, "x"):
        told = {"method": "paka", "seed": said, "config_hash": "c"}
        save_backbone(
            tmp_path / "w.safetensors",
            start.state,
            name="vit_tiny_patch16",
            model_kwargs=start.model_kwargs,
            provenance=told,
        )
        evaluate(
            tmp_path,
            tmp_path / "out" / f"of_{said}",
            "--tasks",
            "linear",
            *LINEAR,
            weights="w.safetensors",
            data=home / "toy",
        )
    found = {path.parent.name: read_result(path) for path in sorted(tmp_path.glob("out/*/result.json"))}
    assert {name: run.seed for name, run in found.items()} == {
        **{f"of_{seed}": seed for seed in (0, 1, 2)},
        **{f"of_{said}": 0 for said in (True, -1, "x")},
    }
    (row,) = dense_table([found[f"of_{seed}"] for seed in (0, 1, 2)]).records
    values = [found[f"of_{seed}"].metrics["linear_miou"] for seed in (0, 1, 2)]
    assert (row["seeds"], row["linear_miou_n"]) == ("0, 1, 2", "3") and len(
        {run.weights_hash for run in found.values()}
    ) == 6
    assert float(row["linear_miou"]) == pytest.approx(np.mean(values)) and len(set(values)) == 3
    told = {"method": "paka", "seed": 3, "config_hash": "of another recipe"}
    save_backbone(
        tmp_path / "w.safetensors",
        start.state,
        name="vit_tiny_patch16",
        model_kwargs=start.model_kwargs,
        provenance=told,
    )
    evaluate(
        tmp_path,
        tmp_path / "out" / "other",
        "--tasks",
        "linear",
        *LINEAR,
        weights="w.safetensors",
        data=home / "toy",
    )
    rows = dense_table(
        [*(found[f"of_{seed}"] for seed in (0, 1, 2)), read_result(tmp_path / "out" / "other")]
    ).records
    assert sorted(row["seeds"] for row in rows) == [
        "0, 1, 2",
        "3",
    ]  # of one name, but no seed of that training
    evaluate(
        tmp_path,
        tmp_path / "seven",
        "--seed",
        7,
        "--tasks",
        "linear",
        *LINEAR,
        weights="w.safetensors",
        data=home / "toy",
    )
    assert read_result(tmp_path / "seven").seed == 7


# --- going on ---------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on_with_the_task_that_it_was_at(home, tmp_path, monkeypatch, capsys):
    evaluate(home, tmp_path / "whole", *OF_SET)
    real, asked = dense.EVALUATORS["in_context"], []

    def killed(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setitem(dense.EVALUATORS, "in_context", killed)
        assert ended("evaluate dense", *words(home, tmp_path / "parts", *OF_SET)) == REQUEUE_CODE
    assert (
        "SIGTERM at in_context, train; finished tasks are kept, --resume goes on with it"
        in capsys.readouterr().err
    )
    folder = tmp_path / "parts"
    assert [file.name for file in folder.glob("tasks/*.json")] == ["linear.json"] and not (
        folder / "result.json"
    ).exists()
    with pytest.raises(UserError, match="already holds an evaluation; go on with --resume"):
        evaluate(home, folder, *OF_SET)
    for task, evaluator in dense.EVALUATORS.items():
        counted = lambda *given, task=task, evaluator=evaluator: asked.append(task) or evaluator(*given)  # noqa: E731
        monkeypatch.setitem(dense.EVALUATORS, task, counted)
    evaluate(home, folder, *OF_SET, "--resume")
    evaluate(home, folder, *OF_SET, "--resume")
    assert asked == ["in_context", "clustering"]
    whole, parts = read_result(tmp_path / "whole"), read_result(folder)
    assert (parts.metrics, parts.config_hash, parts.protocol) == (
        whole.metrics,
        whole.config_hash,
        whole.protocol,
    )
    for task in set(TASKS) - {KNN}:  # their maps, for the figures
        maps = [np.load(tmp_path / name / "tasks" / f"{task}.npz") for name in ("whole", "parts")]
        assert maps[0].files and all(np.array_equal(maps[0][name], maps[1][name]) for name in maps[0].files)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["linear.epochs=3"], r"linear\.epochs \(2, now 3\)"),
        (["--seed", 1], r"seed \(0, now 1\)"),
        (["--bf16"], r'precision \("float32", now "bf16"\)'),
        (["--max-images", 1], r"data\.train\.images \(4, now 1\)"),
    ],
)
def test_another_evaluation_is_not_gone_on_with(home, finished, extra, named):
    with pytest.raises(
        UserError, match=rf"linear\.json is of another evaluation: .*{named}.*choose another folder"
    ):
        evaluate(
            home,
            finished,
            "--tasks",
            "linear",
            *[w for w in LINEAR if w.split("=")[0] not in str(extra)],
            *extra,
            "--resume",
        )


def test_other_weights_or_another_set_are_not_gone_on_with(home, finished):
    with pytest.raises(UserError, match=r"weights_hash \("):
        evaluate(home, finished, "--tasks", "linear", *LINEAR, "--resume", weights="dino.pth")
    with pytest.raises(UserError, match="holds a run of another kind, dense-toy"):
        evaluate(home, finished, "--tasks", "linear", *LINEAR, "--resume", data="voc")
    with pytest.raises(
        UserError, match=r"linear\.json is of another evaluation: weights_hash"
    ):  # nor with another task
        evaluate(home, finished, "--tasks", "in_context", *IN_CONTEXT, "--resume", weights="dino.pth")


def test_a_finished_task_over_other_masks_is_not_gone_on_with(home, finished):
    mask = sorted((home / "toy").rglob("*.png"))[0]
    before = mask.read_bytes()
    try:
        Image.fromarray(np.asarray(Image.open(mask))).save(mask, compress_level=0)
        with pytest.raises(UserError, match=r"linear\.json is of another evaluation: digest\.0\.sizes"):
            evaluate(home, finished, "--tasks", "linear", *LINEAR, "--resume")
        # a task of an earlier version holds no digest
        task = finished / "tasks" / "linear.json"
        content = json.loads(task.read_text())
        del content["of"]["digest"]
        task.write_text(json.dumps(content))
        evaluate(home, finished, "--tasks", "linear", *LINEAR, "--resume")
    finally:
        mask.write_bytes(before)


def test_a_task_more_needs_the_settings_of_its_own_alone(home, finished, capsys):
    linear = read_result(finished).metrics
    evaluate(home, finished, "--tasks", "in_context", *IN_CONTEXT, "--resume")
    assert "linear: evaluated before, not asked for now" in capsys.readouterr().out
    assert "linear_miou" not in read_result(finished).metrics  # a result holds what its command asks for
    evaluate(home, finished, "--tasks", "in_context", "linear", *LINEAR, *IN_CONTEXT, "--resume")
    both = read_result(finished).metrics
    assert linear.items() <= both.items() and "in_context_miou" in both


def test_a_damaged_task_is_named(home, finished):
    file = finished / "tasks" / "linear.json"
    for spoil in (
        lambda: file.write_text("{"),
        lambda: file.write_text("{}"),
        file.with_suffix(".npz").unlink,
    ):
        before = file.read_text()
        spoil()
        with pytest.raises(UserError, match=r"linear\.json: no finished task can be read"):
            evaluate(home, finished, "--tasks", "linear", *LINEAR, "--resume")
        file.write_text(before)


@pytest.fixture
def finished(home, tmp_path):
    evaluate(home, tmp_path / "finished", "--tasks", "linear", *LINEAR)
    assert not unnamed(tmp_path / "finished", "dense")
    return tmp_path / "finished"


def test_the_folder_of_another_run_is_not_written_into(home, tmp_path):
    protocol = Protocol(name="intertwined-100ep", version=1, full=True, deviations={})
    rest = dict(
        seed=0, config_hash="0", weights_hash=None, git_commit=None, packages={}, hardware={}, wall_time_s=1
    )
    told = dict(
        method="mine", backbone="vit_tiny_patch16", effective_epochs=1, metrics={}, peak_memory_mib=None
    )
    write_result(Result(kind="pretrain", protocol=protocol, **told, **rest), tmp_path)
    for resume in ([], ["--resume"]):
        with pytest.raises(
            UserError, match="holds a run of another kind, intertwined-100ep; choose another folder"
        ):
            evaluate(home, tmp_path, *resume)


def test_a_watched_set_is_the_set_until_a_signal(home, capsys):
    part = open_label_set(home / "toy", "train")
    with StopSignals() as signals:
        seen = dense.watched(part, "linear", signals)
        list(seen.first(2).squares(32, 16, 2))
        assert (
            "linear, train, pass 1: 2 of 2 images" in capsys.readouterr().out
        )  # a task that takes some of them counts those
        for ours, theirs in zip(
            seen.first(3).squares(32, 16, 2), part.first(3).squares(32, 16, 2), strict=True
        ):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        signals.received = "SIGTERM"
        with pytest.raises(Interrupted, match="SIGTERM at linear, train"):
            seen.read(0)


# --- the protocol -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", N_IMAGES)
def test_the_public_protocol_has_no_deviation(name):
    tasks = [KNN] if name == KNN else list(dense.DENSE_TASKS)
    protocol = protocol_of(name, settings_of(tasks, seed=5), deviations_of_data(name, N_IMAGES[name], 0))
    assert protocol.full and protocol.name == f"dense-{name}"
    fewer = deviations_of_data(
        name, (N_IMAGES[name][0] - 1, N_IMAGES[name][1]), 10**9
    )  # more than there are is no restriction
    assert set(protocol_of(name, {}, fewer).deviations) == {"train_images"}


@pytest.mark.parametrize("task", TASKS)
def test_every_setting_of_a_task_can_be_changed_and_is_told(task):
    (default,) = settings_of([task]).values()
    for name, value in vars(default).items():
        other = (
            not value
            if isinstance(value, bool)
            else (1,)
            if isinstance(value, tuple) and len(value) != 2
            else value
        )
        other = (value[0] / 2, value[1]) if isinstance(value, tuple) and len(value) == 2 else other
        other = (
            value / 2
            if isinstance(value, float)
            else value + 16
            if other is value and isinstance(value, int)
            else other
        )
        used = replaced(default, {name: other})
        told = protocol_of("toy", {task: used}, {}).deviations
        silent = name in ("seed", "map_px")
        assert told == ({} if silent else {f"{task}.{name}": json.loads(json.dumps([value, other]))})
        if name != "seed":
            text = str(other).lower() if isinstance(other, bool) else str(other)
            assert settings_of([task], [f"{task}.{name}={text}"]) == {task: used}


def test_a_folder_that_nothing_can_be_written_into_is_told_before_the_first_task(home, monkeypatch):
    for task in dense.EVALUATORS:
        monkeypatch.setitem(dense.EVALUATORS, task, lambda *given: pytest.fail("evaluated"))
    with pytest.raises(OSError, match="/proc"):
        evaluate(home, Path("/proc"), *OF_SET)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--tasks", "linear", "knn"], "--tasks: 'knn' is none of linear, in_context, clustering"),
        (["--tasks", "linear.epochs=2"], "--tasks names no task"),
        (["linear.epoch=2"], "unknown key 'linear.epoch' (command line); did you mean linear.epochs?"),
        (["linear.epochs=two"], "linear.epochs='two' (command line) should be a whole number"),
        (["linear.epochs=0"], "linear.epochs=0"),
        (["clustering.seeds=0"], "clustering.seeds=0"),
        (["linear.lr=nan"], "linear.lr=nan should be a finite number"),
        ([*KNN_WORDS, "knn.crop_px=48", "knn.resize_px=40"], "knn.crop_px=48 is more than knn.resize_px=40"),
        ([*KNN_WORDS, "knn.k="], "knn.k=[]"),
        ([*KNN_WORDS, "knn.k=0,5"], "knn.k[0]=0"),
        ([*KNN_WORDS, "knn.temperature=0"], "knn.temperature=0.0"),
        (["cluster.k=2"], "cluster.k=2: should be TASK.FIELD=VALUE"),
        (["knn.k=5"], "knn.k=5 has no effect: knn is not asked for"),
        (["linear.seed=2"], "linear.seed=2: give it as --seed"),
        (["--tasks", "clustering", "clustering.image_px=40"], "image_px=40"),
        (["--set", "ade20k"], "toy"),
        (["--set", "voc2012"], "toy is no Pascal VOC 2012"),
        (["--classes", "3"], "holds the value 3"),
        (["--max-images", "-1"], "--max-images: -1 is less than 0"),
        (["--patch-size", "0"], "--patch-size: 0 is less than 1"),
        (["--knn-root", "/nowhere"], "/nowhere"),
        (["--before", "/nowhere.pth"], "/nowhere.pth"),
        (["--weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--data", "/nowhere"], "no folder /nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(home, tmp_path, capsys, extra, named):
    small = (
        [word for word in OF_SET if word.split("=")[0] not in str(extra)] if "--tasks" not in extra else []
    )
    code = ended("evaluate dense", *words(home, tmp_path / "out", *small, *extra))
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and named in said
    assert not (tmp_path / "out" / "result.json").exists()


def test_nothing_to_evaluate_on(home, tmp_path):
    with pytest.raises(UserError, match="give --data or --knn-root"):
        evaluate(home, tmp_path, data=None)
    with pytest.raises(UserError, match="--before has no effect without --data"):
        evaluate(home, tmp_path, "--knn-root", home / "classes", "--before", home / "dino.pth", data=None)


def test_a_vit_of_patches_of_14_px_is_no_other_in_the_table(home, tmp_path):
    """Its registered name says 16: it was called ViT-S/16, and differenced against one."""
    task = ["linear.image_px=28", "linear.label_px=14", "linear.epochs=1", "linear.batch_size=2"]
    for side in (14, 16):
        write_start(tmp_path / f"{side}.safetensors", depth=1, patch_size=side)
        out = tmp_path / f"out{side}"
        evaluate(home, out, "--tasks", "linear", *task, weights=tmp_path / f"{side}.safetensors")
    results = [read_result(tmp_path / f"out{side}") for side in (14, 16)]
    results = [result.with_changes(method=f"of {i}") for i, result in enumerate(results)]
    rows = [row for row in dense_table(results, against="of 1").records if row["source"] == "measured"]
    assert sorted(row["backbone"] for row in rows) == ["ViT-T/14", "ViT-T/16"]
    assert {row["linear_miou_difference"] for row in rows} == {""}


# --- numbers that mean nothing ----------------------------------------------------------------------------


def test_validation_images_that_are_training_images_are_a_deviation(home, tmp_path, capsys):
    shutil.copytree(home / "classes", tmp_path / "classes")
    for name in ("bird", "cat"):
        shutil.copy(
            tmp_path / "classes/train" / name / "000.jpg", tmp_path / "classes/val" / name / "000.jpg"
        )
    words = ["--knn-root", tmp_path / "classes", *OF_KNN]
    evaluate(home, tmp_path / "out", *words, data="")
    assert read_result(tmp_path / "out").protocol.deviations["shared_images"] == [0, 2]
    assert "2 of the 6 validation images are training images, too" in capsys.readouterr().out
    (tmp_path / "val").mkdir()
    shutil.rmtree(tmp_path / "classes/val")
    os.symlink("train", tmp_path / "classes/val")
    evaluate(home, tmp_path / "linked", *words, data="")
    assert read_result(tmp_path / "linked").protocol.deviations["shared_images"] == [0, 6]
    evaluate(home, tmp_path / "apart", "--knn-root", home / "classes", *OF_KNN, data="")
    assert "shared_images" not in read_result(tmp_path / "apart").protocol.deviations


def test_a_list_of_masks_that_names_an_image_in_both_parts(home, tmp_path, capsys):
    write_folder(tmp_path / "flat", 4, 2, flat=True)
    (tmp_path / "flat/val.txt").write_text("1000\n2\n3\n")
    evaluate(home, tmp_path / "out", "--tasks", "linear", *LINEAR, data=tmp_path / "flat")
    assert read_result(tmp_path / "out").protocol.deviations["shared_images"] == [0, 2]


def test_one_class_is_none(home, tmp_path):
    for part in ("train", "val"):
        write_photos(tmp_path / "set" / part / "cat", n=3, size=(60, 44), seed=part == "val")
    with pytest.raises(UserError, match="set/train: its images are all of one class; a classifier needs two"):
        evaluate(home, tmp_path / "out", "--knn-root", tmp_path / "set", *OF_KNN, data="")


@pytest.mark.parametrize("task", [*dense.DENSE_TASKS, KNN])
def test_features_that_are_the_same_everywhere_have_no_score(home, tmp_path, task):
    """A constant answer has a plausible accuracy, and mIoU."""
    backbone = build_backbone("vit_tiny_patch16", home / "ours.safetensors")
    state = backbone.state_dict()
    state["norm.weight"] = torch.zeros_like(state["norm.weight"])
    told = dict(name="vit_tiny_patch16", model_kwargs=backbone.model_kwargs, provenance={"method": "flat"})
    save_backbone(tmp_path / "flat.safetensors", state, **told)
    knn = ["--knn-root", home / "classes", *OF_KNN]
    own = {"linear": LINEAR, "in_context": IN_CONTEXT, "clustering": CLUSTERING}
    where = dict(weights=tmp_path / "flat.safetensors", data="" if task == KNN else "toy")
    with pytest.raises(UserError, match="features are the same everywhere"):
        evaluate(home, tmp_path / "out", *(knn if task == KNN else ["--tasks", task, *own[task]]), **where)
    assert not (tmp_path / "out" / "result.json").exists()


def test_of_how_many_classes_a_mean_is(home, tmp_path, capsys):
    write_folder(tmp_path / "set", 4, 2)
    for file in (tmp_path / "set/masks/val").iterdir():
        labels = np.array(Image.open(file))
        Image.fromarray(np.where(labels > 1, 255, labels)).save(file)
    evaluate(home, tmp_path / "out", "--tasks", "linear", *LINEAR, data=tmp_path / "set")
    assert read_result(tmp_path / "out").metrics["val_classes"] == 2
    assert "(2 of 4 classes occur)" in capsys.readouterr().out


def test_classes_without_a_training_pixel_and_more_neighbors_than_patches_are_told(home, tmp_path):
    write_folder(tmp_path / "set", 4, 2)
    for file in (tmp_path / "set/masks/train").iterdir():
        labels = np.array(Image.open(file))
        Image.fromarray(np.where(labels > 1, 255, labels)).save(file)
    told = (
        r"{}: 2 classes of the validation part have no training pixel, so their IoU is 0; the first: class 2"
    )
    for task, own in (("linear", LINEAR), ("in_context", IN_CONTEXT)):
        with pytest.warns(UserWarning, match=told.format(task)):
            evaluate(home, tmp_path / task, "--tasks", task, *own, data=tmp_path / "set")
    with pytest.warns(UserWarning, match="in_context: k=40 is more than the 12 patches of the training part"):
        evaluate(home, tmp_path / "k", "--tasks", "in_context", *IN_CONTEXT[:-1], "in_context.k=40")
