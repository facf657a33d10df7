"""Evaluation without fine-tuning: what a frozen backbone's features are worth. One file a task.

An evaluator is a function ``(features, train, val, settings, n_shown=0, signals=None) -> Outcome``: of the
features of a backbone held frozen, two parts of one set, the settings of its protocol, the number of the
first validation images of which it keeps a map, and the signals that stop it. It raises a UserError for
images that cannot be read, a part without a counted pixel and features that are not finite, Interrupted after
a signal. On a CPU the same settings give the same numbers bit for bit; nothing is drawn from torch's or
NumPy's own random state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import Interrupted
from pretrain.log import Progress
from pretrain.signals import StopSignals

LONG_S = 600.0  # longer work is announced
Tick = Callable[[], object]  # called now and then in long work; what it raises ends that


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found.

    Attributes:
        metrics: as ``result.json`` holds them: numbers in percent, or one a class by its name.
        maps: for images, by the evaluation's name: what it predicts for the first images of the validation
            part, [S, S] each, in 1 .. C.
        wall_time_s, peak_memory_mib: what it cost, filled in by who runs it.
    """

    metrics: dict[str, Any]
    maps: dict[str, list[NDArray[np.int32]]] = field(default_factory=dict)
    wall_time_s: float = 0.0
    peak_memory_mib: float = 0.0


def check_signals(signals: StopSignals | None, where: str) -> None:
    """Raises Interrupted if the process was asked to stop."""
    if signals is not None and signals.received:
        raise Interrupted(f"{signals.received} at {where}; finished tasks are kept, --resume goes on with it")


def steps(label: str, total: int, signals: StopSignals | None, unit: str = "images") -> Callable[..., None]:
    """Called with how many of ``total`` are done (1), reports the progress; nothing in a probe (no signals)."""
    return (lambda n=1: None) if signals is None else Progress(label, total, unit=unit)


def tell_if_long(what: str, seconds: float, less_by: str) -> None:
    """Announce long work: about how long it will take, and which settings shorten it."""
    if seconds > LONG_S:
        print(f"{what}: up to about {seconds / 3600:.1f} h on this device; less by {less_by}", flush=True)
