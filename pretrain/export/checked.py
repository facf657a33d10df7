"""Export in any format: write beside the target, read the file back with its library, compare with the
network, then keep it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.backbones.vit import ViT
from pretrain.errors import ensure
from pretrain.export.converted import export_safetensors, use_safetensors
from pretrain.export.fixed_size import TENSORS, Run, Size, Usage, Write, is_export, outputs_of
from pretrain.export.huggingface import export_huggingface, use_huggingface
from pretrain.export.programs import export_onnx, export_program, use_onnx, use_program
from pretrain.export.timm import export_timm, use_timm
from pretrain.export.torchvision import export_torchvision, use_torchvision
from pretrain.files import replacing

TOLERANCE = 1e-4  # relative to the largest value of an output
CHECKED_BATCHES = (1, 3)  # not the batch size of the traced example
OF_LIBRARIES = ("timm", "huggingface", "torchvision", "safetensors")  # whose code has the network
# all that an export ever leaves
FOLDER_FILES = {"config.json", TENSORS, "preprocessor_config.json", "README.md"}


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        suffix: of its file; empty if the format is a folder.
        write: writes it, reads it back and returns a function that runs it.
        use: (vit, size, path) -> how to load it.
    """

    suffix: str
    write: Write
    use: Callable[[ViT, Size, str], Usage]


FORMATS: Mapping[str, Format] = {
    "torch": Format(".pt2", export_program, use_program),
    "onnx": Format(".onnx", export_onnx, use_onnx),
    "timm": Format("", export_timm, use_timm),
    "huggingface": Format("", export_huggingface, use_huggingface),
    "torchvision": Format(".safetensors", export_torchvision, use_torchvision),
    "safetensors": Format(".safetensors", export_safetensors, use_safetensors),
}


def export(
    vit: ViT,
    format: str,
    size: Size,
    path: str | Path,
    provenance: Mapping[str, Any] | None = None,
    card: Callable[[float], str] | None = None,
) -> float:
    """Write a backbone in a format, and compare the written file with the backbone.

    Args:
        vit: on the CPU, in float32; it is set to evaluation mode.
        format: a key of :data:`FORMATS`.
        size: height, width in pixels of the images that the file will take, in batches of any size.
        path: the file or folder; it is replaced atomically.
        provenance: JSON values that the file will contain: method, effective epochs, ...
        card: the difference -> the text of ``README.md``, if the format is a folder.

    Returns:
        the largest difference between outputs of the file and of ``vit`` on noise, relative to the output's
        largest value.

    Raises:
        UserError: an unknown format, a size without a pixel, a wrong suffix, a missing package, a folder with
            other files in it; names what the format cannot express.
        RuntimeError: the file computes something else than the network.
    """
    path = Path(path)
    written = _checked_target(format, size, path)
    told = (
        f"format: {format} has no {type(vit).__name__}, but the plain ViT alone; take torch, onnx or posfield"
    )
    ensure(type(vit) is ViT or format not in OF_LIBRARIES, told)
    vit.eval()
    # A program's bytes hold the name that it is written under
    with replacing(path, path.with_name(f".partial-{path.name}")) as partial:
        difference = largest_difference(vit, written.write(vit, size, partial, provenance or {}), size)
        if not difference <= TOLERANCE:
            more = f"{difference:.2g} of the backbone's, more than {TOLERANCE:.0e}"
            raise RuntimeError(f"{path}: outputs differ by {more}")
        if card is not None and not written.suffix:
            (partial / "README.md").write_text(card(difference), encoding="utf-8")
    return difference


@torch.no_grad()
def largest_difference(vit: ViT, run: Run, size: Size) -> float:
    """The largest difference over all outputs and elements, for batches of :data:`CHECKED_BATCHES` images of
    noise.

    It is relative to an output's largest value, as rounding errors are: the weights of a norm may be far from
    1.
    """
    generator, differences = torch.Generator().manual_seed(0), []
    for batch in CHECKED_BATCHES:
        image = torch.randn(batch, 3, *size, generator=generator)
        expected = outputs_of(vit(image), vit.grid_of(size))
        for name, output in run(image).items():
            differences.append((output - expected[name]).abs().max() / expected[name].abs().max())
    return float(torch.stack(differences).max())


def _checked_target(format: str, size: Size, path: Path) -> Format:
    """The format, if it can be written there."""
    ensure(format in FORMATS, f"format: {format!r} is none of {', '.join(FORMATS)}")
    ensure(path.name, f"output: {path} is where you are; name a file or folder in it")
    ensure(min(size) >= 1, f"size: {size[0]} x {size[1]} px is no image")
    wanted = FORMATS[format]
    if suffix := wanted.suffix:
        ensure(path.suffix == suffix, f"output: a file of format {format} ends in {suffix}, {path} does not")
        ensure(not path.is_dir(), f"output: format {format} is a file, and {path} is a folder")
    elif path.exists():
        ensure(path.is_dir(), f"output: format {format} is a folder, and {path} is a file")
        held = sorted(file.name for file in path.iterdir())
        others = [name for name in held if name not in FOLDER_FILES or not is_export(path / TENSORS)]
        ensure(
            not others,
            f"output: {path} holds {''.join(others[:1])}, which no export left: it is not replaced",
        )
    return wanted
