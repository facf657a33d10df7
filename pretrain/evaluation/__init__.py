"""Evaluation without fine-tuning: what a frozen backbone's features are worth. One file a task."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found.

    Attributes:
        metrics: as ``result.json`` holds them: numbers in percent, or one a class by its name.
        maps: for images, by the evaluation's name: what it predicts for the first images of the validation
            part, [S, S] each, in 1 .. C.
    """

    metrics: dict[str, float | dict[str, float]]
    maps: dict[str, list[NDArray[np.int32]]] = field(default_factory=dict)
