"""Open a file of weights without running anything in it: safetensors, torch's or Flax's, or a folder that
holds one.

The first bytes tell the format. The content stays as it is: the sources (:mod:`pretrain.weights.sources`)
interpret it.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import UserError, ensure
from pretrain.files import read_mapping
from pretrain.weights import flax_file, torch_file
from pretrain.weights.limits import (
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_NAME,
    check_regular,
    check_tensors,
    in_one_line,
)

WRAPPERS = ("state_dict", "model")  # keys of a flat state dict, in files that hold nothing else
INDEX = ".index.json"  # of files in several parts
_NAMES = ("model.safetensors", "pytorch_model.bin")
IN_FOLDER = (*(name + end for name in _NAMES for end in ("", INDEX)), "backbone.safetensors")
DESCRIBED = (".safetensors", ".bin", INDEX)  # a config.json beside them is theirs; beside a .pth it is not

# safetensors' names of quantized numbers, and those to take
SMALL, SAVED_AS = ("F4", "F6_", "F8_"), "F32, F16 or BF16"


@dataclass(frozen=True)
class Container:
    """An opened file.

    Attributes:
        path: the file or folder that the user named.
        tree: the content: a flat state dict, or nested dictionaries of state dicts and plain values.
        metadata: of a safetensors file.
        config: ``config.json`` (Hugging Face, timm's hub) beside the weights, or empty.
        preprocessor: ``preprocessor_config.json`` beside the weights, or empty.
    """

    path: Path
    tree: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, *wrappers: str) -> dict[str, Tensor] | None:
        """The flat state dict under the first of these keys that exists, else the one at the top; None if
        there is neither."""
        for key in wrappers:
            if is_state(self.tree.get(key)):
                return dict(self.tree[key])
        return dict(self.tree) if is_state(self.tree) else None

    @property
    def flat(self) -> dict[str, Tensor]:
        """The only state dict of a file, wrapped or not; empty for any other file."""
        return self.tensors(*WRAPPERS) or {}

    @property
    def alone(self) -> dict[str, dict[str, Tensor]]:
        """The same as the one network of a file that gives it no name: {"": ...}; empty for any other file."""
        return {"": self.flat} if self.flat else {}


def is_state(content: Any) -> bool:
    """Whether this is a dictionary of names and tensors that is not empty."""
    is_full = isinstance(content, Mapping) and bool(content)
    return is_full and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


@in_one_line()
def open_container(path: str | Path) -> Container:
    """Open ``path`` on the CPU: a file, or a folder as Hugging Face's ``save_pretrained`` leaves it.

    Raises:
        UserError: the file is missing, unreadable, holds more than plain tensors, or exceeds
            :mod:`pretrain.weights.limits`.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        held = [path / name for name in IN_FOLDER if (path / name).exists()]
        if not held and (path / ".metadata").exists():
            way = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pth"
            raise UserError(
                f"weights: {path} is a distributed checkpoint of torch's; make one file of it: {way}"
            )
        ensure(held, f"weights: folder {path} holds none of {', '.join(IN_FOLDER)}")
        file = held[0]
    n_bytes, metadata = check_regular(file), dict[str, str]()
    tree: Mapping[str, Any]
    if file.name.endswith(INDEX):
        tree, n_bytes = _read_shards(file)
    else:
        tree, metadata = _read(file)
    check_tensors(path, tree, n_bytes)
    if not file.name.endswith(DESCRIBED):
        return Container(path, tree, metadata)
    beside = [_read_json(file.with_name(name)) for name in ("config.json", "preprocessor_config.json")]
    return Container(path, tree, metadata, *beside)


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The content of one file, and its metadata."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"weights: {path} cannot be read ({error.strerror})") from error
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path, head)
    if head.startswith((torch_file.ZIP, torch_file.LEGACY)):
        content = torch_file.read_torch_file(path)
        what = f"a {type(content).__name__}, no dictionary of tensors"
        ensure(isinstance(content, Mapping), f"weights: {path} holds {what}")
        return content, {}
    begins = "it begins neither as safetensors' nor torch's nor Flax's do"
    ensure(head[0] in flax_file.STARTS, f"weights: {path} is no file of weights: {begins}")
    return flax_file.read_flax_file(path), {}


def _read_json(path: Path) -> dict[str, Any]:
    """The dictionary in the file; empty without a file."""
    if not path.exists():
        return {}
    is_small, most = check_regular(path) <= MAX_JSON_BYTES, f"more than {MAX_JSON_BYTES} bytes"
    ensure(is_small, f"weights: {path} has {most}, no description of a network")
    return read_mapping(path, "weights")


def _read_safetensors(path: Path, head: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    unreadable = f"weights: {path} is no readable safetensors file"
    is_small = len(head) < 8 or struct.unpack("<Q", head[:8])[0] <= MAX_HEADER_BYTES
    ensure(is_small, f"{unreadable} (a header of more than {MAX_HEADER_BYTES} bytes)")
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                dtype = file.get_slice(key).get_dtype()
                small = f"{key[:MAX_NAME]} is of the type {dtype}, which means nothing without scales"
                ensure(not dtype.startswith(SMALL), f"weights: {path}: {small}; save it as {SAVED_AS}")
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except UserError:
        raise
    except Exception as error:  # SafetensorError, OSError; for a type that torch does not have, any
        reason = error if isinstance(error, SafetensorError | OSError) else type(error).__name__
        raise UserError(f"{unreadable} ({str(reason)[:200]})") from error


def _is_plain(name: Any) -> bool:
    """Whether this is the name of a file of the same folder."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


def _read_shards(index: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of all parts that an index names in its own folder, and the bytes of the parts."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(map(_is_plain, places.values())):
        raise UserError(f"weights: {index} names no files of its own folder")
    state: dict[str, Tensor] = {}
    n_bytes = 0
    for name in sorted(set(places.values())):
        part = index.with_name(name)
        n_bytes += check_regular(part)
        tensors, _ = _read(part)
        wrong = tensors.keys() ^ {key for key, place in places.items() if place == name}
        said = ", ".join(sorted(map(str, wrong))[:5])
        ensure(not wrong, f"weights: {part} is not the part that {index.name} describes: {said}")
        state |= tensors
    return state, n_bytes
