"""Read any supported file of weights: find its source, and give its tensors under our names.

Nothing in a file is executed. Nothing is dropped silently: a tensor that is missing, left over or of another
shape is an error that names it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.results.provenance import file_hash
from pretrain.weights.common import Checkpoint, Match, Misfit, Source
from pretrain.weights.container import Container, is_state, open_container
from pretrain.weights.limits import MAX_LABEL, MAX_SIDE, UNSTORED
from pretrain.weights.sources import SOURCES, unsupported

TOLD = {"method": str, "effective_epochs": int | float, "weights_hash": str}  # what tables and cards repeat
# pre-training and position probes read them; dropped elsewhere
TRAINING_ONLY = ("mask_token", "pos_mask_token")


def read_checkpoint(path: str | Path, source: str | None = None, subnet: str | None = None) -> Checkpoint:
    """Read ``path`` on the CPU.

    Args:
        path: a file, or a folder as Hugging Face's ``save_pretrained`` leaves it.
        source: a name of :data:`pretrain.weights.sources.SOURCES`; None: the file tells it.
        subnet: ``teacher`` | ``student``, if the file holds both; None: the one that its method evaluates.

    Raises:
        UserError: the file is missing, unreadable, of no supported layout or of an architecture that is not a
            plain ViT, or its numbers are no weights (integers, NaN, infinity).
    """
    if subnet not in (None, "teacher", "student"):
        raise UserError(f"weights: subnet {subnet!r} is neither teacher nor student")
    file = open_container(path)
    checkpoint = converted(file, source, subnet)
    provenance = {**checkpoint.provenance, **_exported(file)}
    for key, kind in TOLD.items():
        value = provenance.get(key)
        is_line = not isinstance(value, str) or (value.isprintable() and len(value) <= MAX_LABEL)
        if not isinstance(value, kind | None) or value != value or not is_line:
            raise UserError(f"weights: {file.path} has damaged metadata ({key} {value!r:.60})")
    return replace(checkpoint, state=sound(checkpoint), provenance=provenance)


def converted(file: Container, source: str | None = None, subnet: str | None = None) -> Checkpoint:
    """An opened file under our names, as it is.

    Raises:
        UserError: no source takes it; names the file and the source.
    """
    found = find_source(file, source)
    try:
        checkpoint = found.convert(file, subnet)
    except Misfit as error:
        raise UserError(f"weights: {file.path}, read as {found.name}: {error}") from error
    # a file of ours says itself whose it is
    named = {"source": found.name} | ({"method": found.method} if found.name != "posfield" else {})
    return replace(checkpoint, provenance={**named, **checkpoint.provenance})


def _exported(file: Container) -> dict[str, Any]:
    """What an export of ours (:mod:`pretrain.export`) says about its weights; their layout may be that of
    another source."""
    try:
        told = json.loads(file.metadata.get("posfield", "{}"))["provenance"]
        return {
            key: value
            for key, value in told.items()
            if key != "source" and isinstance(value, str | int | float)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def origin_of(weights: str | Path | None, source: str | None = None) -> dict[str, Any]:
    """What a ``result.json`` says of the weights that a run starts from: ``method``, ``effective_epochs``,
    ``weights_hash``.

    Args:
        weights: a checkpoint; none: random initialization.

    Raises:
        UserError: as :func:`read_checkpoint`.
    """
    if weights is None:
        return {"method": "from scratch", "effective_epochs": None, "weights_hash": None}
    said = read_checkpoint(weights, source).provenance
    return {
        "method": str(said.get("method", Path(weights).stem)),
        "effective_epochs": said.get("effective_epochs"),
        "weights_hash": file_hash(weights),
    }


def source_names() -> list[str]:
    """The names that ``source=`` takes, of the sources that can be read."""
    return [source.name for source in SOURCES if source not in unsupported.SOURCES]


def find_source(file: Container, name: str | None = None) -> Source:
    """The source of this name, else the best match of the file; of equal matches the first.

    Raises:
        UserError: there is no source of this name; the file fits no source.
    """
    if name is not None:
        for source in SOURCES:
            if source.name == name:
                return source
        raise UserError(f"weights: source {name!r} is none of {', '.join(source_names())}")
    evidence = [source.match(file) for source in SOURCES]
    best = max(evidence)
    if best == Match.NONE:
        names = ", ".join(source_names())
        raise UserError(
            f"weights: {file.path} is of no supported layout; it holds {_shown(file) or 'nothing'}; source= takes {names}"
        )
    return SOURCES[evidence.index(best)]


def _shown(file: Container, n: int = 6) -> str:
    """The first names in a file; for a dictionary of tensors, also the first names in it."""

    def told() -> Iterator[str]:
        for key, value in file.tree.items():
            inner = f": {{{', '.join(map(str, islice(value, 3)))}, ...}}" if is_state(value) else ""
            yield f"{str(key)[:60]!r}{inner[:200]}".replace("\n", " ")

    return ", ".join(islice(told(), n)) + (f" and {len(file.tree) - n} more" if len(file.tree) > n else "")


def backbone_name(
    name: str | None, weights: str | Path | Checkpoint | None, source: str | None = None
) -> str:
    """The registry name that the user gave, else the one that the file (read already or not) or its shapes
    tell.

    Raises:
        UserError: there is neither.
    """
    if name is not None:
        return name
    if weights is None:
        raise UserError("backbone: a name is needed, or weights that say it")
    found = weights if isinstance(weights, Checkpoint) else read_checkpoint(weights, source)
    if found.backbone is None:
        raise UserError(f"backbone: {found.path} is of no registered size; give the name of a backbone")
    return found.backbone


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the tensors into the model. Mask tokens that only one side has are dropped from the file or stay
    fresh in the model.

    Raises:
        UserError: names each tensor that is missing, left over or of another shape.
    """
    wanted = model.state_dict()
    given = {k: v for k, v in checkpoint.state.items() if k in wanted or k not in TRAINING_ONLY}
    if not checkpoint.model_kwargs.get("mask_tokens"):
        given |= {key: wanted[key] for key in TRAINING_ONLY if key in wanted and key not in given}
    check_fit(f"weights: {checkpoint.path} does not fit the backbone", wanted, given)
    model.load_state_dict(dict(given))


def check_fit(told: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Whether tensors of a file are those of a model.

    Args:
        told: an error's beginning.

    Raises:
        UserError: names each tensor that is missing, left over or of another shape.
    """
    problems = [f"missing {key}" for key in wanted if key not in given]
    problems += [f"left over {key}" for key in given if key not in wanted]
    problems += [
        f"{key} is {tuple(given[key].shape)} in the file and {tuple(wanted[key].shape)} in the model"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"{told}: {shown}")


def sound(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's tensors in float32.

    Raises:
        UserError: names a tensor that holds integers, NaN or infinity; the arguments build a network larger
            than the file.
    """
    state = {}
    for key, value in checkpoint.state.items():
        if not value.is_floating_point():
            raise UserError(
                f"weights: {checkpoint.path}: {key} holds {str(value.dtype).removeprefix('torch.')}, no weights"
            )
        state[key] = value.to(torch.float32)
        if value.numel() and not all(bound.isfinite() for bound in torch.aminmax(state[key].detach())):
            raise UserError(f"weights: {checkpoint.path}: {key} holds NaN or infinity")
    _check_flags(checkpoint, sum(value.numel() for value in state.values()))
    return state


def _check_flags(checkpoint: Checkpoint, n_stored: int) -> None:
    """The arguments come from the file's metadata or keys: without a bound they could build a network of any
    size."""
    model_kwargs = checkpoint.model_kwargs
    if not isinstance(model_kwargs, Mapping):
        raise UserError(f"weights: {checkpoint.path}: its flags are no dictionary")
    sides = {
        key: model_kwargs.get(key, 0)
        for key in ("embed_dim", "depth", "num_heads", "patch_size", "n_registers", "pos_grid")
    }
    for key, value in sides.items():
        needed = key not in ("n_registers", "pos_grid")
        if type(value) is not int or not needed <= value <= MAX_SIDE:
            raise UserError(f"weights: {checkpoint.path}: {key} of {value!r:.60} is no size of a network")
    width, ratio = sides["embed_dim"], model_kwargs.get("mlp_ratio", 4.0)
    if width % sides["num_heads"]:
        raise UserError(
            f"weights: {checkpoint.path}: {width} channels cannot be split over {sides['num_heads']} heads"
        )
    if not isinstance(ratio, int | float) or not 0 < ratio <= MAX_SIDE:
        raise UserError(f"weights: {checkpoint.path}: mlp_ratio of {ratio!r:.60} is no size of a network")
    eps = model_kwargs.get("ln_eps", 1e-6)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise UserError(f"weights: {checkpoint.path}: ln_eps of {eps!r:.60} is none of a norm")
    n_wanted = width * (sides["depth"] * (4 + 2 * ratio) * width + 3 * sides["patch_size"] ** 2)
    n_wanted += width * (sides["n_registers"] + sides["pos_grid"] ** 2)
    if n_wanted > 2 * n_stored + UNSTORED:
        raise UserError(
            f"weights: {checkpoint.path} holds {n_stored} numbers, its flags build a network of {n_wanted:.2g}"
        )
