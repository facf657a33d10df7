"""The interface of a source."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from pretrain.weights.checkpoint import Checkpoint
from pretrain.weights.container import Container


class Match(IntEnum):
    """How well a file fits a source."""

    NONE = 0  # it has another layout
    POSSIBLE = 1  # the layout fits; other sources have it too
    NAMED = 2  # the same, and the file's name says the source
    MARKED = 3  # the content has marks of this source alone


@dataclass(frozen=True)
class Source:
    """One method's public files.

    Attributes:
        name: what ``source=`` takes, such as ``dino``.
        method: the name in tables, such as ``DINO``.
        match: how well an opened file fits, by its keys, shapes, values and name. It never raises.
        convert: (file, subnet) -> the file as a checkpoint under our names. ``subnet`` chooses one of several
            networks: ``teacher``, ``student``, or None for the one that the method's authors evaluate. It
            drops what the source lists and nothing else; what it does not know stays in the state and becomes
            an error by name. It raises a UserError if ours has no such network.
    """

    name: str
    method: str
    match: Callable[[Container], Match]
    convert: Callable[[Container, str | None], Checkpoint]
