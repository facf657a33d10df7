"""What `tools/benchmark.py step` measures, at tiny sizes."""

import json

from photos import TINY
from tool_fixture import load_tool


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
