"""Names that fields of the fine-tuning protocols had before: {old: new}.

They stand here, not in the plug-ins, because a ``result.json`` is read without them.
"""

import re

DETECTION = {
    "iterations_it": "max_iters",
    "milestones_it": "milestones",
    "warmup_it": "warmup_iters",
    "eval_period_it": "eval_every",
}
SEGMENTATION = {"iterations_it": "max_iters", "warmup_it": "warmup_iters", "val_interval_it": "val_every"}
DEVIATIONS = {**DETECTION, **SEGMENTATION, "backbone_flags": "model_kwargs"}  # all that a result can hold
_WORD = re.compile(rf"(?<![^ '])({'|'.join({**DETECTION, **SEGMENTATION})})=")


def in_command(line: str) -> str:
    """A command line whose ``key=value`` words have the new names."""
    return _WORD.sub(lambda match: f"{DEVIATIONS[match[1]]}=", line)
