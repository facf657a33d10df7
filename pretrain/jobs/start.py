"""What a fine-tuning was started with, in its folder, so that the folder alone is enough to go on."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.files import read_mapping, write_json

FILE = "start.json"


def leave(folder: Path, arguments: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Write the arguments of a fine-tuning, and the fields of its protocol, as plain values; paths are absolute."""
    write_json(folder / FILE, {**arguments, "fields": dict(fields)})


def started(folder: Path, needed: Collection[str]) -> dict[str, Any]:
    """The arguments, with the fields among them.

    Args:
        needed: names that must be there.

    Raises:
        UserError: the folder does not say it, or says it no more.
    """
    if not (folder / FILE).is_file():
        told = f"does not say what its run was started with (no {FILE})"
        raise UserError(f"output: {folder} {told}; give --data and the rest")
    said = read_mapping(folder / FILE, "output")
    fields = said.pop("fields", None)
    if not isinstance(fields, dict) or not set(needed) <= said.keys():
        raise UserError(f"output: {folder / FILE} is damaged; give --data and the rest")
    return {**said, **fields}
