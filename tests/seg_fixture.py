"""Segmentation runs that last seconds: their numbers, a checkpoint with all that a plain ViT lacks, and
the stock launchers."""

import os
import subprocess
import sys
from pathlib import Path

import mmengine.config.config
import torch

from pretrain.build import build_backbone
from pretrain.weights import save_backbone
from seg_plugin.protocol import protocol, with_overrides
from seg_plugin.run import SegmentationRun

# mmengine beautifies a config whenever it is logged or saved, which takes most of a run of seconds; in other
# processes it does.
mmengine.config.config.FormatCode = lambda text, **_: (text, True)

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "train_seg.py"
TINY = dict(
    resize_px=(96, 48),
    crop_px=48,
    slide_crop_px=48,
    slide_stride_px=32,
    num_classes=4,
    reduce_zero_label=True,
    batch_size=2,
)
FLAGS = dict(depth=2, pos_grid=6)


def tiny(**overrides):
    """ADE20K's protocol, a few iterations on a few pixels."""
    return with_overrides(protocol(), {**TINY, "max_iters": 4, "val_every": 4, **overrides})


def tiny_run(data, output, **changes):
    """A run of :func:`tiny` on the CPU."""
    values = dict(data=data, output=output, protocol=tiny(), workers=0, device="cpu", model_kwargs=FLAGS)
    return SegmentationRun(**{"backbone": "vit_tiny_patch16", "weights": None, **values, **changes})


def write_weights(folder):
    """A position field, registers, LayerScale, and where they come from."""
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny_patch16_reg4", depth=2, pos_encoding="field", pos_grid=10, layerscale=0.1)
    provenance = {"method": "posfield", "effective_epochs": 400.0}
    path = folder / "backbone.safetensors"
    return save_backbone(
        path,
        vit.state_dict(),
        name="vit_tiny_patch16_reg4",
        model_kwargs=vit.model_kwargs,
        provenance=provenance,
    )


def stock_tool(name):
    """MMSegmentation's own train.py or test.py."""
    import mmseg

    return Path(mmseg.__file__).parent / ".mim" / "tools" / name


def write_config(folder, data, *, backbone="vit_tiny_patch16", workers=0, model_kwargs=None, **numbers):
    """``folder/seg.py``: a tiny config as our users write them, for the stock launchers."""
    (folder / "seg.py").write_text(
        "_base_ = []\n"
        "from seg_plugin.config import segmenter_config\n"
        "from seg_plugin.protocol import protocol, with_overrides\n"
        f"globals().update(segmenter_config(with_overrides(protocol(), { ({**TINY, **numbers})!r}), {backbone!r}, "
        f"model_kwargs={model_kwargs!r}, data_root={str(data)!r}, workers={workers}))\n"
    )
    return folder / "seg.py"


def command_line(output, data, *words, backbone="vit_tiny_patch16", workers=0, **numbers):
    """Of our tool."""
    fields = [
        f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in {**TINY, **numbers}.items()
    ]
    model_kwargs = [f"backbone.{key}={value}" for key, value in FLAGS.items()]
    options = [
        "--dataset",
        "ade20k",
        "--data",
        data,
        "--output",
        output,
        "--workers",
        workers,
        "--device",
        "cpu",
    ]
    return [*map(str, ["--backbone", backbone, *options, *words]), *fields, *model_kwargs]


def launch(script, *words, cwd, code=0, environment=()):
    """Run a tool in a process of its own; what it printed."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **dict(environment)}
    line = [sys.executable, str(script), *map(str, words)]
    done = subprocess.run(line, cwd=cwd, env=variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, (done.returncode, done.stderr[-3000:])
    return done.stdout + done.stderr
