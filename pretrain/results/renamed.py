"""Names that settings had before: {old: new}.

They stand here, not beside the settings, because a ``result.json`` is read without these.
"""

import re

PRETRAINING = {  # a group, or a key; one after the other
    "run.algorithm": "method",
    "run.method": "run.name",
    "run.leaves": "run.export_network",
    "run.start_from": "run.init_from",
    "colour": "color",
    "color.grey_p": "color.grayscale_p",
    "dense": "alignment",
    "backbone.layerscale": "backbone.layer_scale_init",
    "optim.epoch_length_it": "optim.epoch_iters",
    "probes.period_it": "probes.every",
    "log.period_it": "log.every",
    "log.checkpoint_period_it": "log.checkpoint_every",
    "log.pictures_period_it": "log.images_every",
}
DETECTION = {
    "iterations_it": "max_iters",
    "milestones_it": "milestones",
    "warmup_it": "warmup_iters",
    "eval_period_it": "eval_every",
}
SEGMENTATION = {"iterations_it": "max_iters", "warmup_it": "warmup_iters", "val_interval_it": "val_every"}
FINE_TUNING = {**DETECTION, **SEGMENTATION, "backbone_flags": "model_kwargs"}
_WORD = re.compile(rf"(?<![^ '])({'|'.join({**DETECTION, **SEGMENTATION})})=")


def deviation(key: str) -> str:
    """Today's name of a setting that a result deviates in."""
    for old, new in PRETRAINING.items():
        if key == old or key.startswith(f"{old}."):
            key = new + key.removeprefix(old)
    return FINE_TUNING.get(key, key)


def in_command(line: str) -> str:
    """A command line whose ``key=value`` words have the new names."""
    return _WORD.sub(lambda match: f"{FINE_TUNING[match[1]]}=", line)
