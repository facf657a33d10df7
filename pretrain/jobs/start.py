"""What a fine-tuning was started with, in its folder, so that the folder alone is enough to go on."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.files import read_mapping, write_json

FILE = "start.json"


def leave(run: Any, names: Sequence[str], fields: Mapping[str, Any], **more: Any) -> None:
    """Write into a run's folder the arguments of its fine-tuning and the fields of its protocol, as plain values.

    Args:
        run: a DetectionRun or SegmentationRun.
        names: its attributes that are arguments, besides ``data``, ``weights`` (as absolute paths) and ``model_kwargs``.
        fields: of the protocol.
        more: further arguments.
    """
    own = {name: getattr(run, name) for name in names}
    own |= {"data": os.path.abspath(run.data), "weights": run.weights and os.path.abspath(run.weights)}
    write_json(
        run.output / FILE, {**own, "model_kwargs": dict(run.model_kwargs), **more, "fields": dict(fields)}
    )


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


def way_on(output: Path) -> str:
    """What looks at a finished fine-tuning, and what uses it: two commands."""
    page = f"look at it: posfield report {output} --output {output / 'report.html'}"
    return f"{page}; use it: posfield predict --run {output} --images PHOTOS --output FOUND"
