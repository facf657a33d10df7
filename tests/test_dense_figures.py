"""Figures of a dense evaluation: where labels are drawn and in which colors, components before and after,
what a folder keeps."""

import json
from contextlib import nullcontext

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from test_dense_tables import dense

from pretrain.analysis.colors import DEFICIENT, HATCHED, _lab, distinct_colors
from pretrain.analysis.dense_figures import (
    MOST_IN_LEGEND,
    SHARE,
    components,
    labels_figure,
    painted,
    write,
)
from pretrain.analysis.pca import turned_like
from pretrain.build import build_backbone
from pretrain.evaluation.features import Features, frozen
from pretrain.results.report import build_report
from pretrain.results.runs import read_figures, read_run
from pretrain.results.schema import write_result

RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
CLASSES = ("sky", "sea", "sand", "a_long_name_of_$5", "grass")


def gray_image(height, width, level=128):
    return np.full((height, width, 3), level, np.uint8)


def halves(left, right, side=10):
    labels = np.full((side, side), right, np.int32)
    labels[:, : side // 2] = left
    return labels


def photo(seed, size=(40, 60)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def two_features():
    """Of two small networks."""
    found = []
    for seed, name in enumerate(("before", "after")):
        torch.manual_seed(seed)
        backbone = build_backbone("vit_tiny_patch16", depth=1)
        found.append((name, Features(backbone, torch.device("cpu"), nullcontext())))
    with frozen(found[0][1].backbone), frozen(found[1][1].backbone):
        yield found


# --- colors -----------------------------------------------------------------------------------------------


def test_lab_is_that_of_scikit_image():
    colors = np.random.default_rng(0).random((50, 3))
    np.testing.assert_allclose(_lab(colors)[0], rgb2lab(colors), atol=0.02)  # they round the white point


def test_the_simulations_keep_grays_and_merge_what_they_should():
    np.testing.assert_allclose(DEFICIENT.sum(-1), 1, atol=2e-6)

    def apart(eye, one, other):
        a, b = _lab(np.array([one, other], float))[eye]
        return np.linalg.norm(a - b)

    red, green = (0.8, 0.3, 0.2), (0.45, 0.5, 0.2)  # of about one lightness
    assert apart(2, red, green) < 0.5 * apart(0, red, green)  # deutan


def nearest_pair(colors):
    """Smallest distance of two of the colors, for each of the four eyes."""
    lab = _lab(np.array(colors))
    distances = np.linalg.norm(lab[:, :, None] - lab[:, None], axis=-1)
    distances[:, np.arange(len(colors)), np.arange(len(colors))] = np.inf
    return distances.min((1, 2))


def test_colors_differ_for_every_eye():
    assert nearest_pair(distinct_colors(20)).min() > 15  # 2 can just be told apart, side by side
    assert nearest_pair(distinct_colors(150)).min() > 4
    assert nearest_pair(matplotlib.colormaps["tab20"].colors).min() < 2  # the check can fail
    assert distinct_colors(20) == distinct_colors(150)[:20] and len(set(distinct_colors(256))) == 256
    chroma = np.hypot(*_lab(np.array(distinct_colors(256)))[0].T[1:])
    assert chroma.min() > 20  # none is taken for the gray of pixels that are not counted


# --- one image --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(36, 72), (720, 360), (50, 50)])
@pytest.mark.parametrize("side", [10, 100])
def test_a_label_covers_its_part_of_the_image(size, side):
    pixels = painted(gray_image(*size), halves(1, 2, side), {1: RED, 2: BLUE})
    height, width = pixels.shape[:2]
    assert max(height, width) == 360 and height / width == pytest.approx(size[0] / size[1], rel=0.01)
    gray = (1 - SHARE) * (0.3 + 0.7 * 128 / 255)
    middle = width // 2
    np.testing.assert_allclose(
        pixels[:, :middle], np.broadcast_to(SHARE * np.array(RED) + gray, (height, middle, 3))
    )
    np.testing.assert_allclose(
        pixels[:, middle:], np.broadcast_to(SHARE * np.array(BLUE) + gray, (height, width - middle, 3))
    )


def test_what_is_not_counted_is_hatched_in_gray():
    pixels = painted(gray_image(40, 40, 0), halves(0, 1), {1: RED})
    left = pixels[:, :180]
    assert (left == left[..., :1]).all()
    base = (1 - SHARE) * 0.3
    assert np.unique(left.round(6)).tolist() == [round(SHARE * level + base, 6) for level in HATCHED]
    assert not (pixels[:, 180:, 0] == pixels[:, 180:, 1]).any()


def test_outlines_lie_where_the_labels_change():
    plain = painted(gray_image(40, 40), halves(1, 1), {1: RED})
    lined = painted(gray_image(40, 40), halves(1, 1), {1: RED}, outlined=halves(3, 4))
    changed = (plain != lined).any((0, 2))
    assert changed.nonzero()[0].tolist() == [178, 179, 180]
    assert (lined[:, 179] == 0).all() and (lined[:, [178, 180]] == 1).all()


# --- a figure ---------------------------------------------------------------------------------------------


def legend_of(figure):
    """{class: color}."""
    (legend,) = figure.legends
    return {
        text.get_text(): patch.get_facecolor()[:3]
        for text, patch in zip(legend.get_texts(), legend.get_patches())
        if patch.get_alpha() != 0
    }


def drawn(figure, row, column):
    return figure.axes[row * len([a for a in figure.axes if a.get_title()]) + column].images[0].get_array()


def test_a_figure_shows_every_map_over_its_image_in_the_colors_of_the_legend():
    images, labels = [photo(0), photo(1, (60, 40))], [halves(1, 2), halves(2, 0)]
    maps = {"linear": [halves(1, 4, 7)] * 2, "in_context": [halves(2, 2, 20)] * 2}
    figure = labels_figure(images, labels, maps, CLASSES)
    colors = legend_of(figure)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "labels", "linear", "in context"]
    assert set(colors) == {"sky", "sea", r"a_long_name_of_\$5"}  # what occurs, no more
    by_number = {1: colors["sky"], 2: colors["sea"], 4: colors[r"a_long_name_of_\$5"]}
    for i in range(2):
        np.testing.assert_array_equal(drawn(figure, i, 0), images[i])
        for column, shown in enumerate((labels[i], maps["linear"][i], maps["in_context"][i]), 1):
            np.testing.assert_allclose(
                drawn(figure, i, column), painted(images[i], shown, by_number), atol=1e-6
            )
    plt.close(figure)


def test_a_class_keeps_its_color_whatever_was_predicted():
    labels = [halves(5, 3)]
    one, other = (
        labels_figure([photo(0)], labels, {"linear": [halves(1, guess)]}, CLASSES) for guess in (1, 2)
    )
    assert all(legend_of(one)[name] == legend_of(other)[name] for name in ("sand", "grass"))
    plt.close(one), plt.close(other)


def test_clusters_are_in_the_colors_of_their_classes_and_many_classes_are_counted():
    names = [f"class {i}" for i in range(1, 61)]
    labels = [np.arange(1, 61, dtype=np.int32).repeat(60).reshape(60, 60)]
    figure = labels_figure([photo(0)], labels, {"clustering": [labels[0][::-1]]}, names)
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert len(words) == MOST_IN_LEGEND + 1 and words[-1] == "and 28 more" and set(words[:-1]) <= set(names)
    figure_of_two = labels_figure(
        [photo(0)], [halves(2, 1)], {"clustering": [halves(1, 9)], "linear": [halves(1, 9)]}, names
    )
    colors = {number: legend_of(figure_of_two)[f"class {number}"] for number in (1, 9)}
    for column, outlined in ((2, halves(2, 1)), (3, None)):
        wanted = painted(photo(0), halves(1, 9), colors, outlined=outlined)
        np.testing.assert_allclose(drawn(figure_of_two, 0, column), wanted, atol=1e-6)
    plt.close(figure), plt.close(figure_of_two)


# --- components -------------------------------------------------------------------------------------------


def test_turning_undoes_a_turn():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 3, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 2.0, 1.0])
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(turned_like(scores @ turn, scores), scores)
    assert not torch.allclose(scores @ turn, scores, atol=0.5)
    other = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    turned = turned_like(other, scores)
    torch.testing.assert_close(turned @ turned.T, other @ other.T)  # as a whole
    assert (turned - scores).norm() <= (other - scores).norm()


class Turned:
    """The features of a network, turned as a whole: nothing about the patches changes, but the signs of
    their components do."""

    def __init__(self, features):
        self.features, self.backbone = features, features.backbone
        self.turn, _ = torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(1)))

    def __call__(self, images):
        for tokens in self.features(images):
            yield tokens._replace(patches=tokens.patches @ self.turn)


def test_colors_do_not_depend_on_the_signs_of_the_components(two_features):
    name, features = two_features[0]
    found = components([photo(i) for i in range(3)], [(name, features), ("turned", Turned(features))], 64)
    torch.testing.assert_close(found["turned"], found[name], atol=1e-3, rtol=0)


def test_components_before_and_after(two_features):
    images = [photo(i) for i in range(3)]
    found = components(images, two_features, 70)  # 64 px: whole patches
    assert list(found) == ["before", "after"]
    assert all(
        part.shape == (4, 4, 3) and 0 <= part.min() <= part.max() <= 1
        for parts in found.values()
        for part in parts
    )
    same = components(images, [("a", two_features[0][1]), ("b", two_features[0][1])], 64)
    torch.testing.assert_close(same["a"], same["b"])
    assert not torch.allclose(torch.stack(found["before"]), torch.stack(found["after"]), atol=0.1)


# --- what is left -----------------------------------------------------------------------------------------


def test_figures_of_a_run_and_its_page(tmp_path, two_features):
    images, labels = [photo(0), photo(1, (60, 40))], [halves(0, 2), halves(2, 3)]
    maps = {name: [halves(1, 2, 20)] * 2 for name in ("linear", "in_context", "clustering")}
    write_result(dense(), tmp_path)
    write(tmp_path, images, labels, maps, CLASSES, two_features, 64)
    shown = read_figures(tmp_path / "figures", [])
    assert [figure.title for figure in shown] == [
        "Segmentation and clusters",
        "Principal components of the patches",
    ]
    assert "Hatched gray: not counted." in shown[0].caption and "those of before" in shown[1].caption
    page = build_report([read_run(tmp_path / "result.json")])
    assert page.count("<img ") == 2 and all(figure.title in page for figure in shown)
    write(tmp_path, images, [halves(1, 2)] * 2, {"linear": maps["linear"]}, CLASSES, two_features[:1], 64)
    again = json.loads((tmp_path / "figures" / "captions.json").read_text())
    assert list(again) == ["segmentation.png", "components.png"]
    assert (
        not set(again["segmentation.png"]["caption"].split()) & {"gray:", "Clustering:"}
        and "turned" not in again["components.png"]["caption"]
    )


def test_nothing_to_draw_leaves_nothing(tmp_path):
    write(tmp_path, [], [], {"linear": []}, CLASSES, [], 64)
    assert read_figures(tmp_path / "figures", []) == []
