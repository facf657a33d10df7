"""Work of minutes and hours: announced before it starts, reported while it runs, stopped by a signal."""

from collections.abc import Callable

from pretrain.errors import Interrupted
from pretrain.log import Progress
from pretrain.signals import StopSignals

LONG_S = 600.0  # longer work is announced


def check_signals(signals: StopSignals | None, where: str) -> None:
    """Stop where the process was asked to.

    Raises:
        Interrupted: it was.
    """
    if signals is not None and signals.received:
        raise Interrupted(f"{signals.received} at {where}; finished tasks are kept, --resume goes on with it")


def steps(label: str, total: int, signals: StopSignals | None, unit: str) -> Callable[[], None]:
    """Call the result after each of ``total`` steps. It reports the progress; in a probe (no signals),
    nothing."""
    return (lambda: None) if signals is None else Progress(label, total, unit=unit)


def tell_if_long(what: str, seconds: float, less_by: str) -> None:
    """Announce long work: about how long it will take, and which settings shorten it."""
    if seconds > LONG_S:
        print(f"{what}: up to about {seconds / 3600:.1f} h on this device; less by {less_by}", flush=True)
