"""What a pre-training is going to do, told before its first step: its plan, what speaks against it, and the settings
that follow from the images, the weights and the memory at hand."""

import hashlib
from pathlib import Path

import torch

from pretrain import distributed
from pretrain.config import recipe_info
from pretrain.data.decode import BrokenImage
from pretrain.data.images import spread
from pretrain.data.loader import ViewsDataset, build_loader
from pretrain.data.sources import Source
from pretrain.device import fewest_parts
from pretrain.errors import UserError
from pretrain.log import log
from pretrain.methods import TrainSettings
from pretrain.settings import replaced
from pretrain.trainer import Length, Trainer

# From scratch the paper's backbones saw 100 epochs of ImageNet-1K. From public weights (ours): 100 epochs of few images,
# 10 of many, and between them as many as make 6.4 million images.
SEEN_FROM_SCRATCH, SEEN_FROM_WEIGHTS = 100 * 1_281_167, 6_400_000
LEAST_EPOCHS, MOST_EPOCHS, MOST_EPOCHS_FROM_SCRATCH = 10, 100, 400
WARM_UP_SHARE = 0.1  # of the epochs (Table 6); new prototypes wait for half as long
LOOKED_AT = 256  # images whose bytes are compared: a second on a slow disk
MOST_COPIES = 0.05  # share of these that may be copies of others
FEW = 0.1  # a share of SEEN_FROM_SCRATCH from which on a run from scratch is not warned of


def own_epochs(n_images: int, start: str = "") -> dict[str, int]:
    """The epochs of the recipes ``own-images`` and ``own-images-scratch``, which follow from the number of images.

    Args:
        n_images: of the data.
        start: the weights to start from; none: from scratch.

    Returns:
        ``{dotted key: value}``.
    """
    seen, most = (SEEN_FROM_WEIGHTS, MOST_EPOCHS) if start else (SEEN_FROM_SCRATCH, MOST_EPOCHS_FROM_SCRATCH)
    epochs = min(max(round(seen / n_images), LEAST_EPOCHS), most)
    warmup = max(1, round(WARM_UP_SHARE * epochs))
    own = {"optim.epochs": epochs, "optim.warmup_epochs": warmup}
    return {**own, "optim.freeze_last_layer_epochs": max(1, warmup // 2)}


def fitted(config: TrainSettings, dataset: ViewsDataset, device: torch.device) -> TrainSettings:
    """The settings with ``step.accumulate`` 0 replaced by the fewest micro-batches whose step fits into the GPU's memory,
    tried on the run's first batch; 1 without a GPU.

    Raises:
        UserError: not even one image at a time fits; there are several processes.
    """
    if config.step.accumulate:
        return config
    if device.type != "cuda":
        return replaced(config, {"step.accumulate": 1})
    if distributed.world_size() > 1:
        raise UserError("config: step.accumulate=0 is fitted by one process alone; give a number")

    def two_steps(n: int) -> None:  # the optimizer has its moments after the first
        trial = replaced(config, {"step.accumulate": n, "data.workers": 0})
        batches = [batch for batch, _ in build_loader(trial, dataset, 0, 1)]
        trainer = Trainer(trial, Length(1, 2, 1))
        for _ in range(2):
            trainer.step(batches, examine=True)

    batch = config.optim.batch_size
    n = fewest_parts(batch, two_steps, device)
    if n is None:
        more = "set step.checkpointing=full, or smaller crops"
        raise UserError(f"step.accumulate: not even one image at a time fits into {device}; {more}")
    log(f"step.accumulate={n}: {batch // n} images at a time fit into {device}")
    return replaced(config, {"step.accumulate": n})


def in_words(config: TrainSettings, length: Length, n_images: int, device: torch.device) -> str:
    """The plan in one line."""
    optim, parts = config.optim, config.step.accumulate
    ranks = distributed.world_size()
    share = optim.batch_size // (ranks * parts)
    split = f" ({ranks} processes x {parts} micro-batches x {share})" if ranks * parts > 1 else ""
    start = config.backbone.weights or config.run.init_from or "from scratch"
    return (
        f"plan: {n_images:,} images, batch {optim.batch_size}{split}: {length.epoch_iters:,} iterations an epoch, "
        f"{optim.epochs} epochs, {length.total_iters:,} iterations, a checkpoint every {config.log.checkpoint_every:,}; "
        f"{config.backbone.name} {start}; {config.recipe or config.method} on {device}; into {config.run.output}"
    )


def doubts(config: TrainSettings, length: Length, source: Source) -> list[str]:
    """What speaks against a run, a line each with the way on."""
    found = []
    seen = length.total_iters * config.optim.batch_size
    is_new = (
        recipe_info(config.recipe).from_scratch and not config.backbone.weights and not config.run.init_from
    )
    if is_new and seen < FEW * SEEN_FROM_SCRATCH:
        found.append(
            f"{length.total_iters:,} iterations show {seen:,} images, {seen / SEEN_FROM_SCRATCH:.2%} of what the paper's "
            "backbones saw from scratch: too few for good features; start from public weights (posfield pretrain "
            "--from FILE), or raise optim.epochs"
        )
    copies, n_looked_at, pair = copies_among(source)
    if copies > MOST_COPIES * n_looked_at:
        found.append(
            f"{copies} of {n_looked_at} images are copies of others ({pair[0]} = {pair[1]}): KoLeo pushes copies apart "
            "and the k-NN of features finds them; remove them, or set losses.koleo=0"
        )
    return found


def copies_among(source: Source, most: int = LOOKED_AT) -> tuple[int, int, tuple[str, str]]:
    """How many of at most ``most`` images have the bytes of an earlier one; how many were read; the first two alike."""
    known, copies, pair, n_read = dict[bytes, int](), 0, ("", ""), 0
    for index in spread(range(len(source)), most):
        try:
            digest = hashlib.blake2b(source.read(index), digest_size=16).digest()
        except BrokenImage:
            continue
        n_read += 1
        if digest in known:
            copies += 1
            pair = pair if pair[0] else (source.name(known[digest]), source.name(index))
        known.setdefault(digest, index)
    return copies, n_read, pair


def what_next(backbone: Path) -> str:
    """What a finished run left, and what to do with it."""
    return (
        f"done: {backbone}; fine-tune it: posfield detect --weights {backbone} --data LABELS --output {backbone.parent}_det "
        "(or posfield segment); posfield embed and posfield analyze features show what it sees"
    )
