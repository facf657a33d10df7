"""Signals to stop: SIGTERM (a scheduler takes the machine back), SIGUSR1 (the time limit is near), and SIGINT
(Ctrl-C)."""

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from pretrain.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Inside the context, a signal is remembered and does not end the process, but for a second Ctrl-C, which
    does at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            asked = (*SIGNALS, signal.SIGINT)
            self._before = {number: signal.signal(number, self._remember) for number in asked}
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received == "SIGINT":
                raise KeyboardInterrupt
            print(
                "stopping as soon as the state is saved; Ctrl-C again: at once", file=sys.stderr, flush=True
            )
        self.received = signal.Signals(number).name

    def on_any_rank(self) -> bool:
        """Whether any rank got a signal, the same for all, which must call this at one iteration."""
        from pretrain import distributed  # loads torch, which whoever only starts processes does without

        return distributed.any_over_ranks(self.received is not None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


PR_SET_PDEATHSIG = 1


def start_worker(ignored: bool = True) -> None:
    """What a data-loading process does first. It dies with the training, however that ends: a worker that ignores
    signals would wait for good (on Linux; elsewhere torch's own watch has to do).

    Args:
        ignored: signals are ignored. They are often sent to all processes of a group; the training decides when to
            stop, and would end with a worker.
    """
    for number in (*SIGNALS, signal.SIGUSR2, signal.SIGINT) if ignored else ():
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


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
