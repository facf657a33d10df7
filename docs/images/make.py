"""The pictures of docs/method.md and, with a finished demo's folder, that of README.md. Photographs: scikit-image's, public
domain.

python docs/images/make.py [demo]
"""

import sys
from pathlib import Path

import torch

from det_plugin.figures import draw_prediction
from det_plugin.predict import load_detector
from pretrain.analysis.figures import (
    bare,
    displayable,
    grid_of_axes,
    masked,
    masks_figure,
    rectangles,
    scales_figure,
    views_figure,
)
from pretrain.analysis.pca import as_colors, principal_components
from pretrain.backbones.position import sample_field, started_field
from pretrain.config import load_config
from pretrain.data.decode import decode
from pretrain.data.loader import Collate, build_dataset
from pretrain.data.toy import photographs

DETECTED = "000000000064.jpg"  # of the demo's validation images
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
    keep(views_figure(big[:, :2], small[:3, :2], crops.views, True), "views")
    keep(field_figure(samples[0], big[:, 0], small[:2, 0]), "field")
    keep(masks_figure(crops.global_crops, crops.masks, dataset.rules.grid), "masks")
    keep(scales_figure(config.positions), "scales")
    for demo in map(Path, sys.argv[1:2]):
        keep(overview_figure(images[0], samples[0], crops, dataset.rules.grid, demo), "overview")


def field_of_colors():
    """A smooth field [1, 3, 50, 50] as colors."""
    torch.manual_seed(0)
    field = started_field(0.02 * torch.randn(1, 384, 50, 50), "smooth", 7, 1.0)
    return as_colors(principal_components(field[0].flatten(1).T)).T.unflatten(1, (50, 50)).unsqueeze(0)


def overview_figure(image, sample, crops, grid, demo):
    """A photograph with its crops, their boxes in the field, a crop with each kind of mask, what the demo's detector finds."""
    views = sample.views
    shown = [*range(views.n_global), views.n_global, views.n_global + 1]
    figure, ((photo, field, content, position, found),) = grid_of_axes(1, 5, (12, 2.7))
    bare(photo, "a photograph and its crops").imshow(image, extent=(0, 1, 1, 0))
    rectangles(photo, views.boxes[0, shown], views.n_global)
    bare(field, "their positions: boxes in a field,\nshifted and scaled at random").imshow(
        field_of_colors()[0].permute(1, 2, 0), extent=(0, 1, 1, 0)
    )
    rectangles(field, views.position_boxes[0, shown], views.n_global)
    named = {
        "content": (content, "masked content is predicted ..."),
        "position": (position, "... and so are masked positions"),
    }
    for kind, (axis, title) in named.items():
        masks = getattr(crops.masks, kind)
        sizes = masks.sum(1).float()
        sizes[sizes == 0] = torch.inf
        crop = int((sizes - 0.35 * grid[0] * grid[1]).abs().argmin())
        bare(axis, title).imshow(masked(crops.global_crops[crop], masks[crop].view(grid), kind))
    detector = load_detector(demo / "detect_intertwined", device="cpu")
    seen = detector.predict(demo / "data" / "coco" / "val2017" / DETECTED, min_score=0.5)
    bare(found, "a detector on the backbone").imshow(draw_prediction(seen.image, seen.results, seen.classes))
    return figure


def field_figure(sample, big, small):
    """A smooth field as colors with the position boxes of the crops in it, and what each crop reads there."""
    colors = field_of_colors()
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
        bare(axes[0, column], name).imshow(displayable(crop))
        bare(axes[1, column], f"its {side} x {side} positions").imshow(
            read[0].unflatten(0, (side, side)).clamp(0, 1)
        )
    return figure


def keep(figure, name: str) -> None:
    """Write ``overview.webp`` or ``method-NAME.webp``, below 200 kB."""
    file = HERE / (f"{name}.webp" if name == "overview" else f"method-{name}.webp")
    figure.savefig(file, dpi=110, bbox_inches="tight", pil_kwargs={"quality": 82})


if __name__ == "__main__":
    main()
