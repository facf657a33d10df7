"""Signals to stop: SIGTERM (a scheduler takes the machine back) and SIGUSR1 (the time limit is near)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from pretrain import distributed
from pretrain.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Inside the context, a signal is remembered and does not end the process."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def on_any_rank(self) -> bool:
        """Whether any rank got a signal, the same for all, which must call this at one iteration."""
        return distributed.any_over_ranks(self.received is not None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first of :data:`SIGNALS` raises Interrupted in the main thread, so that it can end what
    it started. Further ones do nothing. (They are not ignored: a command that starts now would inherit
    that.)"""

    def stop(number: int, _: object) -> None:
        for each in SIGNALS:
            signal.signal(each, lambda *_: None)
        raise Interrupted(f"by a {signal.Signals(number).name}: start it again")

    before = [signal.signal(number, stop) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)
