"""Many commands: a :class:`Stage` is one and says what is done, a :class:`Runner` runs them; all else only plans."""

from collections.abc import Sequence

from pretrain.errors import Interrupted, UserError
from pretrain.jobs.runner import Runner
from pretrain.jobs.stage import DONE, FAILED, GRACE_S, LEFT, Stage

__all__ = ["DONE", "FAILED", "GRACE_S", "LEFT", "Runner", "Stage", "raise_for"]


def raise_for(failed: str, left: Sequence[str], what: str) -> None:
    """Say how jobs ended that are not done.

    Args:
        failed: what is told of those that failed; empty: none.
        left: the names of those that are left.
        what: ``12 runs``, all of them.

    Raises:
        Interrupted: some are left; what failed does not keep them from going on.
        UserError: some failed.
    """
    if left:
        raise Interrupted(f"{len(left)} of {what} are left: start it again" + f"; {failed}" * bool(failed))
    if failed:
        raise UserError(failed)
