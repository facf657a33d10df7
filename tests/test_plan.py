"""What a pre-training says before its first step and about its end; what it takes from images, weights and memory."""

import math
import shutil

import pytest
import torch
from photos import TINY, last, write_photos
from public_fixture import NAME
from reference_vit import saved
from test_weights_dinov2 import published

from pretrain import device, plan
from pretrain.build import build_backbone
from pretrain.cli.train_ssl import main
from pretrain.config import load_config
from pretrain.data.sources import open_source
from pretrain.errors import UserError
from pretrain.losses import effective_rank
from pretrain.methods.backbones import new_backbone
from pretrain.methods.intertwined import Intertwined
from pretrain.results.schema import read_result
from pretrain.train import train
from pretrain.trainer import Length
from pretrain.weights import save_backbone

SMALL = ["heads.n_prototypes=24", "heads.hidden_dim=16", "heads.bottleneck_dim=8", "data.workers=0"]
SMALL += ["optim.batch_size=3", "crops.n_local=2", "log.every=1", "log.tensorboard=false", "run.device=cpu"]


@pytest.fixture
def photos(tmp_path):
    torch.set_num_threads(1)
    return write_photos(tmp_path / "photos")


def settings(tmp_path, *extra):
    words = [*TINY, f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / 'run'}", *extra]
    return load_config(None, last(words))


@pytest.mark.parametrize(
    "n_images, start, epochs, warmup, frozen",
    [
        (3_000, "dino.pth", 100, 10, 5),
        (128_000, "dino.pth", 50, 5, 2),
        (1_000_000, "dino.pth", 10, 1, 1),
        (3_000, "", 400, 40, 20),
        (1_281_167, "", 100, 10, 5),
    ],
)
def test_epochs_follow_the_number_of_images(n_images, start, epochs, warmup, frozen):
    assert list(plan.own_epochs(n_images, start).values()) == [epochs, warmup, frozen]


def test_public_weights_are_one_option(tmp_path, photos, capsys):
    """The file says the network; its grid becomes a field; the folder goes on by its own settings."""
    path = saved(tmp_path, published(registers=4)[0], "dinov2_vits14_reg4_pretrain.pth")
    output = tmp_path / "mine"
    short = [*SMALL, "optim.epochs=2", "optim.warmup_epochs=1", "log.checkpoint_every=2"]
    with pytest.warns(UserWarning, match="its 7 x 7 positions become a field of 50 x 50 samples"):
        main(["--from", str(path), "--data", str(photos), "--output", str(output), *short])
    said = capsys.readouterr().err
    assert "plan: 6 images, batch 3: 2 iterations an epoch, 2 epochs, 4 iterations" in said
    assert f"{NAME}_reg4 {path}; own-images on cpu; into {output}" in said
    assert f"posfield detect --weights {output / 'backbone.safetensors'} --data LABELS" in said
    assert "warning" not in said
    vit = build_backbone(output / "backbone.safetensors")
    assert (vit.pos_encoding, vit.n_registers, vit.patch_size) == ("field", 4, 16) and hasattr(
        vit.blocks[0], "ls1"
    )
    config = load_config(output / "config.yaml")
    assert (config.optim.freeze_last_layer_epochs, config.backbone.weights) == (5, str(path))
    assert "optim.epochs" not in read_result(output).protocol.deviations
    for name in ("result.json", "checkpoints/it_00000004"):
        at = output / name
        shutil.rmtree(at) if at.is_dir() else at.unlink()
    with pytest.warns(UserWarning):
        main(["--resume", "--output", str(output)])
    assert "going on from" in capsys.readouterr().err and read_result(output).method == "own images"


def test_a_field_of_another_size_is_taken_as_it_is(tmp_path, photos):
    vit = build_backbone(NAME, depth=2, pos_encoding="field", pos_grid=9)
    path = save_backbone(
        tmp_path / "ours.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs
    )
    config = load_config("own-images", last([*TINY, f"backbone.weights={path}", "positions.grid=50"]))
    started = new_backbone(config, 0.0, config.positions, mask_tokens=True)
    assert started.model_kwargs["pos_grid"] == 9
    assert all(torch.equal(started.state_dict()[key], value) for key, value in vit.state_dict().items())


def test_from_scratch_says_what_speaks_against_it(tmp_path, photos):
    first = min(photos.iterdir())
    copy = photos / f"z_{first.name}"
    shutil.copy(first, copy)
    dataset = [*TINY, f"data.root={photos}"]
    config = load_config("own-images-scratch", last([*dataset, "optim.epochs=3"]))
    few, copies = plan.doubts(config, Length(2, 6, 1), open_source(config.data))
    assert few.startswith("6 iterations show 18 images, 0.00% of what the paper's") and "--from FILE" in few
    assert copies.startswith("1 of 7 images are copies of others (")
    assert "losses.koleo=0" in copies
    assert first.name in copies and copy.name in copies
    copy.unlink()
    started = load_config("own-images", last([*dataset, "backbone.weights=dino.pth"]))
    assert plan.doubts(started, Length(2, 6, 1), open_source(started.data)) == []


def test_a_batch_of_more_images_than_there_are_names_one_that_fits(tmp_path, photos):
    with pytest.raises(
        UserError, match="batch_size=64 is more than the 6 images .*; set optim.batch_size=4, or"
    ):
        train(settings(tmp_path, "optim.batch_size=64"))


@pytest.mark.parametrize("fitting, parts", [(16, 1), (8, 2), (3, 8), (1, 16)])
def test_the_largest_part_that_fits_is_taken(monkeypatch, capsys, fitting, parts):
    config = load_config("own-images", ["backbone.weights=x", "optim.batch_size=16"])
    monkeypatch.setattr(device, "fits", lambda step, *_: 16 // step.args[0] <= fitting)
    found = plan.fitted(config, None, torch.device("cuda", 0))
    assert (
        found.step.accumulate == parts
        and f"{16 // parts} images at a time fit into cuda:0" in capsys.readouterr().err
    )
    assert plan.fitted(config, None, torch.device("cpu")).step.accumulate == 1
    assert plan.fitted(found, None, torch.device("cuda", 0)) is found


def test_what_cannot_be_fitted_is_told(monkeypatch):
    config = load_config("own-images", ["backbone.weights=x", "optim.batch_size=2"])
    monkeypatch.setattr(device, "fits", lambda *_: False)
    with pytest.raises(UserError, match="not even one image .* step.checkpointing=full"):
        plan.fitted(config, None, torch.device("cuda", 0))
    monkeypatch.setattr(plan.distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="step.accumulate=0 is fitted by one process alone; give a number"):
        plan.fitted(config, None, torch.device("cuda", 0))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank(rank):
    """r equally strong orthogonal directions: r."""
    basis = torch.linalg.qr(torch.randn(32, 9, dtype=torch.float64))[0]
    centered = torch.linalg.qr(basis - basis.mean(0))[0][:, :rank]
    rows = 5 + 2 * centered @ torch.linalg.qr(torch.randn(16, rank, dtype=torch.float64))[0].T
    assert effective_rank(rows).item() == pytest.approx(rank, abs=1e-6)


def test_effective_rank_of_what_is_not_finite_is_nan():
    """And no error of the library: the run's own names the iteration."""
    for wrong in (math.nan, math.inf):
        assert math.isnan(effective_rank(torch.tensor([[1.0, 2.0], [wrong, 3.0]])).item())


def test_effective_rank_of_one_point_is_one():
    assert effective_rank(torch.ones(4, 3)).item() == 1


HEALTHY = {"feature_std": 0.3, "effective_rank": 5.0, "teacher_entropy": 1.0, "mean_entropy": 2.0}
COLLAPSES = {
    "feature_std": (1e-4, "all images are one point"),
    "effective_rank": (1.05, "all images lie on a line"),
    "teacher_entropy": (math.log(24), "the teacher tells no images apart"),
    "mean_entropy": (0.01, "one prototype takes all images"),
}


@pytest.mark.parametrize("sign", COLLAPSES)
def test_a_collapse_is_named_with_the_remedy(sign):
    method = Intertwined(load_config(None, TINY))
    value, told = COLLAPSES[sign]
    assert method.collapse(HEALTHY) == ""
    assert method.collapse({key: number for key, number in HEALTHY.items() if key != sign}) == ""
    found = method.collapse(HEALTHY | {sign: value})
    assert found.startswith(told) and "losses.centering=sinkhorn_knopp" in found


def test_a_lasting_collapse_after_the_warm_up_is_said_once(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setattr(Intertwined, "collapse", lambda self, signs: "all images are one point; lower the lr")
    train(settings(tmp_path, "optim.epochs=8", "optim.warmup_epochs=2"))
    said = capsys.readouterr().err
    assert said.count("the features collapse") == 1
    assert "warning: iteration 8: the features collapse: all images are one point; lower the lr" in said
    assert "estimate: " in said
