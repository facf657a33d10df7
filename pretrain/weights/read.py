"""Read any supported file of weights: find its source, and give its tensors under our names.

Nothing in a file is executed. Nothing is dropped silently: a tensor that is missing, left over or of another
shape is an error that names it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import UserError, ensure
from pretrain.results.provenance import file_hash
from pretrain.weights.common import Checkpoint, Match, Misfit, Source
from pretrain.weights.container import Container, is_state, open_container
from pretrain.weights.limits import MAX_LABEL, MAX_SIDE, UNSTORED, in_one_line
from pretrain.weights.sources import SOURCES, unsupported

TOLD = {
    "method": str,
    "effective_epochs": int | float,
    "weights_hash": str,
    "license": str,
}  # what tables and cards repeat
# of the flags in a file that are no sizes
KINDS: dict[str, tuple[Any, str]] = dict.fromkeys(("layerscale", "drop_path"), (int | float, "no number"))
KINDS |= dict.fromkeys(
    ("has_cls", "final_norm", "mask_tokens", "relative_positions", "swiglu", "cls_norm", "local_cls_norm"),
    (bool, "neither true nor false"),
)
KINDS |= dict.fromkeys(
    ("pos_encoding", "pos_interpolation", "attention", "gelu", "qkv_bias"), (str, "no name")
)
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
    is_known = subnet in (None, "teacher", "student")
    ensure(is_known, f"weights: subnet {subnet!r} is neither teacher nor student")
    file = open_container(path)
    checkpoint = converted(file, source, subnet)
    provenance = {**checkpoint.provenance, **_exported(file)}
    for key, kind in TOLD.items():
        value = provenance.get(key)
        is_line = not isinstance(value, str) or (value.isprintable() and len(value) <= MAX_LABEL)
        is_finite = not isinstance(value, int | float) or 0 <= value < math.inf
        is_told = is_line and isinstance(value, kind | None) and is_finite
        ensure(is_told, f"weights: {file.path} has damaged metadata ({key} {value!r:.60})")
    return replace(checkpoint, state=sound(checkpoint), provenance=provenance)


@in_one_line()
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
        told = json.loads(file.metadata.get("posfield", "{}"))["provenance"].items()
        return {key: value for key, value in told if key != "source" and isinstance(value, str | int | float)}
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
    told = {"method": str(said.get("method", Path(weights).stem)), "weights_hash": file_hash(weights)}
    return {**told, "effective_epochs": said.get("effective_epochs")}


def license_of(provenance: Mapping[str, Any]) -> str | None:
    """The licence of weights, or of those that they were trained on from, if a file says one."""
    start = provenance.get("started_from")
    for said in (provenance, start if isinstance(start, Mapping) else {}):
        if isinstance(told := said.get("license"), str) and told:
            return told[:MAX_LABEL]
    return None


def source_names() -> list[str]:
    """The names that ``source=`` takes, of the sources that can be read."""
    return [source.name for source in SOURCES if source not in unsupported.SOURCES]


def find_source(file: Container, name: str | None = None) -> Source:
    """The source of this name, else the best match of the file; of equal matches the first.

    Raises:
        UserError: there is no source of this name; the file fits no source.
    """
    names = ", ".join(source_names())
    if name is not None:
        named = [source for source in SOURCES if source.name == name]
        ensure(named, f"weights: source {name!r} is none of {names}")
        return named[0]
    evidence = [source.match(file) for source in SOURCES]
    if max(evidence) == Match.NONE:
        held = f"it holds {_shown(file) or 'nothing'}; source= takes {names}"
        raise UserError(f"weights: {file.path} is of no supported layout; {held}")
    return SOURCES[evidence.index(max(evidence))]


def _shown(file: Container, n: int = 6) -> str:
    """The first names in a file; for a dictionary of tensors, also the first names in it."""

    told = []
    for key, value in islice(file.tree.items(), n):
        inner = f": {{{', '.join(map(str, islice(value, 3)))}, ...}}" if is_state(value) else ""
        told.append(f"{str(key)[:60]!r}{inner[:200]}".replace("\n", " "))
    return ", ".join(told) + (f" and {len(file.tree) - n} more" if len(file.tree) > n else "")


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
        raise UserError(
            "backbone: a name is needed (--backbone vit_small_patch16), or weights that say it (--weights FILE)"
        )
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
    shapes = {key: (tuple(given[key].shape), tuple(wanted[key].shape)) for key in wanted if key in given}
    problems = [f"missing {key}" for key in wanted if key not in given]
    problems += [f"left over {key}" for key in given if key not in wanted]
    problems += [f"{key} is {a} in the file and {b} in the model" for key, (a, b) in shapes.items() if a != b]
    shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
    ensure(not problems, f"{told}: {shown}")


def sound(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's tensors in float32.

    Raises:
        UserError: names a tensor that holds integers, NaN or infinity; the arguments build a network larger
            than the file.
    """
    state = {}
    for key, value in checkpoint.state.items():
        place, kind = f"weights: {checkpoint.path}: {key}", str(value.dtype).removeprefix("torch.")
        ensure(value.is_floating_point(), f"{place} holds {kind}, no weights")
        state[key] = value.to(torch.float32)
        is_finite = not value.numel() or all(bound.isfinite() for bound in torch.aminmax(state[key].detach()))
        ensure(is_finite, f"{place} holds NaN or infinity")
    _check_flags(checkpoint, sum(value.numel() for value in state.values()))
    return state


def _check_flags(checkpoint: Checkpoint, n_stored: int) -> None:
    """The arguments come from the file's metadata or keys: without a bound they could build a network of any
    size."""
    own, place = checkpoint.model_kwargs, f"weights: {checkpoint.path}"
    ensure(isinstance(own, Mapping), f"{place}: its flags are no dictionary")
    least = {"embed_dim": 1, "depth": 1, "num_heads": 1, "patch_size": 1, "n_registers": 0, "pos_grid": 0}
    sides = {key: own.get(key, 0) for key in least}
    for key, value in sides.items():
        is_size = type(value) is int and least[key] <= value <= MAX_SIDE
        ensure(is_size, f"{place}: {key} of {value!r:.60} is no size of a network")
    for key in KINDS.keys() & own.keys():
        value, (kind, called) = own[key], KINDS[key]
        is_kind = isinstance(value, kind) and (kind is bool or type(value) is not bool)
        is_default = value is None and key in ("layerscale", "pos_interpolation")
        ensure(is_kind or is_default, f"{place}: {key} of {value!r:.60} is {called}")
    for key, most in {"layerscale": MAX_SIDE, "drop_path": 1}.items():
        value = own.get(key) or 0
        ensure(0 <= value <= most, f"{place}: {key} of {value!r:.60} lies not between 0 and {most}")
    width, heads = sides["embed_dim"], sides["num_heads"]
    ratio, eps = own.get("mlp_ratio", 4.0), own.get("ln_eps", 1e-6)
    ensure(width % heads == 0, f"{place}: {width} channels cannot be split over {heads} heads")
    is_ratio = isinstance(ratio, int | float) and type(ratio) is not bool and 0 < ratio <= MAX_SIDE
    ensure(is_ratio, f"{place}: mlp_ratio of {ratio!r:.60} is no size of a network")
    ensure(isinstance(eps, float) and 0 < eps < 1, f"{place}: ln_eps of {eps!r:.60} is none of a norm")
    n_layers = 3 if own.get("swiglu") else 2  # of an MLP, each ratio * width^2
    n_wanted = width * (sides["depth"] * (4 + n_layers * ratio) * width + 3 * sides["patch_size"] ** 2)
    n_wanted += width * (sides["n_registers"] + sides["pos_grid"] ** 2)
    builds = f"its flags build a network of {n_wanted:.2g}"
    ensure(n_wanted <= 2 * n_stored + UNSTORED, f"{place} holds {n_stored} numbers, {builds}")
