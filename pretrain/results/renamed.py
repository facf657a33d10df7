"""Names that fields of the fine-tuning protocols had before: {old: new}.

They stand here, not in the plug-ins, because a ``result.json`` is read without them.
"""

DETECTION = {
    "iterations_it": "max_iters",
    "milestones_it": "milestones",
    "warmup_it": "warmup_iters",
    "eval_period_it": "eval_every",
}
SEGMENTATION = {"iterations_it": "max_iters", "warmup_it": "warmup_iters", "val_interval_it": "val_every"}
DEVIATIONS = {**DETECTION, **SEGMENTATION, "backbone_flags": "model_kwargs"}  # all that a result can hold
