"""How far long work is, for someone who looks at a terminal or a log."""

import time

from pretrain.errors import Interrupted
from pretrain.signals import StopSignals

SAY_EVERY_S = 10.0


class Progress:
    """Says every ten seconds, and at the end, how far the work on a checkpoint is; stops it where the process was asked to."""

    def __init__(self, label: str, total: int, signals: StopSignals | None = None, unit: str = "images") -> None:
        self.label, self.total, self.signals, self.unit = label, total, signals, unit
        self.started = self.said = time.monotonic()

    def __call__(self, done: int) -> None:
        """After ``done`` of the total.

        Raises:
            Interrupted: there was a signal, and something is left to do.
        """
        now, so_far = time.monotonic(), f"{done} of {self.total} {self.unit}"
        if now - self.said > SAY_EVERY_S or done == self.total:
            print(f"{self.label}: {so_far}, {(now - self.started) / done:.2f} s each", flush=True)
            self.said = now
        if self.signals is not None and self.signals.received and done < self.total:
            raise Interrupted(f"{self.signals.received} at {self.label}, after {so_far}; the same command goes on")
