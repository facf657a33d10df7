"""Many commands: a :class:`Stage` is one of them and says what is done; a :class:`Runner` runs them, here or on
SLURM; a comparison, a sweep and an ablation only plan."""

from pretrain.jobs.runner import Runner
from pretrain.jobs.stage import DONE, FAILED, GRACE_S, LEFT, Stage

__all__ = ["DONE", "FAILED", "GRACE_S", "LEFT", "Runner", "Stage"]
