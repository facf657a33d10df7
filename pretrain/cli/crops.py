"""Draw what a pre-training sees: views and position boxes, both mask kinds, the scale s, its attention.

posfield analyze crops runs/toy            (writes runs/toy/figures/)
"""

from pathlib import Path

import numpy as np
import torch

from pretrain.analysis.attention import query_attention
from pretrain.analysis.figures import attention_figure, masks_figure, save, scales_figure, views_figure
from pretrain.build import build_backbone
from pretrain.cli import command_parser
from pretrain.config import load_saved
from pretrain.data.loader import Collate, build_dataset
from pretrain.errors import TRUST_HELP, UserError
from pretrain.views.pixels import crop_resize, normalize

QUERIES = [(0.25, 0.25), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.75, 0.75)]


def main(arguments: list[str]) -> None:
    """Parse, draw, say where the figures are."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a pre-training run")
    parser.add_argument("--images", type=int, default=4, help="pictures a figure (%(default)s)")
    told = "other images than those that the run trained on: anything that data.root may be"
    parser.add_argument("--pictures", metavar="PATH", help=told)
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    options = parser.parse_args(arguments)
    if not (options.run / "config.yaml").is_file():
        raise UserError(f"{options.run} is no folder of a pre-training run: no config.yaml")
    # Both paths make the same crops.
    words = ["data.workers=0", "data.path=cpu", *[f"data.root={options.pictures}"] * bool(options.pictures)]
    config = load_saved(options.run / "config.yaml", words, options.trust)
    draw(options.run, config, options.images)
    print(f"figures in {options.run / 'figures'}")


def draw(folder: Path, config, n_images: int) -> None:  # type: ignore[no-untyped-def]
    """All figures of a run."""
    dataset, figures = build_dataset(config), folder / "figures"
    images = [dataset.read(i)[0] for i in range(n_images)]
    samples = [dataset.sample(i, image) for i, image in enumerate(images)]
    crops = [[*normalize(s.global_crops), *normalize(s.local_crops)] for s in samples]
    rules = dataset.rules
    has_field = rules.positions is not None and rules.positions.follows_crops
    in_field = ", the position boxes after shift and scale in the field P"
    places = in_field if has_field else "; every view has the same positions"
    pixels = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    figure = views_figure(pixels, [s.views for s in samples], crops, has_field)
    caption = f"Global (red) and local (blue) boxes in the image{places}, and the crops."
    save(figure, figures, "views.png", "Views and their positions", caption)
    batch = Collate(rules, n_images, config.run.seed).crops(samples).to(torch.device("cpu"))
    if batch.masks is not None:
        figure = masks_figure(batch.global_crops, batch.masks, rules.grid)
        caption = "Patches of the student's global crops whose content (white) or position (red) is replaced by a mask token."
        save(figure, figures, "masks.png", "Masks", caption)
    if rules.positions is not None and rules.positions.is_augmented:
        caption = f"Distributions of s as drawn (paper Fig. 3); the run uses {rules.positions.scale}."
        save(scales_figure(rules.positions), figures, "scales.png", "Scale s", caption)
    if (folder / "backbone.safetensors").is_file():
        side = 2 * rules.crops.global_px
        whole = [crop_resize(i, (0, 0, i.shape[1], i.shape[0]), False, side) for i in images]
        batch_of_whole = normalize(torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2))
        backbone = build_backbone(config.backbone.name, weights=folder / "backbone.safetensors")
        caption = "Attention of the query patch (red dot) over the image, mean of the heads."
        maps = query_attention(backbone.eval(), batch_of_whole, QUERIES)
        figure = attention_figure(batch_of_whole, maps, QUERIES)
        save(figure, figures, "attention.png", "Last-layer attention", caption)
