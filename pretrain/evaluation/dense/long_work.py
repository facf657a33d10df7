"""Work of minutes and hours: told before it begins, shown while it goes on, and stopped where the process is asked to stop."""

from collections.abc import Callable

from pretrain.errors import Interrupted
from pretrain.progress import Progress
from pretrain.signals import StopSignals

LONG_S = 600.0  # what takes longer is told before it begins


def check_signals(signals: StopSignals | None, where: str) -> None:
    """Stop where the process was asked to.

    Raises:
        Interrupted: it was.
    """
    if signals is not None and signals.received:
        raise Interrupted(f"{signals.received} at {where}; finished tasks are kept, --resume goes on with it")


def steps(label: str, total: int, signals: StopSignals | None, unit: str) -> Callable[[], None]:
    """To be called after each of ``total`` steps of long work: says how far it is. Without signals, as in a probe, nothing."""
    return (lambda: None) if signals is None else Progress(label, total, unit=unit)


def tell_if_long(what: str, seconds: float, less_by: str) -> None:
    """Before long work: about how long it will take, and by which settings it takes less."""
    if seconds > LONG_S:
        print(f"{what}: up to about {seconds / 3600:.1f} h on this device; less by {less_by}", flush=True)
