"""What `tools/benchmark.py step` measures, at tiny sizes."""

import json

from photos import TINY
from tool_fixture import load_tool

from pretrain.benchmark.step import ROTATION, flops_an_image, measure, training_steps
from pretrain.build import build_backbone
from pretrain.config import load_config


def test_the_tool_leaves_the_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pretrain.benchmark.step.WARM_UP", 0)
    settings = [word for word in TINY if word.startswith(("crops.", "heads.", "backbone.depth"))]
    words = [
        *"--backbone vit_tiny_patch16 --batch 2 --rounds 1 --device cpu --json".split(),
        str(tmp_path / "f.json"),
    ]
    load_tool("benchmark").main(["step", *words, *settings])
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["method_over_baseline"] > 0 < found["memory_ratio"] and found["batch_size"] == 2
    assert found["turns"] == [found["method_over_baseline"]]
    for method in ("intertwined", "dinov2"):
        assert found["seconds"][method] > 0 < found["peak_mib"][method]
        assert found[method]["seconds"] > 0 and found[method]["gflops_an_image"] > 0
    assert f"method_over_baseline {found['method_over_baseline']}" in capsys.readouterr().out


def test_what_rotation_costs(monkeypatch):
    """Of the same step, with the same numbers but for the turning of queries and keys."""
    monkeypatch.setattr("pretrain.benchmark.step.WARM_UP", 0)
    settings = [word for word in TINY if word.startswith(("crops.", "heads.", "backbone.depth"))]
    found = measure("vit_tiny_patch16", 2, 1, "cpu", settings, rotary=True)
    assert found["turns"] == [found["rotary_over_unrotated"]] and found["seconds"].keys() == ROTATION.keys()
    words = ["backbone.name=vit_tiny_patch16", "optim.batch_size=2", "run.device=cpu", *settings]
    losses = {rotates: training_steps("rotary-100ep", words, rotates)().losses for rotates in (True, False)}
    assert losses[True].keys() == losses[False].keys() and losses[True] != losses[False]


def test_flops_of_gated_mlps():
    """By the matrices themselves, of a block on N tokens."""
    figures = {}
    for size in ("small", "small_plus"):
        config = load_config("dinov2-100ep", [f"backbone.name=vit_{size}_patch16"])
        figures[size] = flops_an_image(config)
        block = build_backbone(f"vit_{size}_patch16", depth=1).blocks[0]
        figures[f"{size}_block"] = 2 * sum(p.numel() for name, p in block.named_parameters() if p.ndim == 2)
    # tokens of the teacher's crops, and three times those of the student's
    tokens = 2 * 197 + 3 * (2 * 197 + 8 * 37)
    extra = 12 * tokens * (figures["small_plus_block"] - figures["small_block"])
    assert figures["small_plus"] - figures["small"] == extra > 0
