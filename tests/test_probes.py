"""Online probes: against plain restatements; deterministic; no trace in the backbone or the random state;
bad folders by key."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ade_fixture import write_ade
from photos import TINY, last, write_photos
from PIL import Image
from sklearn.linear_model import Ridge
from tool_fixture import ended

from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.config import load_config
from pretrain.data.class_folders import open_class_folders
from pretrain.data.datasets import mask_rule, open_label_sets
from pretrain.data.datasets.maps import nearest
from pretrain.data.images import spread, square
from pretrain.errors import UserError
from pretrain.evaluation.features import Features, Moments, frozen
from pretrain.evaluation.in_context import InContextSettings, in_context
from pretrain.evaluation.knn import KnnSettings, knn_classification
from pretrain.evaluation.linear_segmentation import LinearSettings, linear
from pretrain.evaluation.position import centers, draw_masks, ridge
from pretrain.evaluation.probes import SCALED_DOWN, PositionProbe, Probes
from pretrain.train import train
from pretrain.views.pixels import MEAN, STD
from pretrain.weights import save_backbone

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def tiny_vit(**model_kwargs):
    torch.manual_seed(0)
    return ViT(
        **{
            **dict(embed_dim=24, depth=2, num_heads=2, pos_encoding="field", pos_grid=5, mask_tokens=True),
            **model_kwargs,
        }
    )


def random_images(n, side=64, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), dtype=np.uint8))


def features_of(backbone, autocast=None):
    return Features(backbone.eval(), CPU, autocast or nullcontext())


def write_classes(root, classes=("bird", "cat"), n=4):
    for part in ("train", "val"):
        for i, name in enumerate(classes):
            write_photos(root / part / name, n=n, seed=2 * i + (part == "val"))
    return root


@pytest.fixture
def sets(tmp_path):
    write_classes(tmp_path / "knn")
    write_ade(tmp_path / "ade")
    write_photos(tmp_path / "photos")
    return tmp_path


def config_of(folder, *extra):
    paths = [
        f"data.root={folder / 'photos'}",
        f"probes.knn_root={folder / 'knn'}",
        f"probes.seg_root={folder / 'ade'}",
    ]
    rest = [
        "probes.seg_classes=4",
        "probes.void=0,255",
        "probes.position=true",
        "probes.image_px=64",
        "probes.knn_k=3",
        "probes.every=5",
    ]
    return load_config(None, last([*TINY, *paths, *rest, *extra]))


def probes_of(config):
    return Probes(config.probes, config.data, config.backbone.patch_size)


def test_squares():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(
        square(pixels, 40, crop=True), image[:, :, 12:52]
    )  # the central square, at its own size
    whole = square(pixels, 32, crop=False)
    expected = F.interpolate(image[None].double(), size=(32, 32), mode="bicubic", antialias=True)[0].clamp(
        0, 255
    )
    assert (
        whole.dtype == torch.uint8 and (whole.double() - expected).abs().max() <= 2
    )  # each of the two passes rounds
    labels = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert nearest(labels, 2).tolist() == [[1, 3], [9, 11]]
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread("abc", 9) == ["a", "b", "c"]


def test_features_are_the_plain_forward_pass_in_batches():
    backbone, images = tiny_vit().eval(), random_images(33, side=32)
    mask = torch.from_numpy(np.random.default_rng(1).random((33, 4)) < 0.5)
    parts = list(features_of(backbone)(images, mask))
    assert [len(part.cls) for part in parts] == [32, 1]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    plain = backbone((images / 255 - mean) / std, position_mask=mask)
    torch.testing.assert_close(
        torch.cat([part.patches for part in parts]), plain.patches, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(torch.cat([part.cls for part in parts]), plain.cls, atol=1e-5, rtol=1e-5)


def test_frozen_gives_every_part_its_mode_back():
    backbone = tiny_vit().train()
    backbone.blocks[0].eval()
    before = [part.training for part in backbone.modules()]
    with pytest.raises(RuntimeError), frozen(backbone):
        assert not any(part.training for part in backbone.modules()) and not torch.is_grad_enabled()
        raise RuntimeError
    assert [part.training for part in backbone.modules()] == before and torch.is_grad_enabled()


def test_ridge_equals_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) * [1, 5, 0.1, 2, 1, 1] + [3, 0, 0, -7, 0, 0]
    x[:, 5] = 2.0  # a constant feature
    y = rng.normal(size=(50, 2)) + x[:, :2]
    moments = Moments(6, 2, CPU)
    for part in (slice(0, 20), slice(20, 50)):
        moments.add(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    std = np.where(x.std(0) > 0, x.std(0), 1)
    oracle = Ridge(alpha=6).fit((x - x.mean(0)) / std, y)
    np.testing.assert_allclose(
        ridge(moments)(torch.from_numpy(x)).numpy(), oracle.predict((x - x.mean(0)) / std), atol=1e-10
    )


def test_the_position_probe_equals_a_plain_restatement():
    backbone, images = tiny_vit().eval(), random_images(10)
    masks = draw_masks(10, (4, 4))
    assert masks.shape == (10, 16) and masks.sum(1).tolist() == [8] * 10
    assert centers(4)[6].tolist() == [2.5 / 4, 1.5 / 4]
    with torch.no_grad():
        got = PositionProbe(images)(features_of(backbone))
        patches = torch.cat([t.patches for t in features_of(backbone)(images, masks)]).double().numpy()
    place = np.array([[(j + 0.5) / 4, (i + 0.5) / 4] for i in range(4) for j in range(4)])
    rows = {
        part: [(patches[n, p], place[p]) for n in range(part, 10, 2) for p in range(16) if masks[n, p]]
        for part in (0, 1)
    }
    (x, y), (x_test, y_test) = (
        (np.array([r[0] for r in rows[p]]), np.array([r[1] for r in rows[p]])) for p in (0, 1)
    )
    oracle = Ridge(alpha=24).fit((x - x.mean(0)) / x.std(0), y)
    error = oracle.predict((x_test - x.mean(0)) / x.std(0)) - y_test
    assert got["probe/position_error"] == pytest.approx(np.linalg.norm(error, axis=1).mean(), rel=1e-6)
    assert got["probe/position_chance"] == pytest.approx(
        np.linalg.norm(y_test - y.mean(0), axis=1).mean(), rel=1e-9
    )
    total = ((y_test - y.mean(0)) ** 2).sum()
    assert got["probe/position_r2"] == pytest.approx(1 - (error**2).sum() / total, rel=1e-6)


def test_the_position_probe_sees_places_only_where_features_hold_them():
    """Images whose color is the place can be read; the same field without position in the images cannot,
    for it is masked."""
    ramp = torch.linspace(0, 255, 64)
    place = torch.stack(
        [ramp.expand(64, 64), ramp.view(64, 1).expand(64, 64), torch.full((64, 64), 128.0)]
    ).to(torch.uint8)
    backbone = tiny_vit(embed_dim=48).eval()
    with torch.no_grad():
        told = PositionProbe(place.expand(200, -1, -1, -1).contiguous())(features_of(backbone))
        untold = PositionProbe(random_images(200))(features_of(backbone))
    assert (
        told["probe/position_r2"] > 0.95
        and told["probe/position_error"] < 0.2 * told["probe/position_chance"]
    )
    assert untold["probe/position_r2"] < 0.2


def test_all_probes_leave_no_trace_and_repeat_themselves(sets):
    probes, backbone = (
        probes_of(config_of(sets)),
        build_backbone("vit_tiny_patch16", depth=2, mask_tokens=True, drop_path=0.5),
    )
    assert len(probes) == 3
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = probes.run(backbone.train(), CPU)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert all(part.training for part in backbone.modules()) and all(
        p.grad is None for p in backbone.parameters()
    )
    seg, position = ["seg_linear_miou", "seg_knn_miou"], ["position_error", "position_chance", "position_r2"]
    assert list(first) == [f"probe/{name}" for name in ("knn_top1", *seg, *position)]
    assert all(isinstance(value, float) and math.isfinite(value) for value in first.values())
    assert (
        json.dumps(probes.run(backbone, CPU))
        == json.dumps(probes_of(config_of(sets)).run(backbone, CPU))
        == json.dumps(first)
    )
    half = probes.run(backbone, CPU, torch.autocast("cpu", torch.bfloat16))
    assert half["probe/position_chance"] == first["probe/position_chance"]
    double = probes.run(backbone.double(), CPU)
    assert double["probe/position_error"] == pytest.approx(first["probe/position_error"], rel=1e-3)


def test_when_probes_are_due(sets):
    probes = probes_of(config_of(sets, "probes.seg_root=", "probes.position=false"))
    assert [it for it in range(1, 13) if probes.is_due(it, 12)] == [5, 10, 12]
    none = probes_of(load_config(None, TINY))
    assert len(none) == 0 and not none.is_due(10, 10) and none.run(tiny_vit(), CPU) == {}
    with pytest.warns(UserWarning, match=r"probes\.every is 0"):
        assert len(probes_of(config_of(sets, "probes.every=0"))) == 0
    with pytest.warns(UserWarning, match=r"neither probes\.knn_root"):
        probes_of(load_config(None, [*TINY, "probes.every=5"]))


def test_a_share_of_each_part(sets):
    of_classes, of_pixels, _ = probes_of(config_of(sets, "probes.max_images=3")).probes
    assert of_classes.train.labels().tolist() == [0, 0, 1] and len(of_classes.val) == 3
    assert len(of_pixels.train) == 3 and len(of_pixels.train.classes) == 4


def test_the_probes_are_the_evaluators_at_small_settings(sets):
    backbone = build_backbone("vit_tiny_patch16", depth=1)
    config = config_of(sets, "probes.position=false", "probes.image_px=32", "probes.max_images=6")
    found = probes_of(config).run(backbone, CPU)
    classes = [part.first(6) for part in open_class_folders(sets / "knn")]
    pixels = [part.first(6) for part in open_label_sets(sets / "ade", "folder", 4, mask_rule("0,255"))]
    small = InContextSettings(image_px=32, augment=False, passes=1, memory_size=50_000, k=3)
    with frozen(backbone):
        features = features_of(backbone)
        top1 = knn_classification(features, *classes, KnnSettings(resize_px=37, crop_px=32, k=(3,)))
        of_linear = LinearSettings(image_px=32, augment=False, batch_size=32, epochs=5)
        assert SCALED_DOWN["linear"]["epochs"] < LinearSettings().epochs  # a probe takes seconds on a CPU
        miou = linear(features, *pixels, of_linear)
        of_neighbors = in_context(features, *pixels, small)
    assert found == {
        "probe/knn_top1": top1.metrics["knn_top1_k3"],
        "probe/seg_linear_miou": miou.metrics["linear_miou"],
        "probe/seg_knn_miou": of_neighbors.metrics["in_context_miou"],
    }


@pytest.mark.parametrize(
    ("spoil", "extra", "said"),
    [
        (None, ["probes.knn_root=/nowhere"], r"probes\.knn_root: no folder /nowhere/train"),
        (lambda f: (f / "knn" / "val" / "cat").rename(f / "knn" / "val" / "dog"), [], r"probes\.knn_root: .*knn: class 'dog'"),
        (lambda f: (f / "knn" / "val" / "cat" / "000.jpg").write_bytes(b"no"), [], r"probes\.knn_root: .*val/cat/000\.jpg"),
        (None, ["probes.knn_k=9"], r"probes\.knn_k=9 is more than the 8"),
        (None, ["probes.seg_root=/nowhere"], r"probes\.seg_root with probes\.seg_classes=4: no folder /nowhere"),
        (None, ["probes.seg_classes=0"], r"probes\.seg_classes=0"),
        (None, ["probes.seg_classes=2"], r"probes\.seg_root with probes\.seg_classes=2: .*\.png holds the value \d"),
        (lambda f: (f / "ade/annotations/training/0001.png").unlink(), [], r"probes\.seg_root .*: 1 images have no label map"),
        (lambda f: (f / "ade/annotations/training/0001.png").write_bytes(b"x"), [], r"seg_root .*: .*0001\.png cannot be read"),
        (lambda f: Image.new("RGB", (40, 56)).save(f / "ade/annotations/training/0001.png"), [], r"0001\.png is no label map"),
        (lambda f: Image.new("L", (8, 8)).save(f / "ade/annotations/training/0001.png"), [], r"0001\.png has 8 x 8 pixels"),
        (lambda f: [Image.new("L", (56, 40)).save(f / f"ade/annotations/validation/{i:04}.png") for i in (0, 2)]
         + [Image.new("L", (40, 56)).save(f / "ade/annotations/validation/0001.png")], [], r"no labeled pixel in val"),
        (None, ["probes.image_px=72"], r"probes\.image_px=72 is no multiple of backbone\.patch_size=16"),
        (None, ["data.root=/nowhere"], r"data\.root"),
        (lambda f: [(f / f"photos/{i:03}.jpg").write_bytes(b"no") for i in range(5)], [], r"needs 2 images.* 1 can be read"),
    ],
)  # fmt: skip
def test_bad_folders_are_told_at_the_start(sets, spoil, extra, said):
    if spoil:
        spoil(sets)
    with pytest.raises(UserError, match=said) as error:
        probes_of(config_of(sets, *extra))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("extra", ["masks.position_share=0.0", "losses.position=0.0"])
@pytest.mark.filterwarnings("ignore:config. masks.position_share")
def test_a_run_that_hides_no_positions_is_not_asked_for_them(sets, extra):
    with pytest.raises(
        UserError, match="probes.position=true, but method=intertwined .*; set probes.position=false"
    ):
        train(config_of(sets, f"run.output={sets / 'run'}", extra))
    assert not (sets / "run").exists()


def test_a_broken_training_image_is_left_out_of_the_position_probe(sets):
    (sets / "photos" / "002.jpg").write_bytes(b"no")
    config = config_of(sets, "probes.knn_root=", "probes.seg_root=")
    assert len(probes_of(config).probes[0].images) == 5
    with pytest.raises(UserError, match=r"probes\.position: .*no position mask token"):
        probes_of(config).run(tiny_vit(mask_tokens=False), CPU)


def test_the_tool_gives_the_same_numbers(sets, capsys):
    backbone = build_backbone("vit_tiny_patch16", depth=2, mask_tokens=True, pos_encoding="field", pos_grid=7)
    weights = save_backbone(
        sets / "b.safetensors",
        backbone.state_dict(),
        name="vit_tiny_patch16",
        model_kwargs=backbone.model_kwargs,
    )
    roots = ["--knn-root", sets / "knn", "--seg-root", sets / "ade", "--position-root", sets / "photos"]
    numbers = [
        "--knn-k",
        3,
        "--void",
        "0,255",
        "--seg-classes",
        4,
        "--image-px",
        64,
        "--device",
        "cpu",
        "--json",
        sets / "out" / "probes.json",
    ]
    tool("--weights", weights, *roots, *numbers)
    found = json.loads((sets / "out" / "probes.json").read_text())
    assert (
        found["metrics"] == probes_of(config_of(sets)).run(backbone, CPU)
        and found["backbone"] == "vit_tiny_patch16"
    )
    assert "probe/knn_top1" in capsys.readouterr().out

    with pytest.raises(SystemExit) as ended:
        tool("--weights", weights)
    assert ended.value.code == 2 and "nothing to probe" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["standard", "field", "none"])
def test_the_tool_hides_positions_behind_their_mean_where_no_token_was_learned(sets, capsys, encoding):
    plain = build_backbone("vit_tiny_patch16", depth=1, pos_encoding=encoding)
    weights = save_backbone(
        sets / "plain.safetensors",
        plain.state_dict(),
        name="vit_tiny_patch16",
        model_kwargs=plain.model_kwargs,
    )
    numbers = ["--image-px", 64, "--device", "cpu", "--json", sets / "probes.json"]
    tool("--weights", weights, "--position-root", sets / "photos", *numbers)
    told = (
        "no positions that could be hidden"
        if encoding == "none"
        else "the mean of all positions stands for a hidden one"
    )
    assert told in capsys.readouterr().out
    found = json.loads((sets / "probes.json").read_text())["metrics"]

    probe = probes_of(config_of(sets, "probes.knn_root=", "probes.seg_root=")).probes[0]
    features, places = plain.eval().positions((4, 4)), centers(4)

    class Hidden(ViT):
        """The plain network, the positions of masked patches replaced by hand."""

        def positions(self, grid, boxes=None, flips=None):
            hidden = torch.where(self.now.unsqueeze(-1), features.mean(1, keepdim=True), features)
            return hidden if encoding != "none" else torch.zeros_like(hidden)

    plain.__class__ = Hidden
    rows = []
    with torch.no_grad():
        for image, mask in zip(probe.images, draw_masks(len(probe.images), (4, 4))):
            plain.now = mask[None]
            tokens = next(features_of(plain)(image[None]))
            rows.append((tokens.patches[0, mask], places[mask]))
    moments = Moments(192, 2, CPU)
    for x, y in rows[::2]:
        moments.add(x, y)
    errors = torch.cat([(ridge(moments)(x) - y).norm(dim=1) for x, y in rows[1::2]])
    assert found["probe/position_error"] == pytest.approx(errors.mean().item(), rel=1e-4)


def test_the_tool_probes_other_patch_sizes(sets):
    """14 divides neither crop of the recipe, which the probes have no use for."""
    backbone = build_backbone("vit_tiny_patch16", patch_size=14, depth=1)
    weights = save_backbone(
        sets / "b.safetensors",
        backbone.state_dict(),
        name="vit_tiny_patch16",
        model_kwargs=backbone.model_kwargs,
    )
    rest = ["--knn-k", 3, "--image-px", 56, "--device", "cpu", "--json", sets / "probes.json"]
    tool("--weights", weights, "--knn-root", sets / "knn", *rest)
    assert list(json.loads((sets / "probes.json").read_text())["metrics"]) == ["probe/knn_top1"]


def tool(*arguments):
    if code := ended("evaluate probes", *arguments):
        raise SystemExit(code)
