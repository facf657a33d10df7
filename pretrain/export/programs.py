"""Export a backbone as a program that needs none of our code: ``torch.export`` or ONNX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.backbones.vit import ViT
from pretrain.export.fixed_size import FixedSizeViT, Outputs, Run, Size, Usage, description, require

INPUT = "image"  # [B, 3, H, W], normalized as in training
OPSET = 18  # the oldest one that torch's exporter writes directly


def export_program(vit: ViT, size: Size, path: Path, provenance: Mapping[str, Any]) -> Run:
    """``torch.export`` (.pt2): ``torch.export.load(path).module()(image)`` gives a dictionary of outputs."""
    torch.export.save(
        _trace(vit, size), path, extra_files={"posfield.json": description(vit, size, provenance)}
    )
    return torch.export.load(path).module()


def use_program(vit: ViT, size: Size, path: str) -> Usage:
    """How to use it."""
    code = f"""import torch

model = torch.export.load({path!r}).module()
outputs = model(image)
cls, feature_map = outputs["cls"], outputs["feature_map"]  # [B, D], [B, D, h, w]"""
    note = "A program of torch.export: it needs torch alone, at this image size, and takes any batch."
    return Usage("pytorch", code, (note,))


# As in the trace: it decides SDPA's kernel for masks, and the graph relies on the output's strides
@torch.no_grad()
def export_onnx(vit: ViT, size: Size, path: Path, provenance: Mapping[str, Any]) -> Run:
    """ONNX: one file with its weights inside. The outputs have the names of :meth:`FixedSizeViT.forward`.

    Raises:
        UserError: ``onnx``, ``onnxscript`` or ``onnxruntime`` is not installed.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    names = ["feature_map", "cls", *(["registers"] if vit.n_registers else [])]
    program = torch.onnx.export(
        _trace(vit, size),
        input_names=[INPUT],
        output_names=names,
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes={INPUT: {0: "batch"}},  # here only the name of the axis
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["posfield"] = description(vit, size, provenance)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Outputs:
        return dict(zip(names, map(torch.from_numpy, session.run(names, {INPUT: image.numpy()}))))

    return run


def use_onnx(vit: ViT, size: Size, path: str) -> Usage:
    """How to use it."""
    code = f"""import onnxruntime

session = onnxruntime.InferenceSession({path!r}, providers=["CPUExecutionProvider"])
cls, feature_map = session.run(["cls", "feature_map"], {{"image": image.numpy()}})  # [B, D], [B, D, h, w]"""
    return Usage("onnx", code, (f"ONNX, opset {OPSET}, at this image size; it takes any batch.",))


def _trace(vit: ViT, size: Size) -> torch.export.ExportedProgram:
    """The graph at one size, for any batch size."""
    example = vit.patch_embed.proj.weight.new_zeros(2, 3, *size)  # torch specializes a batch of 1
    shapes = {INPUT: {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(
            FixedSizeViT(vit, size), (example,), dynamic_shapes=shapes, strict=False
        )
    program.example_inputs = None  # else two images would be saved with it
    return program
