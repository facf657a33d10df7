"""``kill -9`` at random moments, a short form of ``make soak``."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch

from pretrain.checkpoints import newest, save

TOOL = Path(__file__).with_name("soak.py")


def test_a_killed_and_resumed_run_equals_one_left_alone(tmp_path, monkeypatch):
    command = [sys.executable, str(TOOL), "--quick", "--variants", "accumulated", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    kills = re.findall(r"kill \d/3 \((\w+)\): newest whole checkpoint \d+, half-written: (\S+)", done.stdout)
    assert [kind for kind, _ in kills] == ["write", "step", "finish"]
    assert kills[0][1].endswith(".tmp")
    assert "soak accumulated: 3 kills, 24 iterations: the same files, bit for bit" in done.stdout
    monkeypatch.setattr(sys, "path", list(sys.path))
    soak = runpy.run_path(str(TOOL))
    differences, file_differences = soak["differences"], soak["file_differences"]
    killed, alone = (tmp_path / "accumulated" / name for name in ("killed", "alone"))
    assert differences(killed, alone) == [] and file_differences(killed, alone) == []
    log = killed / "metrics.jsonl"
    lines = log.read_text().splitlines(True)
    changed = json.dumps({**json.loads(lines[4]), "loss": 0.0}) + "\n"
    log.write_text("".join([*lines[:4], changed, *lines[5:-1]]))
    assert [line.split(":")[0] for line in differences(killed, alone)] == [
        "metrics.jsonl, line 5",
        "metrics.jsonl, line 24",
    ]
    log.write_text("".join(lines))
    result, weights = killed / "result.json", killed / "backbone.safetensors"
    kept = result.read_text()
    result.write_text(kept.replace('"seed": 0', '"seed": 1'))
    weights.write_bytes(weights.read_bytes()[:-1])
    (killed / "left").write_text("")
    told = ["only one has left", "backbone.safetensors: not the same file", "result.json: not the same file"]
    assert file_differences(killed, alone) == told
    result.write_text(kept.replace('"created": "2', '"created": "1'))
    assert file_differences(killed, alone) == told[:2]
    found, _ = newest(killed)
    tensors = found.tensors()
    name, tensor = next((n, x) for n, x in tensors.items() if x.ndim and x.dtype == torch.float32)
    tensor.view(-1).view(torch.uint8)[-1] ^= 1  # one bit
    save(killed, found.iteration, tensors, found.meta, keep=2)
    assert differences(killed, alone) == [f"{name}: not the same bits"]
    save(killed, found.iteration, {n: x for n, x in tensors.items() if n != name}, found.meta, keep=2)
    assert differences(killed, alone) == [f"only one has {name}"]
