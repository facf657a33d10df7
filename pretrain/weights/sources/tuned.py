"""Backbones tuned further on dense tasks: NeCo, TimeT, Leopart.

The files are flat, with the attribute of the training wrapper as prefix: ``feature_extractor.backbone.*``
(TimeT, ``time_tuning.py``) or ``model.*`` (Leopart, ``src/leopart.py``; NeCo's own runs, ``src/neco.py``).
NeCo's published files have no prefix. A moving average, if there is one, is ``teacher.*``; the authors
evaluate the other network. All start from DINO or DINOv2 and resample positions as DINO does; NeCo does so
for DINOv2 with registers, too (``src/models/vit_v2.py``).
"""

from collections.abc import Mapping

from pretrain.weights.common import (
    Checkpoint,
    Match,
    Misfit,
    Source,
    State,
    inside_of,
    is_named,
    named,
    renamed,
    replacing,
    strip,
    take,
    without,
)
from pretrain.weights.container import Container

HEADS = ("projection_head.", "prototypes.")


def match_neco(file: Container) -> Match:
    """By a projection head without prototypes; a backbone alone, by the file's name."""
    networks = _networks(file, "model.") or file.alone
    if _has(networks, "prototypes."):
        return Match.NONE
    return _evidence(file, networks, "projection_head.", "neco")


def match_timet(file: Container) -> Match:
    """By the names of its wrapper."""
    return Match.MARKED if strip(file.flat, "feature_extractor.backbone.") else Match.NONE


def match_leopart(file: Container) -> Match:
    """By its prototypes; without them, by the file's name."""
    return _evidence(file, _networks(file, "model."), "prototypes.", "leopart")


def convert_neco(file: Container, subnet: str | None) -> Checkpoint:
    """A backbone under DINO's or DINOv2's names."""
    networks = _networks(file, "model.") or file.alone
    if _has(networks, "prototypes."):
        raise Misfit("there are prototypes, which NeCo has not")
    ours = replacing({"register_tokens": "reg_token"})
    networks = {name: renamed(without(state, *HEADS), ours) for name, state in networks.items()}
    return _convert(file, networks, subnet, "" if "" in networks else "model.")


def convert_timet(file: Container, subnet: str | None) -> Checkpoint:
    """The backbone of the feature extractor, or of its moving average."""
    found = _networks(file, "feature_extractor.")
    networks = {name: inside_of(state, ("head.",)) for name, state in found.items()}
    return _convert(file, networks, subnet, "feature_extractor.", "prototypes", "teacher_prototypes")


def convert_leopart(file: Container, subnet: str | None) -> Checkpoint:
    """The tuned backbone, or its moving average."""
    networks = {name: without(state, *HEADS) for name, state in _networks(file, "model.").items()}
    return _convert(file, networks, subnet, "model.")


def _networks(file: Container, student: str) -> dict[str, State]:
    """The network behind this prefix and its moving average, if there is one; empty without the first."""
    found = {"student": strip(file.flat, student), "teacher": strip(file.flat, "teacher.")}
    return {name: state for name, state in found.items() if state and found["student"]}


def _has(networks: Mapping[str, State], start: str) -> bool:
    return any(key.startswith(start) for state in networks.values() for key in state)


def _evidence(file: Container, networks: Mapping[str, State], mark: str, name: str) -> Match:
    """Match a network by a tensor whose name starts with ``mark``, else by the file's name."""
    if not _has(networks, "blocks."):
        return Match.NONE
    if _has(networks, mark):
        return Match.MARKED
    return Match.NAMED if is_named(file, name) else Match.NONE


def _convert(
    file: Container, networks: Mapping[str, State], subnet: str | None, prefix: str, *beside: str
) -> Checkpoint:
    """The network ``subnet``. Every tensor has to be behind ``prefix`` or ``teacher.``, or one of ``beside``."""
    stray = [key for key in file.flat if not key.startswith((prefix, "teacher.")) and key not in beside]
    if networks and stray:
        raise Misfit(f"left over {named(stray)}")
    return take(file, networks, subnet, default="student")


SOURCES = (
    Source("neco", "NeCo", match_neco, convert_neco),
    Source("timet", "TimeT", match_timet, convert_timet),
    Source("leopart", "Leopart", match_leopart, convert_leopart),
)
