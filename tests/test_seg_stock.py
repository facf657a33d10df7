"""Runs by MMSegmentation's own launchers, unchanged, and its own inference on what they leave."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

import mmcv
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.registry import MODELS
from seg_fixture import launch, stock_tool, write_config, write_weights

from pretrain.errors import UserError
from pretrain.results.schema import read_result


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def stock(ade, weights, tmp_path_factory):
    """train.py for 20 iterations with weights given on the command line, then without their file: --resume
    to 25, and test.py."""
    folder = tmp_path_factory.mktemp("stock")
    write_config(folder, "elsewhere", max_iters=20, val_every=20)
    roots = [f"{loader}_dataloader.dataset.data_root={ade}" for loader in ("train", "val", "test")]
    copy = folder / "backbone.safetensors"
    copy.write_bytes(weights.read_bytes())
    launch(
        stock_tool("train.py"),
        "seg.py",
        "--work-dir",
        "run",
        "--cfg-options",
        f"model.backbone.weights={copy}",
        *roots,
        cwd=folder,
    )
    first = (folder / "run" / "result.json").read_text()
    copy.unlink()
    launch(
        stock_tool("train.py"),
        "run/seg.py",
        "--work-dir",
        "run",
        "--resume",
        "--cfg-options",
        "train_cfg.max_iters=25",
        cwd=folder,
    )
    tested = launch(
        stock_tool("test.py"),
        "run/seg.py",
        "run/iter_25.pth",
        "--work-dir",
        "tested",
        "--out",
        "tested/masks",
        cwd=folder,
    )
    return folder, first, tested


def test_stock_train_leaves_the_same_files(stock, weights, tmp_path):
    folder, first, _ = stock
    (tmp_path / "result.json").write_text(first)
    result = read_result(tmp_path)
    assert (result.method, result.effective_epochs, result.backbone) == (
        "posfield",
        400.0,
        "vit_tiny_patch16",
    )
    assert (
        result.protocol.deviations["max_iters"] == [160_000, 20]
        and "train_cfg.max_iters" not in result.protocol.deviations
    )
    assert (folder / "run" / "figures" / "segmentations.png").is_file()
    saved = Config.fromfile(folder / "run" / "seg.py")
    backbone = saved.model.backbone
    assert backbone.weights is None and not saved.resume
    assert (backbone.n_registers, backbone.pos_encoding, backbone.layerscale, backbone.pos_grid) == (
        4,
        "field",
        0.1,
        10,
    )


def test_stock_resume_continues_and_says_so(stock):
    folder, first, _ = stock
    result = read_result(folder / "run")
    assert result.method == "posfield" and result.weights_hash == json.loads(first)["weights_hash"]
    assert result.protocol.deviations["train_cfg.max_iters"] == [20, 25]  # changed on the command line
    before = torch.load(folder / "run" / "iter_20.pth", weights_only=True)["posfield"]["wall_time_s"]
    assert result.wall_time_s > before > 0.1  # of both parts
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [*range(1, 21), 20, *range(21, 26), 25]


def test_stock_test_gives_the_runs_metrics(stock):
    folder, _, printed = stock
    (scores,) = [json.loads(path.read_text()) for path in (folder / "tested").glob("*/*.json")]
    assert scores["mIoU"] == pytest.approx(read_result(folder / "run").metrics["miou"], abs=1e-9)
    masks = [np.array(Image.open(path)) for path in sorted((folder / "tested" / "masks").glob("*.png"))]
    assert [mask.shape for mask in masks] == [(40, 56), (56, 40), (40, 56)] and all(
        1 <= mask.min() for mask in masks
    )


def test_saved_config_trains_nothing_anew_and_loads_nothing_else(stock, tmp_path):
    """Without the weights' file it would begin at random; and mmengine itself only warns of tensors that
    do not match."""
    folder, _, _ = stock
    cfg = Config.fromfile(folder / "run" / "seg.py")
    cfg.work_dir = str(tmp_path)
    with pytest.raises(UserError, match="give model.backbone.weights"):
        Runner.from_cfg(cfg).train()
    cfg.model.backbone.n_registers = 0
    cfg.load_from = str(folder / "run" / "iter_25.pth")
    with pytest.raises(UserError, match="left over backbone.vit.reg_token"):
        Runner.from_cfg(cfg).test()


def test_mmsegs_inference_gives_the_labels_of_the_runs_model(stock, ade):
    """The weights' file is gone; init_model, inference_model (file, array, list) and MMSegInferencer."""
    folder, _, _ = stock
    config, checkpoint = str(folder / "run" / "seg.py"), str(folder / "run" / "iter_25.pth")
    images = [str(path) for path in sorted((ade / "images" / "validation").iterdir())]
    written = [
        np.array(Image.open(path)) for path in sorted((folder / "tested" / "masks").glob("*.png"))
    ]  # stored as k + 1
    model = init_model(config, checkpoint, device="cpu")
    plain = MODELS.build(Config.fromfile(config).model)
    plain.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert [len(inference_model(model, [images[0], images[2]]))] == [2]  # of one size
    for image, mask in zip(images, written, strict=True):
        assert np.array_equal(inference_model(model, image).pred_sem_seg.data[0].numpy() + 1, mask)
    array = inference_model(
        model, mmcv.imread(images[1])
    )  # from now on this model takes arrays alone (mmseg changes its config)
    assert np.array_equal(array.pred_sem_seg.data[0].numpy() + 1, written[1])
    assert model.dataset_meta["classes"] == ("class 1", "class 2", "class 3", "class 4")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())
    inferred = MMSegInferencer(config, checkpoint, device="cpu")(images[0], show=False)["predictions"]
    assert np.array_equal(inferred + 1, written[0])
