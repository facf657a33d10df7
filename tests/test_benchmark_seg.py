"""The benchmark of the segmentation backbone: the contenders are one network, and its figures are there."""

import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")  # before anything imports mmseg's models

from seg_plugin.benchmark import CONTENDERS, contender, measure


def test_contenders_are_the_same_network():
    x = torch.randn(2, 3, 64, 64)
    maps = {name: contender(name, "vit_tiny_patch16", crop_px=64, depth=2)(x)[0] for name in CONTENDERS}
    assert maps["mmseg"].shape == (2, 192, 4, 4)
    for name in CONTENDERS[1:]:
        torch.testing.assert_close(maps[name], maps["mmseg"], atol=1e-5, rtol=1e-5)
    other = contender("ours", "vit_tiny_patch16", crop_px=64, depth=1)(x)[0]
    assert (other - maps["mmseg"]).abs().max() > 1e-2


def test_ratios_and_what_is_behind_them():
    found = measure("vit_tiny_patch16", 1, "cpu", crop_px=64, batch_size=1, depth=1)
    assert {"time_ratio", "memory_ratio", "memory_ratio_checkpointed", "backbone"} <= found.keys()
    assert found["seconds"].keys() == found["peak_mib"].keys() == set(CONTENDERS)
    assert min(found["peak_mib"].values()) > 0 and found["time_ratio"] > 0
