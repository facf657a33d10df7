"""Attention maps, PCA, figures, images of a running training, and k-NN."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photos import TINY, last, write_photos
from PIL import Image
from sklearn.decomposition import PCA
from tool_fixture import ended

from pretrain.analysis.attention import last_layer
from pretrain.analysis.figures import attention_figure, masked, masks_figure, training_images
from pretrain.analysis.pca import pca_colors, principal_components
from pretrain.backbones.vit import ViT
from pretrain.config import load_config
from pretrain.evaluation.knn import knn_predict
from pretrain.train import train
from pretrain.views.boxes import Views
from pretrain.views.masks import MaskSettings, draw_masks

ROOT = Path(__file__).resolve().parents[1]


def test_last_layer_attention_by_hand():
    torch.manual_seed(0)
    model = ViT(embed_dim=12, depth=2, num_heads=3, n_registers=2, pos_encoding="field").eval()
    x = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        tokens, _ = model.embed(x)
        q, k, _ = model.blocks[1].attn.heads(model.blocks[1].norm1(model.blocks[0](tokens)))
        scores = (q[0] @ k[0].transpose(-2, -1) / 2)[:, 3:, 3:]  # [heads, 6, 6]; sqrt(12 / 3) = 2
    expected = scores.softmax(-1).mean(0)  # cutting rows and renormalizing is a softmax over what is left
    got = last_layer(model, x).patches
    assert got.shape == (2, 6, 6)
    torch.testing.assert_close(got[0], expected, atol=1e-6, rtol=1e-5)
    seen = last_layer(model, x)
    torch.testing.assert_close(seen.features, model(x).patches, atol=1e-6, rtol=1e-5)
    of_cls = (q[0, :, :1] @ k[0].transpose(-2, -1) / 2)[:, 0, 3:].softmax(-1).mean(0)
    torch.testing.assert_close(seen.cls[0], of_cls, atol=1e-6, rtol=1e-5)


def test_components_equal_scikit_learns_up_to_the_fixed_sign():
    rows = np.random.default_rng(0).normal(size=(60, 5)) * [3, 1, 2, 0.1, 0.5] + 4
    oracle = PCA(3).fit(rows)
    largest = np.take_along_axis(oracle.components_, np.abs(oracle.components_).argmax(1)[:, None], axis=1)
    expected = oracle.transform(rows) * np.sign(largest[:, 0])
    got = principal_components(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-9)
    np.testing.assert_allclose(
        principal_components(torch.from_numpy(rows[::-1].copy())).numpy(), got[::-1], atol=1e-9
    )


def test_pca_colors_are_joint_and_scaled_by_percentiles():
    features = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 50, 6)))
    features[0] += 10 * torch.tensor([1.0, 0, 0, 0, 0, 0])  # one image is of another kind than the two others
    rgb = torch.stack(pca_colors(list(features)))
    assert rgb.shape == (3, 50, 3) and rgb.min() == 0 and rgb.max() == 1
    assert (
        rgb[0, :, 0].min() > rgb[1:, :, 0].max()
    )  # its color is another, for the components are those of all images
    clipped = ((rgb == 0) | (rgb == 1)).sum((0, 1)).tolist()
    assert clipped == [6, 6, 6]  # of 150 patches 3 lie below the 2nd and 3 above the 98th percentile


@pytest.mark.parametrize(
    ("encoding", "n_global", "n_local"), [("field", 2, 5), ("standard", 2, 0), ("standard", 1, 0)]
)
def test_pictures_of_a_running_training(encoding, n_global, n_local):
    n_images, rng = 5, np.random.default_rng(0)
    corners = torch.from_numpy(rng.uniform(0, 0.5, (n_images, n_global + n_local, 2))).float()
    boxes = torch.cat([corners, corners + 0.4], dim=-1)
    views = Views(boxes, torch.from_numpy(rng.random(boxes.shape[:2]) < 0.5), 0.5 * boxes + 0.3, n_global)
    masks = draw_masks(n_images, n_global, (2, 2), MaskSettings(), (0,))
    crops, small = torch.randn(n_global * n_images, 3, 32, 32), torch.randn(n_local * n_images, 3, 16, 16)
    torch.manual_seed(0)
    teacher = ViT(embed_dim=12, depth=2, num_heads=3, pos_encoding=encoding, mask_tokens=True).train()
    state = torch.get_rng_state()
    pictures = training_images(teacher, crops, small, views, masks, n_images=2)
    assert set(pictures) == {"views", "masks", "attention", "pca"}
    for picture in pictures.values():
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert min(picture.shape[:2]) > 200 and len(np.unique(picture)) > 50
    assert teacher.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in teacher.parameters())
    again = training_images(teacher, crops, small, views, masks, n_images=2)
    assert all(np.array_equal(pictures[name], again[name]) for name in pictures)
    unmasked = training_images(teacher, crops, small, views, None, n_images=2)
    assert set(unmasked) == {"views", "attention", "pca"}


@pytest.mark.parametrize("has_cls", [True, False])
def test_pictures_of_positions_that_are_not_tied_to_crops(has_cls, monkeypatch):
    """A post-training reads the field of its start over the whole of every crop: there is no place in P to
    show; or no [CLS]."""
    shown = []
    monkeypatch.setattr(
        "pretrain.analysis.figures.as_array", lambda figure: shown.append(figure) or np.zeros(1)
    )
    boxes, flips = torch.tensor([0.0, 0, 1, 1]).expand(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool)
    nothing = draw_masks(1, 2, (2, 2), MaskSettings(content_share=0.0, position_share=0.0), (0,))
    backbone = ViT(embed_dim=12, depth=1, num_heads=3, pos_encoding="field", has_cls=has_cls)
    titles = []
    for tied in (True, False):
        shown.clear()
        crops, small = torch.randn(2, 3, 32, 32), torch.randn(1, 3, 16, 16)
        training_images(backbone, crops, small, Views(boxes, flips, boxes, n_global=2, tied=tied), nothing)
        titles.append({axis.get_title() for figure in shown for axis in figure.axes})
    assert titles[0] - titles[1] == {"crops at their position boxes in P"} and titles[1] <= titles[0]
    assert ("attention of [CLS]" in titles[0]) == has_cls


@pytest.mark.parametrize("kind", ["content", "position"])
@pytest.mark.parametrize("level", [0, 40, 128, 255])
def test_masks_are_seen_on_any_picture(kind, level):
    mask = torch.tensor([[True, False], [False, False]])
    crop = torch.full((3, 80, 80), level, dtype=torch.uint8)
    pixels = masked(crop, mask, kind)
    assert np.allclose(pixels[:, 40:], level / 255) and np.allclose(pixels[40:], level / 255)
    assert np.abs(pixels[:40, :40] - level / 255).max(-1).mean() > 0.15


def test_a_figure_of_masks_has_no_blank_column():
    content = torch.zeros(6, 4, dtype=torch.bool)
    position = content.clone()
    content[:2, 0] = position[3:, 1] = True
    crops = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    axes = masks_figure(crops, SimpleNamespace(content=content, position=position), (2, 2)).axes
    assert [axis.get_title() for axis in axes] == 2 * ["content: 1 of 4 patches"] + [""] + 3 * [
        "position: 1 of 4 patches"
    ]


def test_attention_panels_have_titles_and_the_image_its_queries():
    images, maps = torch.zeros(2, 3, 32, 64, dtype=torch.uint8), torch.rand(2, 2, 2, 4)
    axes = attention_figure(
        images, maps, [(0.1, 0.1), (0.9, 0.6)], torch.rand(2, 2, 4), ("image", "of [CLS]")
    ).axes
    assert [axis.get_title() for axis in axes[:4]] == [
        "image",
        "of [CLS]",
        "attention of query 1",
        "attention of query 2",
    ]
    dots = [
        [(float(x[0]), float(y[0])) for x, y in (line.get_data() for line in axis.lines)] for axis in axes[4:]
    ]
    assert dots == [[(8, 8), (56, 24)], [], [(8, 8)], [(56, 24)]]


def test_pca_colors_of_another_network_come_near_to_the_first_ones():
    rng = np.random.default_rng(0)
    first = torch.from_numpy(rng.normal(size=(2, 30, 5)) * [5, 3, 2, 0.1, 0.1])
    turn = torch.linalg.qr(torch.from_numpy(rng.normal(size=(5, 5))))[0]
    alone, turned = (torch.cat(pca_colors(list(first @ turn), like=like)) for like in (None, list(first)))
    expected = torch.cat(pca_colors(list(first)))
    assert (turned - expected).abs().max() < 1e-4 < (alone - expected).abs().max()
    other_grid = [part[:20] for part in first]
    assert torch.equal(torch.cat(pca_colors(list(first @ turn), like=other_grid)), alone)


def test_knn_equals_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 6, generator=g), torch.randn(15, 6, generator=g)
    labels = torch.randint(0, 4, (40,), generator=g)
    expected = []
    for query in queries:
        cosine = [float(torch.nn.functional.cosine_similarity(query, b, dim=0)) for b in bank]
        near = sorted(range(40), key=lambda i: -cosine[i])[:7]
        votes = [
            sum(torch.tensor(cosine[i] / 0.07).exp().item() for i in near if labels[i] == c) for c in range(4)
        ]
        expected.append(votes.index(max(votes)))
    (got,) = knn_predict(bank, labels, queries, (7,), 4, 0.07)
    assert got.tolist() == expected
    assert torch.equal(knn_predict(bank, labels, bank, (1,), 4, 0.07)[0], labels)
    with pytest.raises(ValueError, match="k=41"):
        knn_predict(bank, labels, queries, (41,), 4, 0.07)


def test_a_runs_figures(tmp_path, capsys):
    write_photos(tmp_path / "photos")
    overrides = [
        *TINY,
        f"data.root={tmp_path / 'photos'}",
        f"run.output={tmp_path / 'run'}",
        "optim.epochs=1",
        "optim.warmup_epochs=0",
    ]
    train(load_config(None, last(overrides)))
    shutil.copytree(tmp_path / "run", tmp_path / "like")
    assert ended("analyze crops", tmp_path / "run", tmp_path / "like", "--images", 2) == 0
    captions = json.loads((tmp_path / "like" / "figures" / "captions.json").read_text())
    assert "nearest to those of run." in captions["pca.png"]["caption"]
    captions = json.loads((tmp_path / "run" / "figures" / "captions.json").read_text())
    assert set(captions) == {"views.png", "masks.png", "scales.png", "attention.png", "pca.png"}
    assert captions["pca.png"]["caption"].endswith("as red, green and blue.")
    for name, entry in captions.items():
        picture = Image.open(tmp_path / "run" / "figures" / name).convert("L")
        assert (
            picture.size[0] > 200 and len(picture.getcolors(256)) > 20 and entry["title"] and entry["caption"]
        )
