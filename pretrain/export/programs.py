"""A backbone as a file that needs none of our code: a program of ``torch.export``, or ONNX.

Each format is one function ``(vit, size, path) -> Run`` in :data:`FORMATS`: it writes the file, reads it again and gives back a
function that runs what was read, so that :func:`export` can hold any format against the network itself.
"""

import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.backbones.vit import ViT
from pretrain.errors import UserError
from pretrain.views.pixels import MEAN, STD

Outputs = dict[str, Tensor]
Run = Callable[[Tensor], Outputs]

INPUT = "image"  # [B, 3, H, W], normalised as in training
TOLERANCE = 1e-4  # of the largest value of an output
CHECKED_BATCHES = (1, 3)  # neither is the batch of the example that is traced
OPSET = 18  # the oldest that torch's exporter writes directly


class FixedSizeViT(nn.Module):
    """A ViT at one image size: positions, [CLS] and registers are constants of it, and nothing is resampled when it runs.

    Args:
        vit: the network; its weights are shared.
        size: height, width in pixels; bottom and right are padded to whole patches inside, as the ViT does.
    """

    prefix: Tensor  # [1, S, D]
    position: Tensor  # [1, N, D]

    def __init__(self, vit: ViT, size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_embed, self.blocks, self.norm, self.split = vit.patch_embed, vit.blocks, vit.norm, vit.split
        with torch.no_grad():
            tokens, self.grid = vit.embed(_blank(vit, 1, size))
            self.register_buffer("prefix", tokens[:, : vit.n_prefix].clone())
            self.register_buffer("position", vit.positions(self.grid).clone())
        self.eval()

    def forward(self, image: Tensor) -> Outputs:
        """[B, 3, H, W] -> after the final norm: ``feature_map`` [B, D, h, w], ``cls`` [B, D], ``registers`` [B, R, D] if any."""
        content = self.patch_embed(image).flatten(2).transpose(1, 2)  # [B, N, D]
        tokens = torch.cat([self.prefix.expand(image.shape[0], -1, -1), content + self.position], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        cls, registers, patches = self.split(self.norm(tokens))
        outputs = {"feature_map": patches.transpose(1, 2).unflatten(2, self.grid), "cls": cls}
        return {**outputs, "registers": registers} if registers.shape[1] else outputs


def export(vit: ViT, format: str, size: tuple[int, int], path: str | Path) -> float:
    """Write a backbone in a format and hold what was written against it.

    Args:
        vit: on the CPU, in float32; goes into evaluation mode.
        format: a key of :data:`FORMATS`.
        size: height, width in pixels of the images that the file will take; any number at a time.
        path: the file, replaced in one step.

    Returns:
        the largest difference between an output of the file and of ``vit`` on noise, as a share of the output's largest value.

    Raises:
        UserError: a format that does not exist, a size without a pixel, another suffix, a missing package.
        RuntimeError: the file does not do what the network does.
    """
    if format not in FORMATS:
        raise UserError(f"format: {format!r} is none of {', '.join(FORMATS)}")
    suffix, write = FORMATS[format]
    path = Path(path)
    if path.suffix != suffix:
        raise UserError(f"output: a file of format {format} ends in {suffix}, {path} does not")
    if min(size) < 1:
        raise UserError(f"size: {size[0]} x {size[1]} px is no image")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{path.name}")
    vit.eval()
    try:
        difference = largest_difference(vit, write(vit, size, temporary), size)
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{path}: outputs differ by {difference:.2g} of the backbone's, more than {TOLERANCE:.0e}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


@torch.no_grad()
def largest_difference(vit: ViT, run: Run, size: tuple[int, int]) -> float:
    """Over all outputs, batches of :data:`CHECKED_BATCHES` images of noise, and elements; in terms of an output's largest value,
    as rounding is: a norm's weights may be far from 1."""
    generator, differences = torch.Generator().manual_seed(0), []
    grid = tuple(math.ceil(side / vit.patch_size) for side in size)
    for batch in CHECKED_BATCHES:
        image = torch.randn(batch, 3, *size, generator=generator)
        outputs, (cls, registers, patches) = run(image), vit(image)
        expected = {"feature_map": patches.transpose(1, 2).unflatten(2, grid), "cls": cls, "registers": registers}
        differences += [(output - expected[name]).abs().max() / expected[name].abs().max() for name, output in outputs.items()]
    return float(torch.stack(differences).max())


def export_program(vit: ViT, size: tuple[int, int], path: Path) -> Run:
    """``torch.export`` (.pt2): ``torch.export.load(path).module()(image)`` gives a dictionary of outputs."""
    torch.export.save(_trace(vit, size), path, extra_files={"posfield.json": _description(vit, size)})
    return torch.export.load(path).module()


def export_onnx(vit: ViT, size: tuple[int, int], path: Path) -> Run:
    """ONNX: one file with its weights inside; the outputs bear the names of :meth:`FixedSizeViT.forward`'s.

    Raises:
        UserError: ``onnx``, ``onnxscript`` or ``onnxruntime`` is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"format onnx needs {', '.join(missing)}: pip install 'posfield[export]'")
    import onnxruntime

    names, batch = _names(vit), {INPUT: {0: "batch"}}  # here only the name of the axis
    program = torch.onnx.export(
        _trace(vit, size),
        input_names=[INPUT],
        output_names=names,
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=batch,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["posfield"] = _description(vit, size)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Outputs:
        return dict(zip(names, map(torch.from_numpy, session.run(names, {INPUT: image.numpy()}))))

    return run


def _trace(vit: ViT, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """The graph at one size, for any batch."""
    example = _blank(vit, 2, size)  # torch specialises a batch of 1
    shapes = {INPUT: {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(FixedSizeViT(vit, size), (example,), dynamic_shapes=shapes, strict=False)
    program.example_inputs = None  # else two images are saved with it
    return program


def _blank(vit: ViT, n: int, size: tuple[int, int]) -> Tensor:
    return vit.patch_embed.proj.weight.new_zeros(n, 3, *size)


def _names(vit: ViT) -> list[str]:
    return ["feature_map", "cls", "registers"] if vit.n_registers else ["feature_map", "cls"]


def _description(vit: ViT, size: tuple[int, int]) -> str:
    """What a user of the file must know, as JSON: it travels inside."""
    told = {"image_size_px": size, "pixel_mean": MEAN, "pixel_std": STD, "channels": "RGB, 0 to 1", "backbone": vit.flags}
    return json.dumps(told, sort_keys=True)


FORMATS: Mapping[str, tuple[str, Callable[[ViT, tuple[int, int], Path], Run]]] = {
    "torch": (".pt2", export_program),
    "onnx": (".onnx", export_onnx),
}
