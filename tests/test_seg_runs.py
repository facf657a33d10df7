"""Whole segmentation runs by our tool: what they leave, what they refuse, and how they stop."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tool_fixture import load_tool

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

from ade_fixture import write_ade
from mmseg.registry import DATASETS
from seg_fixture import FLAGS, TINY, tiny, tiny_run, write_weights

from pretrain.build import build_backbone
from pretrain.data.datasets import open_label_sets
from pretrain.errors import Interrupted, UserError
from pretrain.files import read_mapping
from pretrain.results.folder import unnamed
from pretrain.results.schema import read_result
from pretrain.weights import save_backbone
from seg_plugin import compat
from seg_plugin.hooks import PosfieldRunHook
from seg_plugin.loop import DrawnIndex
from seg_plugin.predict import newest_checkpoint
from seg_plugin.run import config, finetune, train


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def test_tool_trains_leaves_its_files_and_skips_a_finished_run(ade, weights, tmp_path, capsys):
    tool = load_tool("segment").main
    numbers = [f"{key}={value}" for key, value in {**TINY, "max_iters": 4, "val_every": 4}.items()]
    words = ["--weights", str(weights), "--data", str(ade), "--output", str(tmp_path)]
    words += ["--workers", "0", "--device", "cpu", "--seed", "3", *numbers]
    tool(words)
    result = read_result(tmp_path)
    assert result.backbone == "vit_tiny_patch16_reg4"  # the file says it
    with pytest.raises(UserError, match="backbone: a name is needed"):
        tool(["--data", str(ade), "--output", str(tmp_path)])
    assert (result.kind, result.method, result.effective_epochs, result.seed) == (
        "segmentation",
        "posfield",
        400.0,
        3,
    )
    assert not result.protocol.full and result.protocol.deviations["max_iters"] == [160_000, 4]
    assert "model_kwargs" not in result.protocol.deviations and result.weights_hash
    iou = result.metrics["iou"]
    assert 0 < result.metrics["miou"] <= 100 and result.metrics["miou"] == pytest.approx(
        sum(iou.values()) / len(iou)
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 4] and lines[-1]["miou"] == result.metrics[
        "miou"
    ]
    assert (
        lines[0]["lr"] == 8e-5
        and lines[3]["lr"] == pytest.approx(8e-6)
        and lines[3].keys() == {"iteration", "loss", "lr"}
    )
    assert Image.open(tmp_path / "figures" / "segmentations.png").width > 500
    entry = json.loads((tmp_path / "figures" / "captions.json").read_text())["segmentations.png"]
    assert entry.keys() == {"title", "caption", "cells", "legend"}
    assert {cell["column"] for cell in entry["cells"]} == {"image", "ground truth", "prediction"}

    (
        tmp_path / "result.json"
    ).unlink()  # as if killed between the last checkpoint and the end of its validation
    tool([*words, "--resume"])
    assert read_result(tmp_path).metrics == result.metrics

    assert not unnamed(tmp_path, "segmentation")
    before = (tmp_path / "result.json").stat().st_mtime_ns
    tool(words)
    assert (
        "nothing to do" in capsys.readouterr().out and (tmp_path / "result.json").stat().st_mtime_ns == before
    )
    for other, key in ((["lr=1e-5"], "lr"), (["--seed", "4"], "seed")):
        with pytest.raises(UserError, match=f"other settings .*{key}"):
            tool([*words, *other])


def test_one_call_fine_tunes(ade, tmp_path):
    """Of what is left out, the files say the backbone's name, and what the masks hold is checked."""
    options = dict(backbone="vit_tiny_patch16", workers=0, device="cpu", model_kwargs=FLAGS)
    fields = {**TINY, "max_iters": 1, "val_every": 1}
    result = finetune(ade, output=tmp_path / "run", dataset="ade20k", **options, **fields)
    assert result == tmp_path / "run" / "result.json" and read_result(result).labels.startswith("4 classes")
    with pytest.raises(UserError, match="dataset: 'coco' is none of"):
        finetune(ade, output=tmp_path / "run", dataset="coco", **options)


def test_same_seed_same_numbers_and_the_loss_falls(ade, tmp_path):
    """Also: without a weight file, own classes whose label 0 counts."""
    recipe = tiny(
        reduce_zero_label=False, num_classes=5, max_iters=30, val_every=30, lr="1e-3", warmup_iters=2
    )
    logs = []
    for name in ("one", "two"):
        train(tiny_run(ade, tmp_path / name, protocol=recipe))
        logs.append((tmp_path / name / "metrics.jsonl").read_text())
    assert logs[0] == logs[1]
    losses = [json.loads(line)["loss"] for line in logs[0].splitlines()[:-1]]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    assert read_result(tmp_path / "one").method == "from scratch"


def test_bad_label_met_by_a_worker_is_one_line(ade, tmp_path):
    root = write_ade(tmp_path / "ade", n_train=2, n_val=1)
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(root / "annotations" / "training" / "0000.png")
    with pytest.raises(UserError, match=r"^[^\n]*training/0000.png holds the value 7[^\n]* --map [^\n]*$"):
        train(tiny_run(root, tmp_path / "run", workers=1))


def test_nan_stops_the_run_and_says_where(ade, tmp_path):
    vit = build_backbone("vit_tiny_patch16", **FLAGS)
    vit.patch_embed.proj.weight.data.fill_(1e38)  # finite, and its products are not
    path = save_backbone(
        tmp_path / "nan.safetensors", vit.state_dict(), name="vit_tiny_patch16", model_kwargs=vit.model_kwargs
    )
    with pytest.raises(FloatingPointError, match="iteration 1: loss is nan, decode.loss_ce is nan"):
        train(tiny_run(ade, tmp_path / "run", weights=path))


def test_devices():
    with pytest.raises(UserError, match="device: 'tpu'"), compat.on_device("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees none"), compat.on_device("cuda"):
            pass


def test_another_kind_of_runs_folder_is_refused(ade, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="another kind of run"):
        train(tiny_run(ade, tmp_path))


def test_a_batch_is_not_shared_with_processes_that_are_not_there(ade, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UserError, match="SLURM_NTASKS says 2 processes"):
        train(tiny_run(ade, tmp_path))


# --- Files that cannot be read


def spoil(root, kind, split):
    """Make the first image or mask of a split no file of an image; returns it."""
    path = next(iter(sorted((root / kind / split).iterdir())))
    path.write_bytes(b"no picture")
    return path


@pytest.mark.parametrize(
    "kind, split, workers",
    [
        ("images", "training", 0),
        ("images", "training", 1),
        ("annotations", "training", 1),
        ("images", "validation", 1),
    ],
)
def test_an_unreadable_file_is_named_in_one_line(kind, split, workers, tmp_path):
    root = write_ade(tmp_path / "ade", n_train=2, n_val=1)
    path = spoil(root, kind, split)
    with pytest.raises(UserError, match=rf"^[^\n]*{path} (is no readable image|cannot be read) \([^\n]*\)$"):
        train(tiny_run(root, tmp_path / "run", workers=workers))


def test_training_takes_another_image_in_place_of_a_truncated_one(tmp_path, capsys):
    """Drawn from (seed, position) alone; named and counted. Too many, or one of validation, are an error."""
    root = write_ade(tmp_path / "ade", n_train=10, n_val=1)
    images = sorted((root / "images" / "training").iterdir())
    images[3].write_bytes(images[3].read_bytes()[:-40])
    run = tiny_run(root, tmp_path / "run", protocol=tiny(max_iters=5, val_every=5, batch_size=2))
    train(run)
    assert "1 of 10 images cannot be read; training takes others" in capsys.readouterr().err
    lines = (tmp_path / "run" / "broken_images.txt").read_text().splitlines()
    assert len(lines) == 1 and f"{images[3]} is no readable image" in lines[0]
    data = DATASETS.build(config(run).train_dataloader.dataset)
    drawn = [data[DrawnIndex(3, 0, position)] for position in (*range(8), *range(8))]
    others = [sample["data_samples"].img_path for sample in drawn]
    assert others[:8] == others[8:] and len(set(others)) > 2 and str(images[3]) not in others
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(drawn[:8], drawn[8:]))
    assert "broken" not in data[DrawnIndex(4, 0, 3)]["data_samples"].metainfo
    images[4].write_bytes(b"")
    with pytest.raises(UserError, match=r"^data: 2 of 10 images cannot be read, more than a share of 0\.1"):
        train(tiny_run(root, tmp_path / "more"))


def test_a_training_mask_of_another_size_is_named(tmp_path):
    root = write_ade(tmp_path / "ade", n_train=2, n_val=1)
    path = root / "annotations" / "training" / "0000.png"
    Image.fromarray(np.ones((56, 40), np.uint8)).save(path)
    with pytest.raises(
        UserError, match=rf"^data: {path} is \(56, 40\), but its image is \(40, 56\) \(height, width\)$"
    ):
        train(tiny_run(root, tmp_path / "run", workers=1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_gray_transparent_and_palette_images_become_three_channels(mode, tmp_path):
    """As OpenCV reads them: gray three times, transparency dropped."""
    from seg_plugin.data import PosfieldLoadImage

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 7) if mode == "L" else (6, 7, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, mode="L" if mode == "L" else "RGBA")
    if mode == "P":
        image = image.convert("RGB").quantize(16)
    image.save(tmp_path / "image.png")
    loaded = PosfieldLoadImage()({"img_path": str(tmp_path / "image.png")})["img"]
    expected = np.array(image)[..., :3] if mode == "RGBA" else np.array(image.convert("RGB"))
    assert np.array_equal(loaded[..., ::-1], expected)


# --- Stopping


def test_a_signal_saves_and_the_run_goes_on_from_there(ade, tmp_path, monkeypatch):
    """In an iteration that saves nothing by itself; the end is that of a run that was left alone."""
    recipe = tiny(max_iters=4, val_every=4)
    train(tiny_run(ade, tmp_path / "whole", protocol=recipe))
    original = PosfieldRunHook.after_train_iter

    def asked(hook, runner, batch_idx, *rest, **named):
        original(hook, runner, batch_idx, *rest, **named)
        if batch_idx == 1:
            signal.raise_signal(signal.SIGTERM)

    run = tiny_run(ade, tmp_path / "stopped", protocol=recipe)
    with (
        monkeypatch.context() as patched,
        pytest.raises(Interrupted, match="^SIGTERM; saved at iteration 2$"),
    ):
        patched.setattr(PosfieldRunHook, "after_train_iter", asked)
        train(run)
    assert (
        signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        and newest_checkpoint(run.output).name == "iter_2.pth"
    )
    train(run, resume=True)
    assert (run.output / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert read_result(run.output).metrics == read_result(tmp_path / "whole").metrics


def test_other_data_are_told_and_gone_on_over_when_asked(ade, tmp_path, capsys):
    """A changed mask, then another name; a run of an earlier version, which has no data.json; a finished one."""
    own = Path(shutil.copytree(ade, tmp_path / "own"))
    whole = tiny_run(own, tmp_path / "whole", protocol=tiny(max_iters=4, val_every=2))
    train(whole)
    run = replace(whole, output=tmp_path / "run")
    shutil.copytree(whole.output, run.output)
    for file in ("result.json", "iter_4.pth"):
        (run.output / file).unlink()
    (run.output / "last_checkpoint").write_text(str(run.output / "iter_2.pth"))
    before = replace(run, output=Path(shutil.copytree(run.output, tmp_path / "before")))
    (before.output / "last_checkpoint").write_text(str(before.output / "iter_2.pth"))
    (before.output / "data.json").unlink()
    mask = sorted((own / "annotations" / "training").iterdir())[0]
    Image.open(mask).save(mask, compress_level=0)
    with pytest.raises(UserError, match=r"^output: .*\(training: other sizes of files\); .*--data-changed"):
        train(run, resume=True)
    with pytest.raises(UserError, match="training: other sizes"):
        train(whole)
    train(before, resume=True)
    assert "at most the number of images is compared" in capsys.readouterr().err
    for folder, suffix in (("images", ".jpg"), ("annotations", ".png")):
        file = own / folder / "training" / f"{mask.stem}{suffix}"
        file.rename(file.with_stem("renamed"))
    with pytest.raises(UserError, match="training: other names"):
        train(run, resume=True)
    train(run, resume=True, data_changed=True)
    assert "other data (training: other names)" in capsys.readouterr().err
    found = read_result(run.output)
    assert found.protocol.deviations["data"] == ["the same to the end", "training: other names"]
    assert "data" not in read_result(whole.output).protocol.deviations
    # as a comparison sees them
    parts = zip(("training", "validation"), open_label_sets(own, "ade20k"))
    assert read_mapping(run.output / "data.json", "")["digest"] == {part: of.digest() for part, of in parts}


def test_a_signal_during_validation(ade, tmp_path, monkeypatch):
    """The validation is begun again by the run that goes on, and stands in the log once."""
    from seg_plugin.hooks import PosfieldIoU

    recipe = tiny(max_iters=4, val_every=2)
    train(tiny_run(ade, tmp_path / "whole", protocol=recipe))
    original, calls = PosfieldIoU.process, []

    def asked(metric, *rest):
        original(metric, *rest)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGUSR1)

    run = tiny_run(ade, tmp_path / "stopped", protocol=recipe)
    monkeypatch.setattr(PosfieldIoU, "process", asked)
    with pytest.raises(Interrupted, match="^SIGUSR1; saved at iteration 2$"):
        train(run)
    assert len(calls) == 2
    train(run, resume=True)
    assert len(calls) == 2 + 3 + 3  # two validations of three images
    assert (run.output / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_a_checkpoint_that_was_cut_off_is_passed_over(ade, tmp_path, capsys):
    run = tiny_run(ade, tmp_path / "run", protocol=tiny(val_every=2))
    train(run)
    metrics = read_result(run.output).metrics
    (run.output / "result.json").unlink()
    newest = run.output / "iter_4.pth"
    newest.write_bytes(newest.read_bytes()[:-1000])
    train(run, resume=True)
    assert f"passed over: {newest} was not written to its end" in capsys.readouterr().err
    assert read_result(run.output).metrics == metrics
    for path in run.output.glob("iter_*.pth"):
        path.write_bytes(b"")
    (run.output / "result.json").unlink()
    with pytest.raises(UserError, match="iter_4.pth was not written to its end, and there is no other"):
        train(run, resume=True)


def test_amp_on_the_cpu_is_refused(ade, tmp_path):
    with pytest.raises(UserError, match="amp=True needs a CUDA device"):
        train(tiny_run(ade, tmp_path, protocol=tiny(amp=True)))
