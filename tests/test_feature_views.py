"""Views of features: layers through hooks, PCA over images of several sizes, similarity, figures and the
page."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_fixture import randomize
from photos import write_photos
from PIL import Image
from sklearn.decomposition import PCA
from tool_fixture import load_tool

from pretrain.analysis.attention import patch_at
from pretrain.analysis.feature_figures import Boxed, Shown, boxes_figure, gallery, similarity_figure
from pretrain.analysis.figures import plain
from pretrain.analysis.pca import background_by_pca, pca_colors, read_place, similarity_to
from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.data.images import read_images, whole
from pretrain.data.sources import DataSettings
from pretrain.errors import UserError
from pretrain.evaluation.features import Features, frozen, layer_names
from pretrain.weights import save_backbone

CPU = torch.device("cpu")


def test_pictures_keep_their_aspect_to_whole_patches():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    assert whole(pixels, 56, 14).shape == (3, 56, 98) and whole(pixels, 56, 16).shape == (3, 64, 96)
    assert whole(pixels.transpose(1, 0, 2), 30, 2).shape == (3, 50, 30) and whole(
        pixels[:3], 2, 16
    ).shape == (3, 16, 64)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(whole(pixels, 60, 20), image)
    expected = F.interpolate(image[None].double(), size=(30, 50), mode="bicubic", antialias=True)[0].clamp(
        0, 255
    )
    assert (whole(pixels, 30, 2).double() - expected).abs().max() <= 2
    with pytest.raises(UserError, match="100 x 60 at size 2000 has 26000 patches"):
        whole(pixels, 2000, 16)


@pytest.mark.parametrize(
    "model_kwargs",
    [dict(), dict(has_cls=False, final_norm=False), dict(n_registers=2, patch_size=8, layerscale=0.3)],
)
def test_each_layer_is_what_flows_through_the_network(model_kwargs):
    backbone = randomize(ViT(embed_dim=24, depth=3, num_heads=2, **model_kwargs))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (35, 3, 32, 48), dtype=np.uint8))
    features, seen = Features(backbone, CPU, nullcontext()), {}
    with frozen(backbone):
        features.visit(
            images, lambda part, layer, patches: seen.setdefault(layer, []).append((part, patches))
        )
        pixels = torch.stack([image / 255 for image in images])
        pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
        x, _ = backbone.embed(pixels)
        expected = [x]
        for block in backbone.blocks:
            expected.append(x := block(x))
        if backbone.model_kwargs["final_norm"]:
            expected.append(backbone.norm(x))
    assert list(seen) == list(range(len(expected))) == list(range(len(layer_names(backbone))))
    for layer, tokens in enumerate(expected):
        assert [part for part, _ in seen[layer]] == [slice(0, 32), slice(32, 64)]
        got = torch.cat([patches for _, patches in seen[layer]])
        torch.testing.assert_close(got, tokens[:, backbone.n_prefix :], atol=1e-5, rtol=1e-4)
        with frozen(backbone):
            assert torch.equal(features.layer(images, layer), got) and torch.equal(
                features.layer(images, layer - len(expected)), got
            )


def test_similarity_equals_a_loop():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 5)))
    got = similarity_to(x, (1, 2), (3, 4))
    assert got.shape == (3, 4) and got[1, 2] == pytest.approx(1)
    for p in range(12):
        cosine = sum(float(a * b) for a, b in zip(x[p], x[6])) / float(x[p].norm() * x[6].norm())
        assert got[divmod(p, 4)].item() == pytest.approx(cosine, abs=1e-6)


def test_places():
    assert (
        patch_at((0, 0), (3, 4)) == (0, 0)
        and patch_at((1, 1), (3, 4)) == (2, 3)
        and patch_at((0.5, 0.4), (3, 4)) == (1, 2)
    )
    assert read_place("0.25,1") == (0.25, 1)
    for text in ("0.5", "a,b", "0.1,0.2,0.3", "1.5,0", "nan,0"):
        with pytest.raises(UserError, match=text):
            read_place(text)


def test_colors_over_pictures_of_several_sizes_are_those_of_all_their_patches():
    rows = np.random.default_rng(0).normal(size=(50, 6)) * [4, 3, 2, 1, 0.5, 0.2]
    parts = [torch.from_numpy(part) for part in np.split(rows, [12, 20])]
    got = pca_colors(parts)
    assert [len(part) for part in got] == [12, 8, 30]
    assert torch.equal(torch.cat(got), pca_colors([torch.from_numpy(rows)])[0])
    hidden = [torch.from_numpy(part) for part in np.split(np.arange(50) % 3 == 0, [12, 20])]
    kept = np.arange(50) % 3 != 0
    masked = torch.cat(pca_colors(parts, hidden)).numpy()
    assert not masked[~kept].any()
    oracle = PCA(3).fit(rows[kept])
    signs = np.sign(
        np.take_along_axis(oracle.components_, np.abs(oracle.components_).argmax(1)[:, None], 1)[:, 0]
    )
    scores = oracle.transform(rows[kept]) * signs
    low, high = np.quantile(scores, 0.02, axis=0), np.quantile(scores, 0.98, axis=0)
    np.testing.assert_allclose(masked[kept], ((scores - low) / (high - low)).clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_background_is_the_side_of_the_borders(sign):
    rng, grids, truth, features = np.random.default_rng(0), [(6, 8), (7, 5)], [], []
    for grid, box in zip(grids, [(2, 2, 5, 6), (0, 1, 5, 4)]):  # the second object touches the upper border
        mask = np.ones(grid, bool)
        mask[box[0] : box[2], box[1] : box[3]] = False
        truth.append(mask.ravel())
        features.append(
            torch.from_numpy(
                np.where(mask.ravel()[:, None], sign, -sign) * [5, 0, 0, 0] + rng.normal(size=(mask.size, 4))
            )
        )
    got = background_by_pca(features, grids)
    assert all(np.array_equal(part.numpy(), mask) for part, mask in zip(got, truth))


def test_names_are_shown_literally():
    assert plain("a $x$\n b") == r"a \$x\$ b"
    assert plain("x" * 50 + "end", 20) == "x" * 9 + "..." + "x" * 5 + "end"
    picture = np.zeros((20, 30, 3), np.uint8)
    figure = boxes_figure(
        [Boxed("$_^{", picture, np.array([[1, 2, 5, 6.0]]), {"lost": (np.array([0, 0, 3, 3.0]), True)})]
    )
    figure.canvas.draw()
    assert [patch.get_bbox().extents.tolist() for patch in figure.axes[0].patches] == [
        [1, 2, 5, 6],
        [0, 0, 3, 3],
    ]


def test_the_query_is_marked_at_its_patch():
    maps = {"a": [torch.rand(3, 4), torch.rand(3, 4)]}
    figure = similarity_figure(torch.zeros(3, 48, 64, dtype=torch.uint8), [(0.1, 0.1), (0.9, 0.5)], maps)
    marks = [tuple(float(v[0]) for v in axis.lines[0].get_data()) for axis in figure.axes[:4]]
    assert marks == 2 * [(8, 8), (56, 24)]
    low = min(float(m.min()) for m in maps["a"])
    assert (
        figure.axes[2].images[0].get_clim() == figure.axes[3].images[0].get_clim() == (pytest.approx(low), 1)
    )


def test_the_page_is_escaped_and_stands_alone(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    text = gallery(
        "<script>", {"<u>": ["<b>&"]}, [Shown('"><img src=x>', "<i>", (tmp_path / "a.png").read_bytes())]
    )
    assert (
        "<script" not in text
        and "<b>&<" not in text
        and "<img src=x" not in text
        and "<i>" not in text
        and "<u>" not in text
    )
    assert (
        "&lt;script&gt;" in text
        and "data:image/png;base64," in text
        and "http" not in text.replace("http-equiv", "")
    )


@pytest.fixture
def weights(tmp_path):
    write_photos(tmp_path / "photos", n=2, size=(90, 70))
    write_photos(tmp_path / "photos" / "<b>$tall$", n=1, size=(50, 80), seed=1)
    files = []
    for name, model_kwargs in (
        ("fourteen", dict(patch_size=14, has_cls=False)),
        ("registers", dict(n_registers=4, pos_encoding="field")),
    ):
        backbone = build_backbone("vit_tiny_patch16", depth=2, **model_kwargs)
        said = {"method": f"<i>{name}$"}
        files.append(
            save_backbone(
                tmp_path / f"{name}.safetensors",
                backbone.state_dict(),
                name="vit_tiny_patch16",
                model_kwargs=backbone.model_kwargs,
                provenance=said,
            )
        )
    return list(map(str, files))


@pytest.mark.parametrize(
    ("extra", "n_images"),
    [(["--foreground", "--query", "0.2,0.9"], 3), (["--layer", "1", "--max-images", "1"], 1)],
)
def test_the_tool(tmp_path, weights, extra, n_images):
    out = tmp_path / "out"
    rest = ["--images", str(tmp_path / "photos"), "--size", "64", "--device", "cpu", "--output", str(out)]
    load_tool("analyze features").main(["--weights", *weights, *rest, *extra])
    names = ["pca", *(f"similarity-{i + 1}" for i in range(n_images))]
    expected = {*(f"{name}.{kind}" for name in names for kind in ("png", "svg")), "captions.json"}
    assert {p.name for p in (out / "figures").iterdir()} == expected
    for name in names:
        picture = np.asarray(Image.open(out / "figures" / f"{name}.png").convert("RGB"))
        assert min(picture.shape[:2]) > 200 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    html = (out / "features.html").read_text()
    assert html.count("<img") == 1 + n_images and "&lt;i&gt;fourteen$" in html and "<i>" not in html
    assert ("$tall$" in html) == (n_images == 3) and "<b>$" not in html


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--layer", "4"], r"--layer 4: .* has layers 0 to 3 \(norm\)"),
        (["--size", "0"], "--size: 0 is less than 1"),
        (["--query", "0.5,2"], "query '0.5,2' lies outside"),
        (["--images", "/nowhere"], "/nowhere"),
        (["--size", "9999"], "patches"),
    ],
)
def test_the_tools_errors(tmp_path, weights, extra, said):
    rest = [
        "--images",
        str(tmp_path / "photos"),
        "--size",
        "64",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out"),
    ]
    with pytest.raises(UserError, match=said):
        load_tool("analyze features").main(["--weights", weights[0], *rest, *extra])


def test_pictures_at_equal_steps(tmp_path):
    (write_photos(tmp_path, n=6) / "002.jpg").write_bytes(b"no")
    found = read_images(DataSettings(root=str(tmp_path)), 3, lambda pixels: pixels.shape)
    assert found.names == ["000.jpg", "004.jpg"] and found.pixels == [(70, 90, 3)] * 2
    assert len(found.broken) == 1 and found.broken[0].startswith("002.jpg: ")


def test_a_broken_image_is_left_out_by_name_and_figures_of_before_are_removed(tmp_path, weights, capsys):
    out = tmp_path / "out"
    rest = ["--images", str(tmp_path / "photos"), "--size", "64", "--output", str(out), "--device", "cpu"]
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "captions.json").write_text(
        '{"views.png": {"title": "", "caption": ""}, "similarity-3.png": {}}'
    )
    for name in ("views.png", "similarity-3.png", "similarity-3.svg"):
        (out / "figures" / name).touch()
    (tmp_path / "photos" / "000.jpg").write_bytes(b"no")
    load_tool("analyze features").main(["--weights", weights[0], *rest])
    assert "left out: 000.jpg: " in capsys.readouterr().out
    names = {"pca", "similarity-1", "similarity-2"}
    assert {p.stem for p in (out / "figures").glob("*.svg")} == names
    captions = json.loads((out / "figures" / "captions.json").read_text())
    assert set(captions) == {"views.png", *(f"{name}.png" for name in names)}
    assert {p.stem for p in (out / "figures").glob("*.png")} == {*names, "views"}  # those of a training stay
    for file in (tmp_path / "photos").rglob("*.jpg"):
        file.write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 3 images of .* can be read; the first: 000.jpg"):
        load_tool("analyze features").main(["--weights", weights[0], *rest])
