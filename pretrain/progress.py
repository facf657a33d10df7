"""The progress of long work, for a terminal or a log."""

import time

from pretrain.errors import Interrupted
from pretrain.signals import StopSignals

SAY_EVERY_S = 10.0


class Progress:
    """Prints every ten seconds, and at the end, how far the work on a checkpoint is. A signal stops the
    work."""

    def __init__(
        self, label: str, total: int, signals: StopSignals | None = None, unit: str = "images"
    ) -> None:
        self.label, self.total, self.signals, self.unit = label, total, signals, unit
        self.done, self.started = 0, time.monotonic()
        self.said = self.started

    def __call__(self, n: int = 1) -> None:
        """``n`` more are done.

        Raises:
            Interrupted: there was a signal, and something is left to do.
        """
        self.done += n
        now, so_far = time.monotonic(), f"{self.done} of {self.total} {self.unit}"
        if now - self.said > SAY_EVERY_S or self.done == self.total:
            print(f"{self.label}: {so_far}, {(now - self.started) / self.done:.2f} s each", flush=True)
            self.said = now
        if self.signals is not None and self.signals.received and self.done < self.total:
            raise Interrupted(
                f"{self.signals.received} at {self.label}, after {so_far}; the same command goes on"
            )
