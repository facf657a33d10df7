"""``figures/segmentations.png``: a few validation images, their ground truth, and the prediction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import nn

IGNORED_COLOUR = (225, 225, 225)
MAX_LEGEND = 24  # classes; more would not be read


def leave_figure(model: nn.Module, loader: Any, folder: Path, count: int = 4) -> Path:
    """Segment ``count`` images of a validation loader, evenly spaced, and draw them with a caption in ``captions.json``."""
    dataset = loader.dataset
    chosen = sorted({round(i) for i in np.linspace(0, len(dataset) - 1, count)})
    model.eval()
    rows: list[tuple[np.ndarray, ...]] = []
    for index in chosen:
        with torch.no_grad():
            sample = model.val_step(loader.collate_fn([dataset[index]]))[0]  # type: ignore[operator]
        truth, predicted = (field.data.squeeze(0).cpu().numpy() for field in (sample.gt_sem_seg, sample.pred_sem_seg))
        with Image.open(sample.img_path) as image:
            rows.append((np.asarray(image.convert("RGB")), truth, predicted))
    names = dataset.metainfo["classes"]
    # Of few classes the data set's colours, which mmseg draws at random, would be hard to tell apart.
    few = np.array(colormaps["tab20"](range(20)))[: len(names), :3] * 255
    palette = few if len(names) <= 20 else dataset.metainfo["palette"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "segmentations.png"
    draw(path, rows, np.array(palette, np.uint8), names, dataset.ignore_index)
    caption = {
        "title": "Segmentation of validation images",
        "caption": f"Each row: image, ground truth, prediction of the linear decoder. {len(rows)} of {len(dataset)} validation "
        "images, evenly spaced in the list; light grey: not labelled.",
    }
    captions = folder / "captions.json"
    others = json.loads(captions.read_text(encoding="utf-8")) if captions.is_file() else {}
    captions.write_text(json.dumps({**others, path.name: caption}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def draw(path: Path, rows: list[tuple[np.ndarray, ...]], palette: np.ndarray, names: tuple[str, ...], ignore_index: int) -> None:
    """Draw rows of image [H, W, 3], truth [H, W] and prediction [H, W], and the colours of the classes that occur.

    Args:
        palette: [classes, 3] uint8.
    """
    present = sorted({int(k) for row in rows for labels in row[1:] for k in np.unique(labels)} - {ignore_index})
    height = 2.0 * len(rows) + 0.5 + 0.2 * (min(len(present), MAX_LEGEND) // 6 + 1)
    figure = Figure(figsize=(8, height), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, (image, truth, predicted) in zip(axes, rows):
        for axis, shown in zip(line, (image, _coloured(truth, palette), _coloured(predicted, palette))):
            axis.imshow(shown)
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("image", "ground truth", "prediction")):
        axis.set_title(title, fontsize=10)
    if len(present) <= MAX_LEGEND:
        patches = [Patch(facecolor=palette[k] / 255, edgecolor="0.6", label=names[k]) for k in present]
        figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def _coloured(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """[H, W] -> [H, W, 3] uint8; ignored pixels are light grey."""
    colours = np.full((256, 3), IGNORED_COLOUR, np.uint8)
    colours[: len(palette)] = palette
    return colours[labels.astype(np.uint8)]
