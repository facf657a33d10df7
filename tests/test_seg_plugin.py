"""The segmentation plug-in on mmcv-lite and today's torch; its metric; its toy config."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.utils.dl_utils import mmcv_full_available
from mmseg.evaluation import IoUMetric
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from seg_fixture import ROOT

from seg_plugin import compat
from seg_plugin.hooks import PosfieldIoU


@pytest.fixture(scope="module", autouse=True)
def mmseg_scope():
    """mmengine looks types up in the library that its current scope names; a Runner sets it by itself."""
    register_all_modules(init_default_scope=True)


def test_ops_without_extension_say_what_is_missing():
    import mmcv.ops

    assert "mmcv._ext" not in sys.modules and not hasattr(mmcv, "_ext") and not mmcv_full_available()
    with pytest.raises(RuntimeError, match="sigmoid_focal_loss_forward is compiled code"):
        mmcv.ops.sigmoid_focal_loss(torch.rand(2, 3), torch.zeros(2, dtype=torch.long))
    assert (
        mmcv.ops.point_sample(torch.ones(1, 3, 4, 4), torch.full((1, 2, 2), 0.5)).eq(1).any()
    )  # pure Python works


def test_a_full_mmcv_is_left_alone(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "mmcv.ops")
    compat.import_ops_without_extension()
    assert "mmcv.ops" not in sys.modules


def test_mmengine_checkpoints_load_with_weights_only(tmp_path):
    history = HistoryBuffer()
    history.update(1.5)
    torch.save(
        {"scalars": {"loss": history}, "numpy": [np.float64(2.5), np.float32(1), np.int64(3)]},
        tmp_path / "ours.pth",
    )
    loaded = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert loaded["scalars"]["loss"].current() == 1.5 and loaded["numpy"] == [2.5, 1, 3]


@pytest.mark.parametrize("foreign", [HistoryBuffer.__init__, os.system, Path("x")])
def test_nothing_else_is_let_in(foreign, tmp_path):
    torch.save({"x": foreign}, tmp_path / "foreign.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "foreign.pth", weights_only=True)
    assert not any("weights_only=False" in path.read_text() for path in (ROOT / "seg_plugin").glob("*.py"))


def test_metric_is_mmsegs_without_its_rounding():
    random = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randint(0, 4, (9, 11), generator=random) for _ in range(2)) for _ in range(3)]
    pairs[0][1][:2] = 255
    metrics = {}
    for kind in (IoUMetric, PosfieldIoU):
        metric = kind()
        metric.dataset_meta = {"classes": ("a", "b", "c", "d", "never")}
        counts = [IoUMetric.intersect_and_union(predicted, label, 5, 255) for predicted, label in pairs]
        metrics[kind] = metric.compute_metrics(counts)
    assert metric.per_class.keys() == {"a", "b", "c", "d"}
    assert metrics[PosfieldIoU]["mIoU"] == pytest.approx(sum(metric.per_class.values()) / 4)
    assert metrics[PosfieldIoU] == pytest.approx(metrics[IoUMetric], abs=0.006)


def test_toy_config_fits_the_toy_data(tmp_path, monkeypatch):
    from pretrain.data.toy import CLASSES

    monkeypatch.setenv("TOY_ADE", str(tmp_path))
    cfg = Config.fromfile(ROOT / "configs" / "seg" / "toy.py")
    assert cfg.model.decode_head.num_classes == 1 + len(CLASSES) and cfg.train_cfg.max_iters == 20
    assert cfg.train_dataloader.dataset.n_classes == 1 + len(CLASSES)
    assert cfg.train_dataloader.dataset.masks.void == ("0", "255")  # the rim
    assert cfg.train_dataloader.dataset.data_root == str(tmp_path) and "CLASSES" not in cfg
    assert MODELS.build(cfg.model).backbone.vit.model_kwargs["depth"] == 4
