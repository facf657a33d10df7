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
    Source,
    State,
    inside_of,
    is_named,
    misfit,
    strip,
    take,
    without,
)
from pretrain.weights.container import Container

HEADS = ("projection_head.", "prototypes.")


def match_neco(file: Container) -> Match:
    """By a projection head without prototypes; a backbone alone, by the file's name."""
    names = _names(_networks(file, "model.") or _flat(file))
    if any(name.startswith("prototypes.") for name in names):
        return Match.NONE
    return _evidence(names, "projection_head.", is_named(file, "neco"))


def match_timet(file: Container) -> Match:
    """By the names of its wrapper."""
    return Match.MARKED if strip(file.flat, "feature_extractor.backbone.") else Match.NONE


def match_leopart(file: Container) -> Match:
    """By its prototypes; without them, by the file's name."""
    return _evidence(_names(_networks(file, "model.")), "prototypes.", is_named(file, "leopart"))


def convert_neco(file: Container, subnet: str | None) -> Checkpoint:
    """A backbone under DINO's or DINOv2's names."""
    networks = _networks(file, "model.") or _flat(file)
    if any(name.startswith("prototypes.") for name in _names(networks)):
        raise misfit(file.path, "neco", "there are prototypes, which NeCo has not")
    networks = {
        name: {
            "reg_token" if key == "register_tokens" else key: value
            for key, value in without(state, *HEADS).items()
        }
        for name, state in networks.items()
    }
    return _convert(file, networks, subnet, "neco", "NeCo", "" if "" in networks else "model.")


def convert_timet(file: Container, subnet: str | None) -> Checkpoint:
    """The backbone of the feature extractor, or of its moving average."""
    networks = {
        name: inside_of(file, "timet", state, ("head.",))
        for name, state in _networks(file, "feature_extractor.").items()
    }
    return _convert(
        file, networks, subnet, "timet", "TimeT", "feature_extractor.", "prototypes", "teacher_prototypes"
    )


def convert_leopart(file: Container, subnet: str | None) -> Checkpoint:
    """The tuned backbone, or its moving average."""
    networks = {name: without(state, *HEADS) for name, state in _networks(file, "model.").items()}
    return _convert(file, networks, subnet, "leopart", "Leopart", "model.")


def _networks(file: Container, student: str) -> dict[str, State]:
    """The network behind this prefix and its moving average, if there is one; empty without the first."""
    if not (state := strip(file.flat, student)):
        return {}
    teacher = strip(file.flat, "teacher.")
    return {"student": state, "teacher": teacher} if teacher else {"student": state}


def _flat(file: Container) -> dict[str, State]:
    return {"": file.flat} if file.flat else {}


def _names(networks: Mapping[str, State]) -> list[str]:
    return [key for state in networks.values() for key in state]


def _evidence(names: list[str], mark: str, named: bool) -> Match:
    """Match a network by a tensor whose name starts with ``mark``, else by the file's name (``named``)."""
    if not any(name.startswith("blocks.") for name in names):
        return Match.NONE
    if any(name.startswith(mark) for name in names):
        return Match.MARKED
    return Match.NAMED if named else Match.NONE


def _convert(
    file: Container,
    networks: dict[str, State],
    subnet: str | None,
    source: str,
    method: str,
    prefix: str,
    *beside: str,
) -> Checkpoint:
    """The network ``subnet``. Every tensor of the file has to be behind ``prefix`` or ``teacher.``, or one of
    ``beside``."""
    stray = [key for key in file.flat if not key.startswith((prefix, "teacher.")) and key not in beside]
    if networks and stray:
        raise misfit(file.path, source, f"left over {', '.join(stray[:8])}")
    return take(file, networks, subnet, source, method, default="student")


SOURCES = (
    Source("neco", "NeCo", match_neco, convert_neco),
    Source("timet", "TimeT", match_timet, convert_timet),
    Source("leopart", "Leopart", match_leopart, convert_leopart),
)
