"""Names that settings had before: {old: new}.

They stand here, not beside the settings, because a ``result.json`` is read without these. So do the names of
our commands' files.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

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
TOOLS = {  # {file of tools/: command of posfield}
    "train_ssl": "pretrain",
    "pretrain": "pretrain",
    "train_det": "detect",
    "train_seg": "segment",
    "evaluate": "evaluate",
    "evaluate_dense": "evaluate dense",
}
_CONFIG = re.compile(r"^.*configs/pretrain/(\w+)\.yaml$")


def deviation(key: str) -> str:
    """Today's name of a setting that a result deviates in."""
    for old, new in PRETRAINING.items():
        if key == old or key.startswith(f"{old}."):
            key = new + key.removeprefix(old)
    return FINE_TUNING.get(key, key)


def in_command(line: str) -> str:
    """A command line as it is written today, wherever our files lie: ``posfield COMMAND``, configs by their
    names, and ``key=value`` words under the new keys."""
    words = as_posfield(shlex.split(line))
    new = {f"{old}=": f"{key}=" for old, key in (DETECTION | SEGMENTATION).items()}
    pairs = [_CONFIG.sub(r"\1", word).partition("=") for word in words]
    return shlex.join(new.get(key + equals, key + equals) + value for key, equals, value in pairs)


def as_posfield(words: Sequence[str]) -> list[str]:
    """``posfield COMMAND ...`` of a command line that starts a file of ours with Python; any other as it is."""
    file = Path(words[1] if len(words) > 1 and words[1].endswith(".py") else "")
    if file.parts[-2:] == ("posfield", "__main__.py"):
        return ["posfield", *words[2:]]
    # the second: the notes of earlier comparisons
    for tool, rest in ((file.stem, words[2:]), (words[0] if words else "", words[1:])):
        if tool in TOOLS:
            return ["posfield", *TOOLS[tool].split(), *rest]
    return list(words)
