"""Look at patch features: their principal components as colors, and what is like a query patch.

posfield analyze features --weights runs/x/backbone.safetensors dino_vitbase16_pretrain.pth --images photos --output views \\
    --query 0.3,0.5 --query 0.7,0.5

Leaves figures/ (pca and one similarity-N an image, each .png and .svg) and features.html, which holds them all. The components
are those of all images together, for each checkpoint its own, turned so that the colors come nearest to the first one's.
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from pretrain.analysis.attention import patch_at
from pretrain.analysis.feature_figures import Shown, gallery, pca_figure, similarity_figure
from pretrain.analysis.figures import forget, keep
from pretrain.analysis.pca import Place, background_by_pca, pca_colors, read_place, similarity_to
from pretrain.cli import at_least, evaluation_parser, models_of, pictures_of
from pretrain.data.images import resized, whole
from pretrain.device import choose_device
from pretrain.errors import UserError
from pretrain.eval_model import EvalModel
from pretrain.evaluation.features import frozen_features, layer_names
from pretrain.files import write_text
from pretrain.results.folder import leave_readme

QUERIES = [(0.25, 0.5), (0.5, 0.5), (0.75, 0.5)]
Maps = dict[str, list[Tensor]]


def main(arguments: list[str]) -> None:
    """Parse, look at one checkpoint after the other, draw."""
    parser = evaluation_parser(__doc__, without=["--bf16"])
    add = parser.add_argument
    add("--size", type=int, default=448, metavar="PX", help="shorter side, to whole patches (%(default)s)")
    add("--max-images", type=int, default=6, help="at equal steps (%(default)s)")
    add("--query", action="append", default=[], metavar="X,Y", help="in image units; may be repeated")
    add("--layer", type=int, default=-1, help="0: embedding, k: after block k, %(default)s: last, normed")
    add("--foreground", action="store_true", help="PCA of the foreground, by the first component's sign")
    options = parser.parse_args(arguments)
    at_least(options, size=1, max_images=1)
    queries = [read_place(text) for text in options.query] or QUERIES
    subjects, device = models_of(options), choose_device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)  # an error now where it cannot be made
    pictures = pictures_of(options, lambda pixels: pixels)
    colors: Maps = {}
    first: list[Tensor] | None = None
    cosines: list[Maps] = [{} for _ in pictures.names]
    for subject in subjects:
        grids, features = look(subject, pictures.pixels, options, device)
        hidden = background_by_pca(features, grids) if options.foreground else None
        if hidden is not None and sum(int((~part).sum()) for part in hidden) < 3:
            raise UserError(f"{subject.label}: fewer than 3 foreground patches; leave out --foreground")
        rgbs = pca_colors(features, hidden, first)
        first = features if first is None else first
        colors[subject.label] = [rgb.unflatten(0, grid) for rgb, grid in zip(rgbs, grids)]
        for maps, x, grid in zip(cosines, features, grids):
            maps[subject.label] = [similarity_to(x, patch_at(query, grid), grid) for query in queries]
    images = []
    for pixels in pictures.pixels:  # as the figures show them, for any patch size
        height, width = (round(side * (options.size / min(pixels.shape[:2]))) for side in pixels.shape[:2])
        images.append(resized(pixels, (height, width)))
    found = draw(options, pictures.names, images, queries, colors, cosines)
    about = {
        "Images": [f"{len(images)}, shorter side {options.size} px"],
        "Checkpoints": [s.label for s in subjects],
        "Layer": [str(options.layer) if options.layer >= 0 else f"{options.layer}, counted from the last"],
    }
    file = write_text(options.output / "features.html", gallery("Patch features", about, found))
    leave_readme(options.output, "analysis")
    print(f"{file}: {len(subjects)} checkpoints, {len(images)} images")


def look(
    subject: EvalModel, pictures: list[np.ndarray], options: argparse.Namespace, device: torch.device
) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Grids (h, w) and patch features [N, D] of each image, of the layer that is asked for."""
    backbone = subject.build()
    names, patch = layer_names(backbone), backbone.patch_size
    if not -len(names) <= options.layer < len(names):
        layers = f"layers 0 to {len(names) - 1} ({names[-1]})"
        raise UserError(f"--layer {options.layer}: {subject.label} has {layers}")
    grids, found = [], []
    with frozen_features(backbone, device) as features:
        for pixels in pictures:
            image = whole(pixels, options.size, patch)
            grids.append((image.shape[1] // patch, image.shape[2] // patch))
            found.append(features.layer(image[None], options.layer)[0].cpu())
    return grids, found


def draw(
    options: argparse.Namespace, names: list[str], images: list[Tensor], queries: list[Place], colors: Maps,
    cosines: list[Maps],
) -> list[Shown]:  # fmt: skip
    """All figures, with the captions of the page."""
    caption = "The first three components of the patches of all images together, as red, green and blue; one row a checkpoint."
    if len(colors) > 1:
        caption += f" Those of the others are turned so that the colors come nearest to those of {next(iter(colors))}."
    if options.foreground:
        caption += " Black: the background, one side of the first component of all patches."
    folder = options.output / "figures"
    forget(folder, r"similarity-\d+")
    found = [keep(pca_figure(images, colors), folder, "pca", "Principal components", caption)]
    for number, (name, image, maps) in enumerate(zip(names, images, cosines), 1):
        figure = similarity_figure(image, queries, maps)
        caption = "Cosine similarity of every patch to the one with the red dot; one row a checkpoint."
        found.append(keep(figure, folder, f"similarity-{number}", f"Similarity: {name}", caption))
    return found
