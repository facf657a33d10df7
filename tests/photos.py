"""Small image folders for the tests."""

import numpy as np
from PIL import Image


def write_photos(folder, n=6, size=(90, 70), seed=0):
    """``n`` smooth random images (width, height) as JPEG files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
            folder / f"{i:03}.jpg", quality=90
        )
    return folder


TINY = [
    "backbone.name=vit_tiny_patch16",
    "backbone.depth=2",
    "crops.global_px=64",
    "crops.local_px=32",
    "crops.n_local=2",
    "positions.grid=7",
    "heads.n_prototypes=24",
    "heads.hidden_dim=16",
    "heads.bottleneck_dim=8",
    "data.workers=0",
    "optim.batch_size=3",
    "optim.epochs=3",
    "optim.warmup_epochs=1",
    "run.device=cpu",
    "log.every=1",
    "log.checkpoint_every=100",
    "log.tensorboard=false",
]


def last(words):
    """``key=value`` words, the last of each key: a config refuses a key that is given twice."""
    return list({word.partition("=")[0]: word for word in words}.values())
