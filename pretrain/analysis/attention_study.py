"""The attention of checkpoints over the same images: which, what is measured of each, and what is kept of it.

One checkpoint is in memory at a time. Its numbers lie in a folder of its own, ``statistics.csv`` and ``result.json``, the latter
written last: a study that was interrupted goes on after the last checkpoint that is complete.
"""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from pretrain.analysis.attention import query_attention
from pretrain.analysis.attention_statistics import BLOCK, attention_statistics
from pretrain.analysis.attention_tables import Measured, metrics_of, read_statistics, write_statistics
from pretrain.backbones.vit import ViT
from pretrain.data.decode import BrokenImage, decode
from pretrain.data.sources import open_source
from pretrain.errors import Interrupted, UserError
from pretrain.results import Protocol, Result, provenance, read_result, write_result
from pretrain.results.schema import FILE_NAME
from pretrain.views.pixels import crop_resize, normalise
from pretrain.weights import backbone_name, read_checkpoint

PROTOCOL = {"size_px": 480, "patch_px": 16, "images": 100, "crop": False, "bf16": False}  # appendix A; number of images: ours
STATISTICS = "statistics.csv"
SAY_EVERY_S = 10


@dataclass(frozen=True)
class Pictures:
    """The images of a study, all in memory: 0.7 MB each at 480 px.

    Attributes:
        names: n names.
        pixels: uint8 [n, 3, S, S].
        broken: images that could not be read, with the reason.
    """

    names: list[str]
    pixels: Tensor
    broken: list[str]


def read_pictures(data: DictConfig, max_images: int, size_px: int, crop: bool) -> Pictures:
    """At most ``max_images`` images of ``data.root``, at equal steps from the first, squeezed to squares or their central squares.

    Raises:
        UserError: a bad source (by its own key), or no image that can be read.
    """
    source = open_source(data)
    n = min(len(source), max_images)
    names, pixels, broken = [], [], []
    for index in (i * len(source) // n for i in range(n)):
        try:
            image = decode(source.read(index), max_mpx=data.max_mpx)
        except BrokenImage as error:
            broken.append(f"{source.name(index)}: {error}")
            continue
        height, width = image.shape[:2]
        top, left = ((height - min(height, width)) // 2, (width - min(height, width)) // 2) if crop else (0, 0)
        square = crop_resize(image, (left, top, width - left, height - top), False, size_px)
        names.append(source.name(index))
        pixels.append(torch.from_numpy(square).permute(2, 0, 1))
    if not names:
        raise UserError(f"none of the {n} images of {data.root} can be read; the first: {broken[0]}")
    return Pictures(names, torch.stack(pixels), broken)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to be studied, its file already looked at.

    Attributes:
        flags: arguments of ``build_backbone`` beside name and weights.
        method, effective_epochs: as the file says.
    """

    name: str
    path: Path
    backbone: str
    patch_px: int
    flags: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    effective_epochs: float | None = None


def names_of(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The names given, else those of the files; a file ``backbone.*``, and a run's folder, has that of the folder.

    Raises:
        UserError: not as many names as paths.
    """
    if names and len(names) != len(paths):
        raise UserError(f"--names: {len(names)} names for {len(paths)} weights")
    own = [
        path.absolute().name if path.is_dir() else path.absolute().parent.name if path.stem == "backbone" else path.stem
        for path in paths
    ]
    return [_printable(name) for name in names or own]


def mask_runs(box: Path, cross: Path) -> list[Path]:
    """The two runs of Fig. 7, files or folders of weights; where a folder says how it was trained, it must be so.

    Raises:
        UserError: a run with the other masks.
    """
    for path, wanted in ((box, "box"), (cross, "cross")):
        if (path / "config.yaml").is_file():
            shape = OmegaConf.select(OmegaConf.load(path / "config.yaml"), "masks.position_shape")
            if shape != wanted:
                raise UserError(f"--compare-masks: {path} has masks.position_shape={shape}, not {wanted}")
    return [box, cross]


def candidates(
    paths: Sequence[Path], names: Sequence[str], source: str | None, patch_px: int | None, size_px: int
) -> list[Candidate]:
    """Look at every file before the first is measured.

    Args:
        paths: files or folders of weights; the folder of a pre-training run stands for its ``backbone.safetensors``.
        names: of as many.
        source, patch_px: those of ``build_backbone``, for all files.

    Raises:
        UserError: a file that cannot be read or of no known size; a name that is empty or not unique; a ``size_px`` that is no
            multiple of a checkpoint's patches.
    """
    for name in names:
        if not name.strip() or names.count(name) > 1:
            raise UserError(f"--names: {name!r} names {names.count(name)} weights; give each a name of its own")
    paths = [path / "backbone.safetensors" if (path / "backbone.safetensors").is_file() else path for path in paths]
    found = []
    for name, path in zip(names, paths):
        checkpoint = read_checkpoint(path, source)
        side = patch_px or int(checkpoint.flags["patch_size"])
        if size_px % side:
            near = " or ".join(str(side * n) for n in (size_px // side, size_px // side + 1) if n)
            raise UserError(f"--size {size_px}: {path} has patches of {side} px; take {near} px, or --patch-size for all")
        said = checkpoint.provenance
        flags = {key: value for key, value in (("source", source), ("patch_size", patch_px)) if value is not None}
        backbone = checkpoint.backbone or backbone_name(None, path, source)
        found.append(Candidate(name, path, backbone, side, flags, str(said.get("method", name)), said.get("effective_epochs")))
    return found


def _printable(name: str) -> str:
    """Control characters, and bytes of a file's name that are no UTF-8, as ``\\x..``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def folder_name(name: str) -> str:
    """A folder's name for any checkpoint's name, another one for each."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip(".")[:60]
    return safe if safe and safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Study:
    """What all checkpoints of a study share.

    Attributes:
        crop: central squares; else the images are squeezed.
        stopped: whether the run was asked to stop, looked at after every batch.
        autocast: context of the forward passes, entered anew for each.
    """

    pictures: Pictures
    crop: bool
    bf16: bool
    device: torch.device
    autocast: AbstractContextManager[Any]
    batch: int = 1
    block: int = BLOCK
    say: Callable[[str], None] = print
    stopped: Callable[[], bool] = lambda: False

    def measure(self, candidate: Candidate, backbone: ViT, folder: Path) -> Measured:
        """The statistics of a checkpoint, from its folder where they are there for the same file, images and settings.

        Raises:
            Interrupted: asked to stop; what was measured of this checkpoint is lost.
        """
        settings = {
            "size_px": self.pictures.pixels.shape[-1],
            "patch_px": candidate.patch_px,
            "images": self.pictures.names,
            "crop": self.crop,
            "bf16": self.bf16,
            **candidate.flags,
        }
        origin = provenance(settings, candidate.path if candidate.path.is_file() else None)
        if (folder / FILE_NAME).is_file() and (folder / STATISTICS).is_file():
            before = read_result(folder)
            same = (before.config_hash, before.weights_hash) == (origin["config_hash"], origin["weights_hash"])
            if same and origin["weights_hash"]:  # none: a folder of weights, of which nothing is known
                self.say(f"{candidate.name}: measured before")
                return read_statistics(folder / STATISTICS, candidate.name)
        started = time.time()
        measured = self._measure(candidate.name, backbone)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).unlink(missing_ok=True)  # it speaks for statistics that are about to be replaced
        write_statistics(folder / STATISTICS, [measured], self.pictures.names)
        run = {key: settings[key] for key in PROTOCOL} | {"images": min(len(self.pictures.names), PROTOCOL["images"])}
        changed = {key: [PROTOCOL[key], value] for key, value in run.items() if value != PROTOCOL[key]}
        result = Result(
            kind="analysis",
            method=candidate.method,
            backbone=candidate.backbone,
            effective_epochs=candidate.effective_epochs,
            protocol=Protocol(name="attention", version=1, full=not changed, deviations=changed),
            metrics=metrics_of(measured) | {"images": len(self.pictures.names), "broken_images": len(self.pictures.broken)},
            seed=0,  # nothing is drawn
            wall_time_s=time.time() - started,
            **provenance(settings) | {"weights_hash": origin["weights_hash"]},  # again: the peak memory is that of the end
        )
        write_result(result, folder)
        return measured

    def maps(self, backbone: ViT, images: Tensor, queries: Sequence[tuple[float, float]]) -> Tensor:
        """What query patches attend to, [n, Q, h, w] on the CPU, of uint8 images [n, 3, S, S], one at a time."""
        maps = []
        for image in images.split(1):
            with self.autocast:
                maps.append(query_attention(backbone, normalise(image.to(self.device)), queries).cpu())
        return torch.cat(maps)

    def _measure(self, name: str, backbone: ViT) -> Measured:
        pixels, parts = self.pictures.pixels, []
        started = said = time.time()
        for start in range(0, len(pixels), self.batch):
            x = normalise(pixels[start : start + self.batch].to(self.device))
            with self.autocast:
                parts.append(attention_statistics(backbone, x, self.block))
            done, now = min(start + self.batch, len(pixels)), time.time()
            if now - said > SAY_EVERY_S or done == len(pixels):
                self.say(f"{name}: {done} of {len(pixels)} images, {(now - started) / done:.2f} s each")
                said = now
            if self.stopped():
                raise Interrupted(f"{name} after {done} of {len(pixels)} images; the same command goes on with this checkpoint")
        return Measured(name, *(torch.cat(values).numpy() for values in zip(*parts)))
