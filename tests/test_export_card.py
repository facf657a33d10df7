"""Model cards: their code runs as it stands, their facts are the file's, and what nobody told is unknown."""

import importlib.util
import re

import pytest
import torch
import yaml
from backbone_fixture import randomize
from tool_fixture import load_tool

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.export import FORMATS, convert, export, model_card
from pretrain.results import Protocol, Result, file_hash, write_result
from pretrain.weights import read_checkpoint, save_backbone

TINY = "vit_tiny_patch16"
PACKAGE = {"onnx": "onnxruntime", "timm": "timm", "huggingface": "transformers"}
FULL = Protocol(name="coco-12ep", version=1, full=True, deviations={})
SHORT = Protocol(name="ade20k-160k", version=1, full=False, deviations={"max_iters": [160000, 2000]})


def backbone(**model_kwargs):
    return randomize(build_backbone(TINY, depth=2, **model_kwargs))


@pytest.fixture(scope="module")
def tool():
    return load_tool("export")


@pytest.fixture
def weights(tmp_path):
    """A file of ours, as pre-training leaves it."""
    vit = backbone(pos_encoding="field", pos_grid=5, layerscale=0.3)
    told = {"method": "intertwined", "effective_epochs": 347.25, "seed": 3, "config_hash": "0123456789ab"}
    return save_backbone(
        tmp_path / "backbone.safetensors",
        vit.state_dict(),
        name=TINY,
        model_kwargs=vit.model_kwargs,
        provenance=told,
    )


def measured(folder, weights_hash, kind="detection", protocol=FULL, **metrics):
    return write_result(
        Result(kind=kind, method="intertwined", backbone=TINY, effective_epochs=347.25, protocol=protocol, metrics=metrics, seed=0,
               config_hash="c", weights_hash=weights_hash, git_commit=None, packages={}, hardware={}, wall_time_s=1.0,
               peak_memory_mib=None),
        folder,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    "format, model_kwargs",
    [
        *((format, dict(pos_encoding="field")) for format in FORMATS),
        *((format, dict(n_registers=4, layerscale=0.3)) for format in ("timm", "huggingface", "safetensors")),
    ],
)
def test_the_code_in_a_card_runs_and_gives_our_features(tmp_path, monkeypatch, format, model_kwargs):
    if format in PACKAGE and importlib.util.find_spec(PACKAGE[format]) is None:
        pytest.skip(f"{PACKAGE[format]} is not installed (pip install 'posfield[export]')")
    vit, file = backbone(**model_kwargs), f"exported{FORMATS[format].suffix}"
    export(vit, format, (32, 32), tmp_path / file)
    card = model_card(vit, format, (32, 32), 1e-6, file=file)
    monkeypatch.chdir(tmp_path)
    image = torch.randn(2, 3, 32, 32)
    place = {"image": image}
    exec(re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1], place)
    expected = vit(image)
    torch.testing.assert_close(torch.as_tensor(place["cls"]), expected.cls, rtol=0, atol=1e-5)
    patches = (
        place["patches"]
        if "patches" in place
        else torch.as_tensor(place["feature_map"]).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(patches, expected.patches, rtol=0, atol=1e-5)


def test_a_card_tells_what_the_file_says(tmp_path, weights, tool, capsys):
    pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install 'posfield[export]')"
    )
    out = tmp_path / "exported"
    tool.main(["--weights", str(weights), "--format", "huggingface", "--size", "48", "--output", str(out)])
    shown = capsys.readouterr().out
    assert (
        "48 x 48 px, largest relative difference" in shown and f"AutoModel.from_pretrained('{out}')" in shown
    )
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "image-feature-extraction"
    assert "license" not in head and "datasets" not in head
    for fact in (
        "# ViT-T/16, intertwined",
        "| Effective epochs | 347 |",
        "| Pre-training data | unknown |",
        "a position field of 5 x 5 samples; the file holds the field's values at the 3 x 3 patches of a 48 x 48 px image",
        f"| Exported from a file of SHA-256 (first 12 digits) | {file_hash(weights)} |",
        "| Config hash | 0123456789ab |",
        "mean [0.485, 0.456, 0.406]",
        "None were given",
        "The license of the weights",
    ):
        assert fact in card, fact
    assert str(tmp_path) not in card and "Made from a file" not in card  # it is that file


@pytest.mark.parametrize("format", ["timm", "huggingface"])
def test_an_export_that_is_read_again_remembers_its_method(tmp_path, weights, tool, format):
    """By its class alone, a folder with LayerScale would be DINOv2."""
    if importlib.util.find_spec(PACKAGE[format]) is None:
        pytest.skip(f"{PACKAGE[format]} is not installed (pip install 'posfield[export]')")
    out, again = tmp_path / "exported", tmp_path / "again.safetensors"
    tool.main(["--weights", str(weights), "--format", format, "--size", "32", "--output", str(out)])
    tool.main(["--weights", str(out), "--format", "posfield", "--output", str(again)])
    told = read_checkpoint(again).provenance
    assert told["method"] == "intertwined" and told["effective_epochs"] == 347.25 and told["seed"] == 3
    assert told["source"] == format and told["weights_hash"] == file_hash(weights)


def test_what_is_unknown_is_said_to_be(tmp_path):
    card = model_card(backbone(), "safetensors", (32, 32), 0.0, file="a.safetensors")
    assert "# ViT-T/16, method unknown" in card
    for key in (
        "Method",
        "Effective epochs",
        "Pre-training data",
        "Exported from a file of SHA-256 (first 12 digits)",
    ):
        assert f"| {key} | unknown |" in card


@pytest.mark.parametrize(
    "model_kwargs, size, sentence",
    [
        (dict(pos_grid=2), (32, 32), "Learned for 2 x 2 patches, and stored as learned."),
        (
            dict(pos_grid=2),
            (64, 32),
            r"Learned for 2 x 2 patches; the file holds them resampled \(dinov2\) to the 4 x 2 patches",
        ),
        (dict(pos_encoding="none"), (32, 32), "The network has no positions"),
        (dict(pos_encoding="rotary"), (32, 48), "queries and keys of patches are turned by their places"),
        (dict(layerscale=0.3), (32, 32), "LayerScale is multiplied into"),
        (dict(patch_size=14), (28, 28), "# ViT-T/14, method unknown"),
    ],
)
def test_a_card_says_what_the_export_did(model_kwargs, size, sentence):
    assert re.search(
        sentence, model_card(backbone(**model_kwargs), "torchvision", size, 0.0, file="a.safetensors")
    )


def test_results_stand_in_the_tables_that_mark_them(tmp_path, weights, tool):
    """A run that was scaled down never stands bare, and a run of other weights not at all."""
    own, card = file_hash(weights), tmp_path / "card.md"
    measured(tmp_path / "runs" / "a", own, box_ap=41.25, mask_ap=36.5)
    measured(tmp_path / "runs" / "b", own, kind="segmentation", protocol=SHORT, miou=37.75)
    measured(tmp_path / "runs" / "c", "ffffffffffff", box_ap=99.0)
    arguments = [
        "--weights",
        str(weights),
        "--format",
        "safetensors",
        "--size",
        "32",
        "--output",
        str(tmp_path / "a.safetensors"),
    ]
    tool.main([*arguments, "--card", str(card), "--results", str(tmp_path / "runs")])
    text = card.read_text()
    assert "41.2" in text and "36.5" in text and "99.0" not in text
    assert re.search(r"37\.\d ‡1", text) and "max\\_iters 160000 → 2000" in text
    assert (
        "ade20k-160k, scaled down (1 change)" in text
        and "published" not in text.split("## Results")[1].split("- ")[0]
    )
    with pytest.raises(UserError, match="results: none of the 1 there was measured with these weights"):
        tool.main([*arguments, "--card", str(card), "--results", str(tmp_path / "runs" / "c")])


def test_results_of_a_folder_are_known_by_the_hash_that_its_runs_report(tmp_path, weights, tool):
    """A folder of another library's: not that of its one file, which may be an index of parts."""
    folder, card = tmp_path / "theirs", tmp_path / "new" / "card.md"
    export(backbone(), "timm", (32, 32), folder)
    measured(tmp_path / "runs", file_hash(folder), box_ap=41.25)
    arguments = [
        "--weights",
        str(folder),
        "--format",
        "safetensors",
        "--size",
        "32",
        "--output",
        str(folder / "a.safetensors"),
    ]
    told = file_hash(folder)
    tool.main([*arguments, "--card", str(card), "--results", str(tmp_path / "runs")])
    assert (
        "41.2" in card.read_text() and told in card.read_text()
    )  # as it was read, without what was written into it


def test_what_was_measured_before_a_fine_tuning_is_not_its_result(tmp_path, tool):
    vit, file, told = backbone(), tmp_path / "a.safetensors", {"weights_hash": "ffffffffffff"}
    measured(tmp_path / "runs", "ffffffffffff", box_ap=41.25)
    arguments = [
        "--weights",
        str(file),
        "--format",
        "timm",
        "--size",
        "32",
        "--results",
        str(tmp_path / "runs"),
        "--output",
    ]
    save_backbone(
        file, vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs, provenance=told
    )  # only converted
    tool.main([*arguments, str(tmp_path / "b")])
    save_backbone(
        file,
        vit.state_dict(),
        name=TINY,
        model_kwargs=vit.model_kwargs,
        provenance={**told, "fine_tuned": "detection"},
    )
    with pytest.raises(UserError, match="none of the 1 there was measured with these weights"):
        tool.main([*arguments, str(tmp_path / "c")])


@pytest.mark.parametrize(
    "told", [{"effective_epochs": "abc"}, {"effective_epochs": [1]}, {"method": ["x"]}, {"weights_hash": {}}]
)
def test_what_a_file_says_of_itself_may_be_nonsense(tmp_path, told):
    vit = backbone()
    save_backbone(
        tmp_path / "a.safetensors",
        vit.state_dict(),
        name=TINY,
        model_kwargs=vit.model_kwargs,
        provenance=told,
    )
    with pytest.raises(UserError, match=rf"a\.safetensors has damaged metadata \({[*told][0]} "):
        read_checkpoint(tmp_path / "a.safetensors")


def test_the_weights_are_never_replaced_by_their_export(tmp_path, weights, tool):
    export(backbone(), "timm", (32, 32), tmp_path / "theirs")
    for file, format, output in [
        (weights, "safetensors", weights),
        (tmp_path / "theirs", "huggingface", tmp_path / "theirs"),
        (tmp_path / "theirs" / "model.safetensors", "timm", tmp_path / "theirs"),
    ]:
        with pytest.raises(UserError, match=f"--output: {output} would replace the weights themselves"):
            tool.main(["--weights", str(file), "--format", format, "--size", "32", "--output", str(output)])


@pytest.mark.parametrize(
    ("start", "shown"),
    [
        (
            {"method": "iBOT", "effective_epochs": 3200, "hash": "abcdef012345"},
            "iBOT, 3200 effective epochs, file of SHA-256 abcdef012345",
        ),
        ({"file": "dino.pth", "hash": "abcdef012345"}, "method unknown, file of SHA-256 abcdef012345"),
        (None, None),
        ("nonsense", None),
    ],
)
def test_a_post_trained_backbone_says_what_it_started_from(start, shown):
    told = {"method": "paka", "effective_epochs": 25.0, "started_from": start}
    card = model_card(backbone(), "safetensors", (32, 32), 0.0, file="a.safetensors", provenance=told)
    assert (f"| Started from | {shown} |" in card) if shown else ("Started from" not in card)


@pytest.mark.parametrize(
    "told",
    [{"license": "DINOv3 License"}, {"started_from": {"method": "DINOv3", "license": "DINOv3 License"}}],
)
def test_the_license_of_the_weights(told):
    """Their own, or of those that they were trained on from."""
    card = model_card(backbone(), "safetensors", (32, 32), 0.0, file="a.safetensors", provenance=told)
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["license_name"]) == ("other", "dinov3-license")
    assert "weights under the DINOv3 License: read it" in card and "Not stated here" not in card


def test_text_from_files_is_escaped():
    told = {"method": "a | b\n# c <script>", "license": "x: y\n# c <script>"}
    card = model_card(backbone(), "safetensors", (32, 32), 0.0, file="a.safetensors", provenance=told)
    assert "<script>" not in card and "\n# c" not in card and "a \\| b" in card


def test_any_file_as_one_of_ours(tmp_path, tool, capsys):
    """Weights under timm's names, as many methods publish them, with the mask token of our own converted
    file kept."""
    vit = backbone(pos_grid=2)
    torch.save(vit.state_dict(), tmp_path / "theirs.pth")
    common = ["--weights", str(tmp_path / "theirs.pth"), "--format", "posfield", "--source", "timm"]
    tool.main(
        [
            *common,
            "--method",
            "Theirs",
            "--effective-epochs",
            "300",
            "--output",
            str(tmp_path / "ours.safetensors"),
        ]
    )
    assert "every tool takes it as --weights" in capsys.readouterr().out
    found = read_checkpoint(tmp_path / "ours.safetensors")
    assert found.backbone == TINY and found.model_kwargs["depth"] == 2
    assert found.provenance["method"] == "Theirs" and found.provenance["effective_epochs"] == 300
    assert found.provenance["weights_hash"] == file_hash(tmp_path / "theirs.pth")
    assert all(torch.equal(found.state[key], value) for key, value in vit.state_dict().items())
    for extra, message in [
        (["--size", "32", "--output", "a.safetensors"], "--size: has no effect on format posfield"),
        (
            ["--effective-epochs", "nan", "--output", "a.safetensors"],
            "effective_epochs: nan is no positive number",
        ),
        (["--patch-size", "0", "--output", "a.safetensors"], "patch_size: 0 px is no patch"),
        (["--output", "a.pth"], r"a converted file ends in \.safetensors, a\.pth does not"),
    ]:
        with pytest.raises(UserError, match=message):
            tool.main([*common, *extra])


def test_mask_tokens_outlive_a_conversion(tmp_path):
    vit = backbone(mask_tokens=True, pos_encoding="field")
    save_backbone(tmp_path / "a.safetensors", vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "b.safetensors").state["mask_token"], vit.mask_token)


def test_a_patch_size_travels_into_the_card(tmp_path, tool):
    vit = backbone(patch_size=14, pos_grid=2)
    save_backbone(tmp_path / "a.safetensors", vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs)
    arguments = [
        "--weights",
        str(tmp_path / "a.safetensors"),
        "--patch-size",
        "16",
        "--format",
        "torchvision",
        "--size",
        "32",
    ]
    tool.main([*arguments, "--output", str(tmp_path / "b.safetensors"), "--card", str(tmp_path / "card.md")])
    card = (tmp_path / "card.md").read_text()
    assert "# ViT-T/16" in card and "resampled from 14 to 16 px" in card
