"""Draw what a pre-training sees: views and position boxes, both mask kinds, the scale s, its attention and features.

posfield analyze crops runs/toy            (writes runs/toy/figures/, which the report shows)

Of several runs the colors of features are those of the first, where all see the same crops.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.analysis.figures import look, save, scales_figure, training_figures
from pretrain.build import build_backbone
from pretrain.cli import at_least, command_parser
from pretrain.config import load_saved
from pretrain.data.loader import Collate, build_dataset
from pretrain.errors import TRUST_HELP, UserError

CAPTIONS = {
    "views": (
        "Views and their positions",
        "Global (red) and local (blue) boxes in the image{places}, and the crops.",
    ),
    "masks": (
        "Masks",
        "Patches of the student's global crops whose content (hatched) or position (red) is replaced by a mask token.",
    ),
    "attention": (
        "Last-layer attention",
        "What [CLS] and three query patches (numbered dots) of the first global crop attend to, mean of the heads.",
    ),
    "pca": (
        "Principal components of the patches",
        "The first three components over all crops together, as red, green and blue{like}.",
    ),
}


def main(arguments: list[str]) -> None:
    """Parse, draw, say where the figures are."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="folder of a pre-training run")
    parser.add_argument("--images", type=int, default=4, help="pictures a figure (%(default)s)")
    told = "other images than those that the run trained on: anything that data.root may be"
    parser.add_argument("--data", metavar="PATH", help=told)
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    options = parser.parse_args(arguments)
    at_least(options, images=1)
    for run in options.runs:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} is no folder of a pre-training run: no config.yaml")
    first: Seen | None = None
    for run in options.runs:
        # Both paths make the same crops.
        words = ["data.workers=0", "data.path=cpu", *[f"data.root={options.data}"] * bool(options.data)]
        config = load_saved(run / "config.yaml", words, options.trust)
        seen = draw(run, config, options.images, first)
        first = first or seen
        print(f"figures in {run / 'figures'}")


class Seen(NamedTuple):
    """Of a run that others are compared with: its folder's name, crops [G * n, 3, S, S] and their features."""

    name: str
    crops: Tensor
    features: Tensor


def draw(folder: Path, config: Any, n_images: int, first: Seen | None = None) -> Seen | None:
    """All figures of a run, in the colors of the first."""
    dataset, figures = build_dataset(config), folder / "figures"
    n_images = min(n_images, len(dataset))
    images = [dataset.read(i)[0] for i in range(n_images)]
    samples = [dataset.sample(i, image) for i, image in enumerate(images)]
    rules, cpu = dataset.rules, torch.device("cpu")
    batch = Collate(rules, n_images, config.run.seed).crops(samples).to(cpu)
    is_tied = rules.positions is not None and rules.positions.follows_crops
    seen = own = None
    has_cls = True
    if (folder / "backbone.safetensors").is_file():
        backbone = build_backbone(config.backbone.name, weights=folder / "backbone.safetensors")
        has_cls = backbone.has_cls
        seen = look(backbone, batch.global_crops, batch.views, n_images)
        own = Seen(folder.name, batch.global_crops, seen.features)
    is_shared = first is not None and own is not None and torch.equal(first.crops, own.crops)
    like = first if is_shared else None
    words = {
        "places": ", the position boxes after shift and scale in the field P"
        if is_tied
        else "; every view has the same positions",
        "like": f", turned so that the colors come nearest to those of {like.name}" if like else "",
    }
    drawn = training_figures(
        seen, batch.global_crops, batch.local_crops, batch.views, batch.masks, is_tied, n_images,
        images=[torch.from_numpy(image).permute(2, 0, 1) for image in images], has_cls=has_cls,
        like=like.features if like else None,
    )  # fmt: skip
    for name, figure in drawn.items():
        title, caption = CAPTIONS[name]
        save(figure, figures, f"{name}.png", title, caption.format(**words))
    if rules.positions is not None and rules.positions.is_augmented:
        caption = f"Distributions of s as drawn (paper Fig. 3); the run uses {rules.positions.scale}."
        save(scales_figure(rules.positions), figures, "scales.png", "Scale s", caption)
    return own
