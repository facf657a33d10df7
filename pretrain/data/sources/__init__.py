"""Where images come from: folders, lists, COCO, tar shards, parquet files and Hugging Face folders.

A source gives random access by index, in the same order on every machine. It goes to workers by pickle or
fork and opens its files in each process.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from pretrain.data.broken import SHARE
from pretrain.data.digest import Digest
from pretrain.data.sources.files import (
    FileSource,
    folder_source,
    is_folder,
    is_image,
    is_pattern,
    list_source,
)
from pretrain.data.sources.tar import TarSource
from pretrain.errors import UserError
from pretrain.settings import Settings, setting

__all__ = ["DataSettings", "FileSource", "Source", "folder_source", "kind_of", "list_source", "open_source"]

# TarSource says that a packed one must be unpacked
ENDS = {"list": r"\.(txt|lst)$", "parquet": r"\.parquet$", "tar": r"\.(tar(\.\w+)?|tgz)$"}
COCO_SPLIT = re.compile(r"(train|val|test|unlabeled)20\d\d")


class DataSettings(Settings):
    """Which images a run reads, and how they become views."""

    in_recipe = False

    root: str = setting(
        "", "folder, list file, tar shards, parquet files or Hugging Face folder; required", fixed=False
    )
    source: str = setting(
        "auto",
        "kind of root: folder | list | coco | tar | parquet | huggingface | one of your own; auto: told from it",
    )
    split: str = setting("", "sub-folder (coco: train2017) or split of root; all of it without")
    image_column: str = setting("", "parquet, huggingface: column of the images; found by itself without")
    workers: int = setting(
        4,
        "decoding processes a rank; the order of the images does not depend on it",
        fixed=False,
        ge=0,
        le=1024,
    )
    path: Literal["auto", "cpu", "device"] = setting(
        "auto",
        "views are made: cpu (in the workers) | device (batched, beside the step) | auto (device on CUDA)",
    )
    max_side_px: int = setting(
        0,
        "longer images are scaled down to this side after decoding; 0: never (device path: 512)",
        ge=0,
        le=65536,
    )
    max_mpx: float = setting(
        200.0, "an image of more megapixels counts as broken (decompression bombs)", ge=1e-6
    )
    broken_share: float = setting(
        SHARE, "the run stops when more than this share of the images read is broken", fixed=False, ge=0, le=1
    )


class Source(Protocol):
    """Encoded images by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of the image in messages."""

    def read(self, index: int) -> bytes:
        """The encoded image, as in its file; raises :class:`pretrain.data.decode.BrokenImage`."""

    def digest(self) -> Digest:
        """What tells these images from others; reads none."""


# {data.source: what opens it}, of one's own; a module that POSFIELD_IMPORT names adds to it
OWN: dict[str, Callable[[DataSettings], Source]] = {}
SHIPPED = ("folder", "list", "coco", "tar", "parquet", "huggingface")


def open_source(data: DataSettings) -> Source:
    """The source that the settings ``data`` describe by ``root``, ``source``, ``split`` and ``image_column``.

    Raises:
        UserError: there is nothing to read; names the key or the file.
    """
    root, split, column = os.path.expanduser(data.root), data.split, data.image_column
    if not root:
        raise UserError("data.root: no images are given; set data.root=FOLDER")
    kind = kind_of(root, split) if data.source == "auto" else data.source
    if kind in OWN:
        return OWN[kind](data)
    if kind not in SHIPPED:
        raise UserError(f"data.source={kind} is none of auto, {', '.join([*SHIPPED, *OWN])}")
    if column and kind not in ("parquet", "huggingface"):
        raise UserError(f"data.image_column={column}: there are no columns in {root} (data.source={kind})")
    if kind == "list":
        if split:
            raise UserError(f"data.split={split}: a list has no splits ({root})")
        return list_source(root)
    if kind == "coco" and not split and os.path.isdir(root):
        # never all: the run would silently train on the validation images
        told = f"{root} ({', '.join(coco_splits(Path(root))) or 'none like train2017'})"
        raise UserError(f"data.split: which of COCO's image folders in {told}? Several are joined with +")
    if kind in ("folder", "coco"):
        return folder_source(root, split.split("+") if kind == "coco" else [split])
    if kind == "tar":
        return TarSource(root, split)
    try:
        from pretrain.data.sources.tables import HuggingFaceSource, ParquetSource

        return (ParquetSource if kind == "parquet" else HuggingFaceSource)(root, split, column)
    except ImportError as error:
        needs = "parquet needs pyarrow" if kind == "parquet" else "Hugging Face data need datasets"
        raise UserError(f"data.root: {needs} ({error}): pip install {needs.split()[-1]}") from error


def kind_of(root: str, split: str = "") -> str:
    """The kind of source of a path, for ``data.source=auto``.

    The suffix tells the kind of a file or pattern: a list for .txt and .lst, .parquet, or tar shards. A
    folder with state.json or dataset_dict.json is Hugging Face's; one with annotations/ beside folders like
    train2017 is COCO's. A folder (or its sub-folder ``split``) with tar shards or parquet files, and neither
    images nor folders, holds these; any other folder holds images.

    Raises:
        UserError: the kind of the file is unknown.
    """
    path = Path(root)
    if path.is_file() or not path.is_dir() and is_pattern(root):
        if kind := next((kind for kind, end in ENDS.items() if re.search(end, path.name.lower())), None):
            return kind
        told = "is neither a folder nor a .txt, .lst, .tar or .parquet file; or set data.source"
        raise UserError(f"data.root: {path} {told}")
    if not path.is_dir():
        raise UserError(f"data.root: no file or folder {root}")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "huggingface"
    if coco_splits(path) and (path / "annotations").is_dir():
        return "coco"
    kind = "folder"
    with os.scandir(path / split if (path / split).is_dir() else path) as entries:
        for entry in entries:
            if is_image(os.fsencode(entry.name)) or is_folder(entry) and not entry.name.startswith("."):
                return "folder"  # the first tells, out of millions
            if entry.name.endswith((".tar", ".parquet")):
                kind = entry.name.rpartition(".")[2]
    return kind


def coco_splits(root: Path) -> list[str]:
    """The image folders of COCO in ``root``: train2017 and so on."""
    return sorted(name for name in os.listdir(root) if COCO_SPLIT.fullmatch(name) and (root / name).is_dir())
