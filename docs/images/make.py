"""The pictures of docs/method.md: python docs/images/make.py. Photographs: scikit-image's, public domain."""

from pathlib import Path

import torch

from pretrain.analysis.figures import (
    bare,
    crops_figure,
    grid_of_axes,
    masks_figure,
    rectangles,
    scales_figure,
)
from pretrain.analysis.pca import as_colors, principal_components
from pretrain.backbones.position import sample_field, started_field
from pretrain.config import load_config
from pretrain.data.decode import decode
from pretrain.data.loader import Collate, build_dataset
from pretrain.data.toy import photographs

HERE, SEED, SHOWN = Path(__file__).parent, 4, ("astronaut", "chelsea", "coffee", "rocket")


def main() -> None:
    """Draw the crops, the field, the masks and the scales of a few photographs, as the training draws them."""
    files = photographs()
    listed = HERE / ".photographs.txt"
    listed.write_text("".join(f"{files[name]}\n" for name in SHOWN))
    config = load_config("intertwined_vits16", [f"data.root={listed}", f"run.seed={SEED}", "data.workers=0"])
    dataset = build_dataset(config)
    listed.unlink()
    images = [decode(files[name].read_bytes()) for name in SHOWN]
    samples = [dataset.sample(i, image) for i, image in enumerate(images)]
    crops = Collate(dataset.rules, len(images), SEED).crops(samples).to(torch.device("cpu"))
    n = len(images)
    big, small = crops.global_crops.unflatten(0, (-1, n)), crops.local_crops.unflatten(0, (-1, n))
    keep(crops_figure(big[:, :2], small[:3, :2], crops.views, True), "views")
    keep(field_figure(samples[0], big[:, 0], small[:2, 0]), "field")
    keep(masks_figure(crops.global_crops, crops.masks, dataset.rules.grid), "masks")
    keep(scales_figure(config.positions), "scales")


def field_figure(sample, big, small):
    """A smooth field as colors with the position boxes of the crops in it, and what each crop reads there."""
    torch.manual_seed(0)
    field = started_field(0.02 * torch.randn(1, 384, 50, 50), "smooth", 7, 1.0)
    scores = principal_components(field[0].flatten(1).T)  # [50 * 50, 3]
    colors = as_colors(scores).T.unflatten(1, (50, 50)).unsqueeze(0)
    views, crops = sample.views, [*big, *small]
    figure, axes = grid_of_axes(2, 1 + len(crops), (1.9 * (1 + len(crops)), 4.0))
    bare(axes[0, 0], "the field P, 50 x 50, as colors").imshow(
        colors[0].permute(1, 2, 0), extent=(0, 1, 1, 0)
    )
    shown = [*range(len(big)), *range(views.n_global, views.n_global + len(small))]
    rectangles(axes[0, 0], views.position_boxes[0, shown], views.n_global)
    axes[1, 0].set_axis_off()
    for column, (k, crop) in enumerate(zip(shown, crops), 1):
        side = crop.shape[-1] // 16
        read = sample_field(
            colors, views.position_boxes[0, k : k + 1], (side, side), views.flips[0, k : k + 1]
        )
        name = f"{'global' if k < views.n_global else 'local'}{', flipped' if views.flips[0, k] else ''}"
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        bare(axes[0, column], name).imshow((crop.permute(1, 2, 0) * std + mean).clamp(0, 1))
        bare(axes[1, column], f"its {side} x {side} positions").imshow(
            read[0].unflatten(0, (side, side)).clamp(0, 1)
        )
    return figure


def keep(figure, name: str) -> None:
    """Write ``method-NAME.webp``, below 200 kB."""
    file = HERE / f"method-{name}.webp"
    figure.savefig(file, dpi=110, bbox_inches="tight", pil_kwargs={"quality": 82})


if __name__ == "__main__":
    main()
