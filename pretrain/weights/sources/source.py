"""What a source is."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from pretrain.weights.checkpoint import Checkpoint
from pretrain.weights.container import Container


class Match(IntEnum):
    """How well a file fits a source."""

    NONE = 0  # the layout is another
    POSSIBLE = 1  # the layout fits, and others have it too
    NAMED = 2  # likewise, and the file's name says it
    MARKED = 3  # the content bears marks that only this source's files have


@dataclass(frozen=True)
class Source:
    """One method's public files.

    Attributes:
        name: what ``source=`` takes: ``dino``.
        method: as tables write it: ``DINO``.
        recognize: how well an opened file fits, from its keys, shapes and values and from the file's name; it never raises.
        convert: the file as a checkpoint under our names. The second argument is ``subnet``, which of several networks in the file:
            ``teacher`` | ``student`` | none for the one that the method's authors evaluate. What it does not know it leaves in
            the state, where it becomes an error by name; it drops what the source lists, and no more. Where the network is none
            of ours it raises UserError that says why.
    """

    name: str
    method: str
    match: Callable[[Container], Match]
    convert: Callable[[Container, str | None], Checkpoint]
