"""Folders of commit 2c21771: stopped runs go on and are evaluated, finished ones stay and are tabulated."""

import hashlib
import importlib.util
import warnings

import old_runs
import pytest
import safety_net

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.results.render import FORMATS, render_all
from pretrain.results.report import tables_of
from pretrain.results.schema import read_result


def needs(package):
    missing = importlib.util.find_spec(package) is None
    marks = [pytest.mark.skipif(missing, reason=f"{package} is not installed")]
    return [*marks, pytest.mark.detectron2] if package == "detectron2" else marks


STOPPED = [
    pytest.param(
        name.removesuffix("_stopped"), marks=[mark for package in packages for mark in needs(package)]
    )
    for name, (_, packages) in old_runs.RESUMED.items()
]
FINISHED = [param for param in STOPPED if param.values != ("posttrain",)]


@pytest.fixture
def root(tmp_path):
    return old_runs.create(tmp_path)


@pytest.mark.parametrize("run", STOPPED)
def test_a_stopped_run_goes_on_to_its_end(run, root):
    group, folder = f"resumed_{run}", root / f"{run}_stopped"
    found = old_runs.resumed(root, folder.name)
    if not safety_net.is_exact(group):
        warnings.warn(
            f"another machine than the record's: compared to {safety_net.TOLERANCE:g}", stacklevel=1
        )
    assert not safety_net.differences(group, found)
    log = old_runs.log_of(folder)
    assert len([line for line in log if "loss" in line]) == 4
    result, backbone = read_result(folder), read_result(root / "pretrain_finished")
    kind = {"pretrain": "pretrain", "posttrain": "pretrain", "segmentation": "segmentation"}.get(
        run, "detection"
    )
    assert result.kind == kind and result.protocol.deviations
    if kind == "pretrain":
        assert (folder / "backbone.safetensors").is_file()
    else:
        assert (result.method, result.effective_epochs) == (backbone.method, backbone.effective_epochs)


def contents(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("run", FINISHED)
def test_a_finished_run_is_left_as_it_is(run, root):
    folder = root / f"{run}_finished"
    before = contents(folder)
    old_runs.RESUMED[f"{run}_stopped"][0](folder)
    assert contents(folder) == before and folder / "result.json" in before


def test_a_finished_pre_training_gives_its_backbone_and_a_start(root):
    folder = root / "pretrain_finished"
    vit = build_backbone("vit_tiny_patch16", folder / "backbone.safetensors")
    assert (len(vit.blocks), vit.model_kwargs["pos_encoding"], vit.model_kwargs["pos_grid"]) == (
        1,
        "field",
        20,
    )
    output = root / "new"
    old_runs.start_from(folder, output)
    assert read_result(output).protocol.deviations["run.init_from"] == ["from scratch", "pretrain_finished"]


@pytest.mark.parametrize(
    "run, evaluate",
    [
        pytest.param("torchvision_stopped", old_runs.evaluate_torchvision, marks=needs("pycocotools")),
        pytest.param("detectron2_stopped", old_runs.evaluate_detectron2, marks=needs("detectron2")),
    ],
)
def test_a_detector_is_evaluated_and_used(run, evaluate, root):
    metrics = evaluate(root / run)
    assert 0 <= metrics["box_ap"] <= 100 and set(metrics["box_ap_classes"]) <= {"rectangle", "disc", "bar"}
    found = old_runs.detections(root / run, safety_net.picture(1, 70, 90))
    assert found and {item["category_id"] for item in found} <= {3, 7, 90}


@pytest.mark.parametrize("run", [pytest.param("segmentation_stopped", marks=needs("mmseg"))])
def test_a_segmentation_is_used(run, root):
    pictures = old_runs.segmented(root / run)
    assert len(pictures) == 2
    for predicted, truth in pictures:
        assert predicted.shape == truth.shape and 0 <= predicted.min() <= predicted.max() < 4


def test_old_results_stand_in_the_tables(root):
    results = old_runs.read_results(root)
    assert sorted(result.kind for result in results) == ["detection", "detection", "pretrain", "segmentation"]
    assert all(result.method == "intertwined" and result.effective_epochs == 0.47 for result in results)
    for layout in ("list", "paper"):
        for format in FORMATS:
            text = render_all(tables_of(results, layout), format)
            assert "scaled down" in text and "intertwined" in text
    text = render_all(tables_of(results), "md")
    assert (
        "coco-12ep, scaled down" in text
        and "ade20k-160k, scaled down" in text
        and "Pre-training runs" in text
    )


@pytest.mark.parametrize("package", [pytest.param("detectron2", marks=needs("detectron2"))])
def test_a_detectron2_folder_is_read_as_data(package, tmp_path, capfd):
    """An old one as it is; what would call, construct or unpickle something is refused before it does."""
    from det_plugin.detectron2_engine.predict import load_model

    folder = old_runs.create(tmp_path, "detectron2_stopped") / "detectron2_stopped"
    load_model(folder)
    file = folder / "config_resolved.yaml"
    ours = file.read_text()
    net = "_target_: detectron2.modeling.GeneralizedRCNN\n"
    echo = "{_target_: os.system, command: echo code ran}"
    for text, told in {
        f"{ours}\nx: !!python/object/apply:os.system ['echo code ran']\n": "is no plain data",
        ours.replace(
            net, f"{net}  x: {echo}\n"
        ): "model.x._target_='os.system' is no target of a run of ours",
        ours.replace(net, f"_target_: {echo}\n"): "model._target_={",
        ours.replace("norm: LN", "norm: ${oc.env:HOME}", 1): "'${oc.env:HOME}' is more than the name",
        "- 1": "is no plain data",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError) as error:
            load_model(folder)
        assert told in str(error.value) and "--trust" in str(error.value) and "\n" not in str(error.value)
    file.write_text(f"{ours}\nx: !!python/object/apply:os.system ['echo trusted']\n")
    load_model(folder, trust=True)
    file.write_text(ours)
    (folder / "x.pkl").write_bytes(b"cos\nsystem\n(S'echo code ran'\ntR.")
    for name in ("x.pkl", "../x.pth", "https://example.org/x.pth"):
        (folder / "last_checkpoint").write_text(name)
        with pytest.raises(UserError, match=r"last_checkpoint should name a \*\.pth in its folder"):
            load_model(folder)
    said = capfd.readouterr().out
    assert "code ran" not in said and "trusted" in said


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("torchvision", marks=needs("pycocotools")),
        pytest.param("detectron2", marks=needs("detectron2")),
    ],
)
def test_a_vit_l_of_before_goes_on_with_its_drop_path_and_layer_decay(engine, tmp_path, monkeypatch):
    from det_plugin import protocol, train

    safety_net.write_coco(tmp_path / "coco")
    small = dict(depth=1, embed_dim=32, num_heads=2)
    how = dict(old_runs.SMALL_DET, engine=engine, device="cpu", workers=0, model_kwargs=small)
    how |= dict(backbone="vit_large_patch16", data=tmp_path / "coco", is_sure=True)
    with monkeypatch.context() as patch:
        patch.setitem(protocol.BY_SIZE, "large", protocol.EARLIER["large", 1])
        file = train.finetune(output=tmp_path / "run", **how)
    file.unlink()  # as if it had been killed before
    result = read_result(train.finetune(output=tmp_path / "run", resume=True, **how))
    assert result.protocol.version == 1 and result.protocol.label.startswith("coco-12ep, ")
    assert not {"drop_path", "layer_decay"} & result.protocol.deviations.keys()
    result = read_result(train.finetune(output=tmp_path / "new", **how))
    assert result.protocol.version == 2 and result.protocol.label.startswith("coco-12ep v2, ")
    assert not {"drop_path", "layer_decay"} & result.protocol.deviations.keys()
