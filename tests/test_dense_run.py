"""PaKA, whole runs: what they leave, exact resume, micro-batches and ranks that equal one, and runs of
before."""

import json
from pathlib import Path
from types import SimpleNamespace

import old_runs
import pytest
import torch
from dense_fixture import DENSE, GRAM, TIED, write_start
from photos import last, write_photos
from runs_fixture import differences, lines_of, tensors_of, train_on_ranks
from tool_fixture import load_tool

from pretrain.build import build_backbone
from pretrain.config import from_saved, load_config
from pretrain.data.loader import build_dataset, build_loader
from pretrain.errors import UserError
from pretrain.export.card import model_card
from pretrain.methods.paka import PaKA
from pretrain.results.provenance import file_hash
from pretrain.results.schema import read_result
from pretrain.settings import replaced
from pretrain.train import check_same_run, train
from pretrain.trainer import Length, Trainer
from pretrain.weights import read_checkpoint

EXACT = [
    "run.precision=float64",
    "backbone.drop_path=0.0",
    "optim.batch_size=4",
    "optim.epoch_iters=1",
    "optim.epochs=3",
]
ANYWHERE = ["crops.local_rule=image", "crops.local_scale=[0.1,0.4]", *EXACT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    write_photos(folder / "photos", n=8)
    write_start(folder / "start.safetensors", n_registers=2)
    return folder


@pytest.fixture(scope="module")
def one_rank(folder):
    """What micro-batches and ranks are measured against; their overlaps differ in number."""
    return run(folder, folder / "one", *ANYWHERE)


def overrides(folder, output, *extra):
    where = [
        f"data.root={folder / 'photos'}",
        f"backbone.weights={folder / 'start.safetensors'}",
        f"run.output={output}",
    ]
    return last([*DENSE, "optim.warmup_epochs=0", *where, *extra])


def run(folder, output, *extra, **named):
    return train(load_config(None, overrides(folder, output, *extra)), **named)


def state_of(tensors, network):
    prefix = f"method.{network}.backbone."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def test_a_run_leaves_the_student_and_says_where_it_comes_from(folder, tmp_path):
    """From a start of 14 px patches with registers, through the tool, with images."""
    start = write_start(tmp_path / "somewhere" / "start.safetensors", patch_size=14, n_registers=4)
    px = ["backbone.patch_size=14", "crops.global_px=56", "crops.local_px=42", f"backbone.weights={start}"]
    shown = ["log.tensorboard=true", "log.images_every=12"]
    output = tmp_path / "run"
    load_tool("pretrain").main(overrides(folder, output, *px, *shown, "optim.epochs=6", "optim.batch_size=4"))
    tensors, lines = tensors_of(output), lines_of(output)
    assert len(lines) == 12 and lines[0]["overlaps"] > 0
    backbone = build_backbone("vit_tiny_patch16", weights=output / "backbone.safetensors")
    student, teacher = state_of(tensors, "student"), state_of(tensors, "teacher")
    assert all(torch.equal(value, student[key]) for key, value in backbone.state_dict().items())
    assert not torch.equal(student["patch_embed.proj.weight"], teacher["patch_embed.proj.weight"])
    assert (backbone.patch_size, backbone.n_registers) == (14, 4)
    said = read_checkpoint(output / "backbone.safetensors").provenance
    earlier = {
        "file": "start.safetensors",
        "hash": file_hash(start),
        "method": "earlier",
        "effective_epochs": 12.5,
    }
    assert said["started_from"] == earlier and said["position_masks"] is False
    result = read_result(output)
    epochs = 6 * (2 * (56 / 224) ** 2 + 2 * (42 / 224) ** 2)
    assert result.effective_epochs == said["effective_epochs"] == pytest.approx(epochs, abs=0.01)
    assert result.protocol.name == "paka-25ep" and "backbone.weights" not in result.protocol.deviations
    assert {"loss", "cka", "overlaps", "feature_std", "grad_norm"} <= set(result.metrics)
    assert "paka" in model_card(
        backbone, "safetensors", (56, 56), 0.0, file="x", provenance=said, results=[result]
    )
    assert str(tmp_path) not in json.dumps(said) and list((output / "tensorboard").iterdir())


@pytest.mark.parametrize("extra", [[], TIED, GRAM], ids=["paka", "tied", "gram"])
def test_steps_on_one_batch_lower_its_loss(folder, tmp_path, extra):
    """The same crops again and again, before a teacher that stays: nothing but the step itself changes the
    loss."""
    still = ["optim.teacher_momentum=1.0", "backbone.drop_path=0.0", "optim.batch_size=4", "positions.grid=6"]
    config = load_config(None, overrides(folder, tmp_path, *extra, *still))
    trainer = Trainer(config, Length(100, 1000, 0))
    batch, _ = next(iter(build_loader(config, build_dataset(config), 0, 1)))
    losses = [trainer.step([batch]).losses["loss"].item() for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("extra", [[], TIED], ids=["standard", "tied"])
def test_resume_is_bit_for_bit(folder, tmp_path, extra):
    extra = [*extra, "positions.grid=6", "optim.epochs=2", "optim.batch_size=4", "backbone.drop_path=0.3"]
    run(folder, tmp_path / "straight", *extra)
    run(folder, tmp_path / "parts", *extra, stop_after=2)
    run(folder, tmp_path / "parts", *extra, resume="auto")
    one, two = tensors_of(tmp_path / "straight"), tensors_of(tmp_path / "parts")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "straight" / "metrics.jsonl").read_bytes() == (
        tmp_path / "parts" / "metrics.jsonl"
    ).read_bytes()


def test_a_frozen_teacher_stays_what_the_weights_are(folder, tmp_path):
    run(folder, tmp_path / "run", *GRAM, "optim.epochs=1")
    tensors = tensors_of(tmp_path / "run")
    start = read_checkpoint(folder / "start.safetensors").state
    assert all(torch.equal(value, start[key]) for key, value in state_of(tensors, "teacher").items())
    assert not torch.equal(state_of(tensors, "student")["cls_token"], start["cls_token"])


def test_micro_batches_equal_the_whole_although_their_overlaps_differ_in_number(folder, one_rank, tmp_path):
    """float64, drop path 0: each micro-batch counts as much as it has overlaps."""
    config = load_config(None, overrides(folder, tmp_path / "parts", *ANYWHERE, "step.accumulate=2"))
    batches = [
        item[0].to(torch.device("cpu"), torch.float64)
        for item in build_loader(config, build_dataset(config), 0, 3)
    ]
    method = PaKA(config).double()
    counts = [int(method.teacher_targets(batch).are.sum()) for batch in batches]
    assert any(one != two for one, two in zip(counts[::2], counts[1::2])), counts
    train(config)
    assert differences(one_rank, tmp_path / "parts", 3) == []


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    """Runs on two gloo ranks, replicated and sharded, one after the other in the same processes."""
    home = tmp_path_factory.mktemp("two_ranks")
    words = [overrides(folder, home / rule, *ANYWHERE, f"step.parallel={rule}") for rule in ("ddp", "fsdp2")]
    train_on_ranks(2, home, [(None, each) for each in words])
    return home


@pytest.mark.parametrize("rule", ["ddp", "fsdp2"])
def test_two_gloo_ranks_equal_one_at_double_batch(one_rank, two_ranks, rule):
    """Head and registers too; the ranks' overlaps differ in number."""
    assert differences(one_rank, two_ranks / rule, 3) == []
    a, b = (read_checkpoint(path / "backbone.safetensors").state for path in (one_rank, two_ranks / rule))
    assert a.keys() == b.keys()
    for key, value in a.items():  # of sharded ranks the student is gathered
        torch.testing.assert_close(b[key], value, rtol=1e-6, atol=1e-8)


def test_a_checkpoint_from_before_these_settings_goes_on():
    """The config of a run of commit 2c21771, and without the keys that came with post-training."""
    meta = json.loads(
        json.loads(old_runs.RECORD.read_text())["pretrain_stopped"]["checkpoints/it_00000002/meta.json"]
    )
    before = meta["config"]
    config = from_saved(before)
    del (
        before["dense"],
        before["optim"]["head_lr_factor"],
        before["run"]["algorithm"],
        before["run"]["leaves"],
    )
    for key in ("plain_globals", "local_rule", "local_inside"):
        del before["crops"][key]
    found = SimpleNamespace(path=Path("it_1"), meta={"config": before, "n_images": 6, "progress": {}})
    check_same_run(found, config)
    changed = replaced(config, {"crops.local_rule": "inside", "run.export_network": "student"})
    with pytest.raises(
        UserError, match=r"run\.export_network='teacher' .*crops\.local_rule='image' \(now 'inside'\)"
    ):
        check_same_run(found, changed)
    before["optim"]["epochs"] = 3
    with pytest.raises(UserError, match=r"optim\.epochs=3"):
        check_same_run(found, config)
