"""The position probe layer by layer: against the training's probe, plain restatements, and networks whose
answer is known."""

import csv
import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from backbone_fixture import randomize
from photos import write_photos
from PIL import Image
from sklearn.linear_model import Ridge
from tool_fixture import load_tool

from pretrain.analysis.feature_figures import layers_figure
from pretrain.backbones.vit import ViT
from pretrain.build import build_backbone
from pretrain.errors import Interrupted, UserError
from pretrain.eval_model import open_models
from pretrain.evaluation.features import Features, frozen, layer_names
from pretrain.evaluation.position import (
    centers,
    csv_rows,
    draw_masks,
    hide_with,
    metrics,
    position_layers,
)
from pretrain.evaluation.probes import PositionProbe
from pretrain.log import Progress
from pretrain.results.schema import read_result
from pretrain.signals import StopSignals
from pretrain.views.pixels import normalize
from pretrain.weights import save_backbone

CPU = torch.device("cpu")
KINDS = [
    dict(pos_encoding="field", pos_grid=5),
    dict(has_cls=False, final_norm=False),
    dict(n_registers=2, layerscale=0.5, patch_size=8),
    dict(pos_encoding="none", relative_positions=True),
    dict(pos_encoding="rotary", n_registers=2, cls_norm=True),
]


def vit(**model_kwargs):
    return randomize(ViT(**{**dict(embed_dim=24, depth=2, num_heads=2, mask_tokens=True), **model_kwargs}))


def images_of(n, height=64, width=64):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, height, width), dtype=np.uint8))


def features_of(backbone):
    return Features(backbone, CPU, nullcontext())


@pytest.mark.parametrize("model_kwargs", KINDS)
def test_the_last_layer_is_the_probe_of_the_training(model_kwargs):
    backbone, images = vit(**model_kwargs), images_of(70)  # more than one batch of 32 in each half
    with frozen(backbone):
        expected = PositionProbe(images)(features_of(backbone))
        scores = position_layers(features_of(backbone), images, draws=2)
    hidden = [score for score in scores if score.patches == "hidden"]
    assert [score.name for score in hidden] == layer_names(backbone)
    got = {f"probe/position_{name}": value for name, value in hidden[-1].scores[0]._asdict().items()}
    assert got == expected
    assert hidden[-1].scores[1] != hidden[-1].scores[0] and hidden[-1].std("error") > 0
    assert (
        not backbone.blocks[0]._forward_hooks
        and not backbone.blocks[0]._forward_pre_hooks
        and not backbone.norm._forward_hooks
    )


@pytest.mark.parametrize("shape", ["cross", "box"])
def test_every_layer_equals_a_plain_restatement(shape):
    backbone, images = vit(n_registers=1), images_of(12, 48, 80)
    masks = draw_masks(12, (3, 5), shape, draw=1)
    assert (
        masks.shape == (12, 15)
        and masks.sum(1).tolist() == [8] * 12
        and not torch.equal(masks, draw_masks(12, (3, 5), shape))
    )
    with frozen(backbone):
        told: list[int] = []
        scores = position_layers(features_of(backbone), images, draws=2, shape=shape, tell=told.append)
        assert told == [6, 6, 6, 6]
        tokens, _ = backbone.embed(normalize(images), position_mask=masks)
        layers = [tokens]
        for block in backbone.blocks:
            layers.append(block(layers[-1]))
        layers.append(backbone.norm(layers[-1]))
    place = np.array([[(j + 0.5) / 5, (i + 0.5) / 3] for i in range(3) for j in range(5)])
    np.testing.assert_allclose(centers(3, 5).numpy(), place)
    assert len(scores) == 2 * len(layers)
    for score in scores:
        x = layers[score.layer][:, 2:].double().numpy()
        mask = masks.numpy() == (score.patches == "hidden")
        rows = [
            [(x[n, p], place[p]) for n in range(part, 12, 2) for p in range(15) if mask[n, p]]
            for part in (0, 1)
        ]
        (x, y), (x_test, y_test) = (map(np.array, zip(*part)) for part in rows)
        std = np.where(x.std(0) > 1e-6, x.std(0), 1)
        error = Ridge(alpha=24).fit((x - x.mean(0)) / std, y).predict((x_test - x.mean(0)) / std) - y_test
        total = ((y_test - y.mean(0)) ** 2).sum()
        got = score.scores[1]
        assert got.error == pytest.approx(np.linalg.norm(error, axis=1).mean(), rel=1e-4)
        assert got.r2 == pytest.approx(1 - (error**2).sum() / total, abs=1e-4)
        assert got.chance == pytest.approx(np.linalg.norm(y_test - y.mean(0), axis=1).mean(), rel=1e-9)


def planted(**model_kwargs):
    """Blocks that change nothing; the embedding of a patch is its mean color and its position."""
    backbone = vit(embed_dim=6, num_heads=1, final_norm=False, **model_kwargs)
    with torch.no_grad():
        for block in backbone.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
        backbone.patch_embed.proj.bias.zero_()
        backbone.patch_embed.proj.weight.copy_(torch.eye(6, 3).view(6, 3, 1, 1).expand(-1, -1, 16, 16) / 256)
    return backbone


def test_places_that_features_hold_linearly_are_read_exactly():
    levels = torch.arange(8).repeat_interleave(16).to(torch.uint8) * 30
    ramps = torch.stack(
        [
            levels.expand(128, 128),
            levels.view(-1, 1).expand(128, 128),
            torch.full((128, 128), 9).to(torch.uint8),
        ]
    )
    backbone = planted(pos_encoding="none")
    with frozen(backbone):
        scores = position_layers(features_of(backbone), ramps.expand(200, -1, -1, -1), draws=1)
    for score in scores:
        assert (
            score.mean("r2") == pytest.approx(1, abs=1e-5) and score.mean("error") < 1e-3
        )  # the ridge shrinks a little


def test_places_that_only_the_position_holds_are_read_where_it_was_given_and_not_where_it_was_hidden():
    backbone = planted(pos_grid=8, has_cls=False)
    x, y = torch.linspace(-1, 1, 8).expand(8, 8), torch.linspace(-1, 1, 8).view(8, 1).expand(8, 8)
    with torch.no_grad():
        backbone.pos_embed.copy_(torch.stack([0 * x, 0 * x, 0 * x, x, y, 0 * x], -1).flatten(0, 1)[None])
    noise = images_of(200, 128, 128)
    for mask in ("mean", "zero", "token"):
        assert hide_with(backbone, mask, True, (8, 8)) == mask
        with frozen(backbone):
            scores = position_layers(features_of(backbone), noise, draws=1)
        for score in scores:
            if score.patches == "given":
                assert score.mean("r2") == pytest.approx(1, abs=1e-5)
            else:
                assert abs(score.mean("r2")) < 0.01 and score.mean("error") == pytest.approx(
                    score.mean("chance"), rel=0.01
                )


def test_what_stands_for_a_hidden_position():
    backbone = vit()
    learned = backbone.pos_mask_token.clone()
    assert hide_with(backbone, "auto", True, (2, 3)) == "token" and torch.equal(
        backbone.pos_mask_token, learned
    )
    assert hide_with(backbone, "auto", False, (2, 3)) == "mean"
    torch.testing.assert_close(backbone.pos_mask_token[0], backbone.positions((2, 3))[0].mean(0))
    assert hide_with(backbone, "zero", True, (2, 3)) == "zero" and not backbone.pos_mask_token.any()
    with pytest.raises(UserError, match="no pos_mask_token"):
        hide_with(backbone, "token", False, (2, 3))
    rotary = vit(pos_encoding="rotary")
    for mask in ("auto", "mean", "zero"):
        assert hide_with(rotary, mask, False, (2, 3)) == "zero" and not rotary.pos_mask_token.any()
    without = vit(pos_encoding="none")
    assert hide_with(without, "auto", False, (2, 3)) == "none" and not without.pos_mask_token.any()


def test_one_draw_has_no_deviation(tmp_path, weights, capsys):
    with frozen(backbone := vit()):
        scores = position_layers(features_of(backbone), images_of(8), draws=1)
    assert not any(name.endswith("_std") for name in metrics(scores))
    rows = list(csv_rows("a", "mean", scores))
    assert {row["error_std"] for row in rows} == {row["r2_std"] for row in rows} == {""}
    layers_figure(rows)
    words = ["--images", tmp_path / "photos", "--output", tmp_path / "out", "--size", "64", "--device", "cpu"]
    load_tool("evaluate position").main(list(map(str, ["--weights", weights[0], *words, "--draws", "1"])))
    assert "+-" not in capsys.readouterr().out


def test_mean_and_deviation_over_the_draws():
    backbone = vit()
    with frozen(backbone):
        scores = position_layers(features_of(backbone), images_of(20), draws=3)
    last = scores[len(scores) // 2 - 1]
    errors = [score.error for score in last.scores]
    assert (
        len(errors) == 3
        and last.mean("error") == pytest.approx(np.mean(errors))
        and last.std("error") == pytest.approx(np.std(errors, ddof=1))
    )
    found = metrics(scores)
    assert found["position_error"] == last.mean("error") and found["position_best_r2"] == max(
        score.mean("r2") for score in scores if score.patches == "hidden"
    )
    figure = layers_figure([*csv_rows("a $ b", "mean", scores), *csv_rows("c", "token", scores)])
    lines = [line for line in figure.axes[0].lines if line.get_label() == r"a \$ b"]
    np.testing.assert_allclose(
        lines[0].get_ydata(), [s.mean("error") for s in scores if s.patches == "hidden"], atol=1e-6
    )


@pytest.fixture
def weights(tmp_path):
    """Ours with a token; patches of 14 and no [CLS]; no positions at all."""
    write_photos(tmp_path / "photos", n=6)
    kinds = {
        "ours": dict(mask_tokens=True, pos_encoding="field", pos_grid=7),
        "fourteen": dict(patch_size=14, has_cls=False),
    }
    kinds |= {"none": dict(pos_encoding="none")}
    files = []
    for name, model_kwargs in kinds.items():
        backbone = build_backbone("vit_tiny_patch16", depth=1, **model_kwargs)
        said = {"method": "same <b>" if name != "none" else "other", "effective_epochs": 350}
        file = tmp_path / name / "backbone.safetensors"
        files.append(
            save_backbone(
                file,
                backbone.state_dict(),
                name="vit_tiny_patch16",
                model_kwargs=backbone.model_kwargs,
                provenance=said,
            )
        )
    return files


def test_the_tool(tmp_path, weights, capsys):
    tool, out = load_tool("evaluate position"), tmp_path / "out"
    rest = [
        "--images",
        str(tmp_path / "photos"),
        "--output",
        str(out),
        "--size",
        "64",
        "--draws",
        "2",
        "--device",
        "cpu",
    ]
    tool.main(["--weights", *map(str, weights), *rest])
    said = capsys.readouterr().out
    assert (
        "hidden positions are replaced by the token" in said
        and "replaced by the mean" in said
        and "none to hide" in said
    )
    with open(out / "position_layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = ["same <b>, ours", "same <b>, fourteen", "other"]
    assert list(dict.fromkeys(row["checkpoint"] for row in rows)) == labels
    assert [row["hidden_by"] for row in rows if row["after"] == "norm" and row["patches"] == "hidden"] == [
        "token",
        "mean",
        "none",
    ]
    ours = [row for row in rows if row["checkpoint"] == labels[0]]
    assert [row["after"] for row in ours] == ["embedding", "block 1", "norm"] * 2
    results = [read_result(file) for file in (out / s.folder for s in open_models(weights))]
    assert [result.backbone for result in results] == ["vit_tiny_patch16"] * 3 and len(
        {r.config_hash for r in results}
    ) == 2
    first = results[0]
    assert (
        first.kind == "analysis"
        and first.method == "same <b>"
        and first.effective_epochs == 350
        and first.weights_hash
    )
    assert first.protocol.deviations == {"size": [224, 64], "draws": [3, 2]} and first.metrics["images"] == 6
    assert results[1].protocol.deviations["size"] == [224, 70]
    assert f"{first.metrics['position_r2']:.6f}" == ours[2]["r2"]
    picture = np.asarray(Image.open(out / "figures" / "position_layers.png"))
    assert min(picture.shape[:2]) > 300 and len(np.unique(picture)) > 30
    assert "<svg" in (out / "figures" / "position_layers.svg").read_text()

    before = (
        (out / "position_layers.csv").read_bytes(),
        (out / "figures" / "position_layers.svg").read_bytes(),
    )
    tool.main(["--weights", *map(str, weights), *rest])
    assert (
        (out / "position_layers.csv").read_bytes(),
        (out / "figures" / "position_layers.svg").read_bytes(),
    ) == before
    assert capsys.readouterr().out.count("measured before") == 3


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--mask", "token"], "no pos_mask_token"),
        (["--size", "9999"], "patches, more than"),
        (["--draws", "0"], "--draws: 0"),
        (["--max-images", "1"], "--max-images: 1"),
        (["--images", "/nowhere"], "/nowhere"),
        (["--weights", "/nowhere.pth"], "/nowhere.pth"),
    ],
)
def test_the_tools_errors(tmp_path, weights, extra, said):
    rest = [
        "--images",
        str(tmp_path / "photos"),
        "--output",
        str(tmp_path / "out"),
        "--size",
        "64",
        "--device",
        "cpu",
    ]
    with pytest.raises(UserError, match=said) as error:
        load_tool("evaluate position").main(["--weights", str(weights[1]), *rest, *extra])
    assert "\n" not in str(error.value)


def test_checkpoints_are_named_apart(weights, tmp_path):
    subjects = open_models([weights[0], weights[0], weights[2]])
    assert [s.label for s in subjects] == ["same <b>, ours, #1", "same <b>, ours, #2", "other"] and subjects[
        2
    ].folder == "checkpoints/other"
    named = open_models(weights, names=["x", "y", "..\n"])
    assert [(s.label, s.method) for s in named] == [("x", "x"), ("y", "y"), ("..\\n", "..\\n")]
    for names, said in ((["x", "y", "x"], "'x' names 2 weights"), (["x", "y", " "], "' ' names 1 weights")):
        with pytest.raises(UserError, match=said):
            open_models(weights, names=names)
    with pytest.raises(UserError, match="--names: 1 names for 3 files"):
        open_models(weights, names=["x"])
    (of_run,) = open_models([weights[0].parent], source="posfield", patch_px=8)
    assert (
        of_run.path == weights[0]
        and of_run.build().patch_size == of_run.patch_px == 8
        and of_run.build().pos_encoding == "field"
    )
    with pytest.raises(UserError, match="none of"):
        open_models(weights, source="nobody")
    backbone = subjects[0].build(mask_tokens=True)
    said = {"position_masks": False}  # a run without position masks: its token is as it was drawn
    drawn = save_backbone(
        tmp_path / "d.safetensors",
        backbone.state_dict(),
        name="vit_tiny_patch16",
        model_kwargs=backbone.model_kwargs,
        provenance=said,
    )
    assert not open_models([drawn])[0].has_token
    assert [s.label for s in open_models([drawn, drawn])] == ["d, #1", "d, #2"]  # its name would tell nothing
    assert [s.has_token for s in subjects] == [True, True, False] and not subjects[0].build().training
    assert (
        subjects[2].build(mask_tokens=True).model_kwargs["mask_tokens"]
        and not subjects[2].build().model_kwargs["mask_tokens"]
    )
    subjects[0].write(tmp_path / "r", "p", {"a": (1, 1)}, {"m": 1.0}, 0.0)
    assert subjects[0].found(tmp_path / "r", "p", {"a": (1, 1)}).metrics == {"m": 1.0}
    assert not subjects[0].found(tmp_path / "r", "p", {"a": (1, 2)}) and not subjects[2].found(
        tmp_path / "r", "p", {"a": (1, 1)}
    )
    assert not replace(subjects[0], patch_px=8).found(tmp_path / "r", "p", {"a": (1, 1)})
    content = json.loads((tmp_path / "r" / "result.json").read_text())
    assert (
        content["protocol"]["full"]
        and math.isfinite(content["wall_time_s"])
        and content["peak_memory_mib"] > 0
    )


def test_progress_stops_where_something_is_left(capsys):
    signals = StopSignals()
    tell = Progress("x", 3, signals)
    tell()
    assert not capsys.readouterr().out
    signals.received = "SIGTERM"
    with pytest.raises(Interrupted, match="SIGTERM at x, after 2 of 3 images"):
        tell()
    tell()
    assert capsys.readouterr().out.startswith("x: 3 of 3 images, ")


def test_folders_of_any_labels(weights):
    (one,) = open_models(weights[:1])
    labels = [
        "a",
        "a b",
        "a_b",
        "..",
        "",
        "x" * 200,
        "x" * 201,
        "ä",
        '<script>alert("1")</script>\n../../figures',
    ]
    folders = [replace(one, label=label).folder for label in labels]
    assert (
        len(set(folders)) == len(labels) and folders[0] == "checkpoints/a" and folders[2] == "checkpoints/a_b"
    )
    assert all(re.fullmatch(r"checkpoints/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,80}", folder) for folder in folders)
