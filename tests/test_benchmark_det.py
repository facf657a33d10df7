"""What `tools/benchmark.py det` and `det-step` measure, at tiny sizes; the bounds are the tool's own.
Needs Detectron2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "detectron2", reason="Detectron2 is not installed (it is optional: see its INSTALL guide)"
)

from det_plugin.benchmark import backbone as det
from det_plugin.benchmark import step
from det_plugin.detectron2_engine.loader import noise_samples
from det_plugin.protocol import protocol, with_overrides

pytestmark = pytest.mark.detectron2

TINY = "vit_tiny_patch16"
SMALL = dict(
    image_size_px=64, channels=16, box_fc=16, box_convs=1, mask_convs=1, num_classes=3, roi_batch_per_image=8,
    rpn_pre_nms=(20, 20), rpn_post_nms=(10, 10), anchor_sizes_px=(4, 8, 16, 32, 64),
)  # fmt: skip


def test_contenders_are_alike_or_the_measure_stops(monkeypatch):
    det.check_alike(TINY)
    other = det.ALIKE(window_size=7)
    monkeypatch.setitem(det.OURS, "ours_windowed", other)
    with pytest.raises(AssertionError, match="ours_windowed"):
        det.check_alike(TINY)


def test_the_tool_leaves_the_ratios(tmp_path):
    tool = Path(__file__).parents[1] / "tools" / "benchmark.py"
    words = [
        "det",
        "--backbone",
        TINY,
        "--image-px",
        "64",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--json",
        tmp_path / "f.json",
    ]
    out = subprocess.run([sys.executable, tool, *words], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    for name, bound in (("time_ratio", 0.55), ("memory_ratio", 0.3), ("memory_ratio_checkpointed", 0.12)):
        assert found[name] > 0 and f"{name} {found[name]}  (at most {bound})" in out.stdout.replace(
            "0.30", "0.3"
        )
    assert all(found["seconds"][name] > 0 < found["peak_mib"][name] for name in (*det.OURS, *det.THEIRS))


@pytest.mark.parametrize("name", ["ours_windowed", "ours_checkpointed", "detectron2_windowed"])
def test_a_step_trains_every_part(name):
    recipe = with_overrides(protocol("coco-12ep", TINY), SMALL)
    torch.manual_seed(0)
    model = step.build(name, recipe, TINY, dict(depth=4))
    train = step.training_step(model, recipe, torch.device("cpu"), noise_samples(recipe, 2, 8))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    train()
    same = {
        key.split(".")[0]
        for key, p in model.named_parameters()
        if p.requires_grad and torch.equal(p, before[key])
    }
    assert not same and {key.split(".")[0] for key in before} == {
        "backbone",
        "proposal_generator",
        "roi_heads",
    }


def test_steps_of_several_batch_sizes_are_measured(monkeypatch):
    found = step.measure(
        TINY, [2, 1], 1, "cpu", contenders=["ours"], model_kwargs=dict(depth=1), overrides=SMALL
    )
    assert list(found["ours"]) == ["1", "2"] and all(
        f["img_per_s"] > 0 < f["peak_mib"] for f in found["ours"].values()
    )

    def no_memory(contenders, *how):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(step, "in_turns", no_memory)
    found = step.measure(TINY, [1, 2], 1, "cpu", contenders=["ours"], overrides=SMALL)
    assert found["ours"] == {"1": "out of memory"}
