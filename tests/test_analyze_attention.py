"""tools/analyze_attention.py end to end: numbers, figures, page, results; what is broken, hostile, stopped
or done before."""

import csv
import os
import re
import signal
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from backbone_fixture import randomize
from photos import write_photos
from PIL import Image
from tool_fixture import load_tool

from pretrain.analysis import attention_study
from pretrain.analysis.attention import attention_statistics
from pretrain.analysis.attention_study import Measured, check_masks, read_statistics
from pretrain.build import build_backbone
from pretrain.cli import REQUEUE_CODE, run
from pretrain.data.decode import decode
from pretrain.errors import Interrupted, UserError
from pretrain.results import read_result
from pretrain.results.folder import unnamed
from pretrain.views.pixels import crop_resize, normalize
from pretrain.weights import save_backbone

HOSTILE = '<script>alert("1")</script> $\\frac{$ =1+1, "x"\n../../figures'
FLAGS = {"ours": dict(pos_encoding="field", pos_grid=5), "other": dict(n_registers=4, patch_size=8)}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Two tiny checkpoints of different patches, three photographs and a broken one."""
    folder = tmp_path_factory.mktemp("attention")
    write_photos(folder / "photos", n=3)
    (folder / "photos" / "001<b>.jpg").write_bytes(b"\xff\xd8\xff and no more")
    for seed, (name, model_kwargs) in enumerate(FLAGS.items()):
        model = randomize(build_backbone("vit_tiny_patch16", depth=2, **model_kwargs), seed)
        provenance = {"method": "<i>Method</i>", "effective_epochs": 12.5} if name == "ours" else {}
        (folder / name).mkdir()
        path = folder / name / "backbone.safetensors"
        save_backbone(
            path,
            model.state_dict(),
            name="vit_tiny_patch16",
            model_kwargs=model.model_kwargs,
            provenance=provenance,
        )
    return folder


def arguments(folder, output, *more):
    weights = [str(folder / name) for name in FLAGS]
    return [
        "--weights",
        *weights,
        "--images",
        str(folder / "photos"),
        "--size",
        "48",
        "--device",
        "cpu",
        "--output",
        str(output),
        *more,
    ]


@pytest.fixture(scope="module")
def analyzed(setting):
    """The output folder of one analysis, and what was printed."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        more = [
            "--names",
            "ours",
            HOSTILE,
            "--shown",
            "2",
            "--queries",
            "0.5,0.2",
            "0.9,0.6",
            "--compare-masks",
        ]
        masks = [str(setting / "ours" / "backbone.safetensors"), str(setting / "other")]
        load_tool("analyze attention").main(arguments(setting, setting / "out", *more, *masks))
    return setting / "out", lines


def undrawn(monkeypatch, tool):
    """Figures take seconds; what is not about them leaves them out."""
    monkeypatch.setattr(tool, "draw", lambda *_: [])


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_hand(setting, name):
    """Statistics of the three photographs, all at once."""
    photos = [decode((setting / "photos" / f"{i:03}.jpg").read_bytes()) for i in range(3)]
    squares = np.stack([crop_resize(photo, (0, 0, 90, 70), False, 48) for photo in photos])
    backbone = build_backbone("vit_tiny_patch16", setting / name / "backbone.safetensors").eval()
    return attention_statistics(backbone, normalize(torch.from_numpy(squares).permute(0, 3, 1, 2)))


def test_the_numbers_are_the_functions(setting, analyzed):
    output, _ = analyzed
    rows = read_csv(output / "statistics.csv")
    names = {
        "ours": "ours",
        "other": HOSTILE.replace("\n", "\\n"),
        "box-wise": "box-wise",
        "cross-wise": "cross-wise",
    }
    assert [row["weights"] for row in rows[:: 3 * 2 * 3]] == list(names.values())
    for i, name in enumerate(("ours", "other", "ours", "other")):
        expected, of_name = by_hand(setting, name), rows[i * 18 : (i + 1) * 18]
        for metric in ("nmi", "mad_px"):
            got = torch.tensor([float(row[metric]) for row in of_name], dtype=torch.float64).view(3, 2, 3)
            torch.testing.assert_close(got, getattr(expected, metric), atol=1e-5, rtol=1e-5)
    places = [(row["image"], row["layer"], row["head"]) for row in rows[:4]]
    assert places == [
        ("000.jpg", "1", "1"),
        ("000.jpg", "1", "2"),
        ("000.jpg", "1", "3"),
        ("000.jpg", "2", "1"),
    ]
    assert rows[6]["image"] == "001.jpg"


def test_the_summary_is_over_the_images(setting, analyzed):
    rows = read_csv(analyzed[0] / "summary.csv")
    heads = by_hand(setting, "ours").mad_px.mean(2)  # [3, 2]
    for layer in range(2):
        assert (
            rows[layer]["weights"] == "ours"
            and rows[layer]["layer"] == str(layer + 1)
            and rows[layer]["images"] == "3"
        )
        assert float(rows[layer]["mad_px_mean"]) == pytest.approx(heads[:, layer].mean().item(), rel=1e-6)
        assert float(rows[layer]["mad_px_std"]) == pytest.approx(heads[:, layer].std().item(), rel=1e-3)
    one = Measured("x", np.ones((1, 2, 3)), np.ones((1, 2, 3)))
    assert np.isnan(one.by_layer("nmi")[1]).all()


def test_results(analyzed):
    output, lines = analyzed
    result = read_result(output / "checkpoints" / "ours")
    assert (result.kind, result.method, result.backbone, result.effective_epochs) == (
        "analysis",
        "ours",
        "vit_tiny_patch16",
        12.5,
    )
    assert result.protocol.deviations == {"size_px": [480, 48], "images": [100, 3]}
    assert result.metrics["images"] == 3 and result.metrics["broken_images"] == 1 and result.weights_hash
    layers = [float(row["nmi_mean"]) for row in read_csv(output / "summary.csv")[:2]]
    assert list(result.metrics["nmi_by_layer"].values()) == layers and result.metrics["nmi"] == pytest.approx(
        np.mean(layers)
    )
    (other,) = (read_result(file) for file in output.glob("checkpoints/_script_*/result.json"))
    assert other.method == HOSTILE.replace("\n", "\\n")
    assert other.protocol.deviations["patch_px"] == [16, 8]
    assert any(line.startswith("left out: 001<b>.jpg: ") for line in lines)
    assert any(line.startswith("ours: 3 of 3 images, ") for line in lines)


def test_figures_and_the_page(analyzed):
    output, _ = analyzed
    assert not unnamed(output, "analysis")
    names = {"statistics", "heads_nmi", "heads_mad", "queries_01", "queries_02", "masks", "scales"}
    assert {path.stem for path in (output / "figures").glob("*.png")} == names
    for name in names:
        picture = Image.open(output / "figures" / f"{name}.png").convert("L")
        assert min(picture.size) > 150 and len(picture.getcolors(256)) > 20
        ElementTree.parse(output / "figures" / f"{name}.svg")
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") == len(names)
    assert "<script" not in page and "<b>.jpg" not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page and "001&lt;b&gt;.jpg" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "default-src 'none'" in page
    assert "size_px 480 → 48" in page and "images 100 → 3" in page


def test_what_is_measured_is_kept(setting, analyzed, tmp_path, monkeypatch, capsys):
    tool = load_tool("analyze attention")
    tool.main(arguments(setting, tmp_path, "--shown", "2", "--queries", "0.5,0.5"))
    capsys.readouterr()
    before = (tmp_path / "statistics.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(attention_study, "attention_statistics", lambda *_: pytest.fail("measured again"))
        tool.main(arguments(setting, tmp_path, "--shown", "1", "--queries", "0.5,0.5"))
    assert capsys.readouterr().out.count("measured before") == 2
    assert (tmp_path / "statistics.csv").read_bytes() == before
    assert {path.stem for path in (tmp_path / "figures").glob("queries_*.png")} == {
        "queries_01"
    }  # the others are of before
    undrawn(monkeypatch, tool)
    tool.main(arguments(setting, tmp_path, "--crop"))
    assert "measured before" not in capsys.readouterr().out
    assert (tmp_path / "statistics.csv").read_bytes() != before
    (own,) = tmp_path.glob("checkpoints/_i_Method_*/statistics.csv")
    own.write_text(own.read_text()[:-40])
    with pytest.raises(UserError, match="statistics.csv.*not whole"):
        tool.main(arguments(setting, tmp_path, "--crop"))


def test_other_pixels_of_the_same_names_are_measured_again(setting, tmp_path, monkeypatch, capsys):
    tool = load_tool("analyze attention")
    undrawn(monkeypatch, tool)
    for seed in range(2):
        photos = write_photos(tmp_path / "photos", n=1, seed=seed)
        tool.main([*arguments(setting, tmp_path / "out"), "--images", str(photos)])
        assert "measured before" not in capsys.readouterr().out


def test_a_stopped_run_goes_on(setting, tmp_path, monkeypatch):
    tool, measured = load_tool("analyze attention"), []
    plain = attention_study.attention_statistics

    def stopping(backbone, x, block):
        measured.append(backbone.patch_size)
        if len(measured) == 4:  # the first image of the second checkpoint
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(backbone, x, block)

    undrawn(monkeypatch, tool)
    monkeypatch.setattr(attention_study, "attention_statistics", stopping)
    with pytest.raises(Interrupted, match="SIGTERM at other, after 1 of 3 images"):
        tool.main(arguments(setting, tmp_path))
    (first,) = tmp_path.glob("checkpoints/*/result.json")
    assert read_result(first).method == "<i>Method</i>" and not (tmp_path / "statistics.csv").exists()
    monkeypatch.setattr("sys.argv", ["analyze_attention.py", *arguments(setting, tmp_path)])
    run(tool.main)
    assert measured == [16] * 3 + [8] * 4 and (tmp_path / "report.html").is_file()
    measured[:] = [0] * 3
    monkeypatch.setattr("sys.argv", ["analyze_attention.py", *arguments(setting, tmp_path / "again")])
    with pytest.raises(SystemExit) as stopped:
        run(tool.main)
    assert stopped.value.code == REQUEUE_CODE


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "56"], "size 56.*patches of 16 px; take 48 or 64 px"),
        (["--names", "a"], "1 names for 2 files"),
        (["--names", "a", "a"], "'a' names 2 weights"),
        (["--names", "a", " "], "' ' names 1 weights"),
        (["--source", "nothing"], "source 'nothing' is none of"),
        (["--images", "/no/such/folder"], "/no/such/folder"),
        (["--size", "9600"], "patches, more than"),
        (["--batch", "0"], "--batch: 0 is less than 1"),
    ],
)
def test_bad_input(setting, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        load_tool("analyze attention").main([*arguments(setting, tmp_path), *more])


def test_no_image_that_can_be_read(setting, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"none")
    with pytest.raises(UserError, match="none of the 1 images of .* can be read; the first: a.jpg"):
        load_tool("analyze attention").main(
            [*arguments(setting, tmp_path / "out"), "--images", str(tmp_path)]
        )
    with pytest.raises(UserError, match="nothing to analyze"):
        load_tool("analyze attention").main(["--images", str(tmp_path), "--output", str(tmp_path)])


def test_patches_of_one_size_for_all(setting, tmp_path, monkeypatch):
    tool = load_tool("analyze attention")
    undrawn(monkeypatch, tool)
    tool.main(arguments(setting, tmp_path, "--patch-size", "12", "--max-images", "1", "--bf16"))
    result = read_result(tmp_path / "checkpoints" / "other")
    assert result.protocol.deviations == {
        "size_px": [480, 48], "patch_px": [16, 12], "images": [100, 1], "bf16": [False, True],
    }  # fmt: skip
    assert len(read_statistics(tmp_path / "checkpoints" / "other" / "statistics.csv", "x").nmi) == 1


def test_mask_runs_must_be_what_they_are_called(tmp_path):
    for name in ("box", "cross"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"masks:\n  position_shape: {name}\n")
    box, cross = tmp_path / "box", tmp_path / "cross"
    check_masks(box, cross)
    with pytest.raises(UserError, match="cross has masks.position_shape=cross, not box"):
        check_masks(cross, box)
