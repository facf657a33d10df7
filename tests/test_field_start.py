"""What a position field starts as, and one that does not learn."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from photos import TINY, last, write_photos

from pretrain.backbones.position import started_field
from pretrain.checkpoints import newest
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.methods.intertwined import Intertwined
from pretrain.results.provenance import config_hash
from pretrain.train import hashed, train
from pretrain.weights import read_checkpoint

STARTS = ("normal", "smooth", "sincos")
FIXED = ["positions.init=sincos", "positions.learnable=false"]


def white_noise(side=50, width=192):
    generator = torch.Generator().manual_seed(0)
    return torch.nn.init.trunc_normal_(torch.empty(1, width, side, side), std=0.02, generator=generator)


def settings(tmp_path, output, *words):
    paths = [f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / output}"]
    return load_config(None, last([*TINY, *paths, *words]))


def networks(*words):
    """Student and teacher of a seed, by name."""
    torch.manual_seed(0)
    return Intertwined(load_config(None, last([*TINY, *words]))).state_dict()


def placed(field):
    """R^2 of x and y, read by a linear map that was fitted on every second sample, chosen as on a chessboard."""
    side = field.shape[-1]
    place = torch.stack(
        torch.meshgrid(*[torch.linspace(0, 1, side).double()] * 2, indexing="xy"), -1
    ).flatten(0, 1)
    rows = F.pad(field[0].flatten(1).T.double(), (0, 1), value=1.0)
    fitted = (torch.arange(side).unsqueeze(1) + torch.arange(side)).flatten() % 2 == 0
    a, ridge = (
        rows[fitted],
        1e-6 * rows.square().sum(0).mean() * torch.eye(rows.shape[1], dtype=torch.float64),
    )
    read = rows[~fitted] @ torch.linalg.solve(a.T @ a + ridge, a.T @ place[fitted])
    error = (read - place[~fitted]).square().mean(0)
    return 1 - error / place[~fitted].var(0, correction=0)


@pytest.mark.parametrize(
    "init, low, high", [("normal", -0.01, 0.01), ("smooth", 0.95, 1), ("sincos", 0.95, 1)]
)
def test_neighbors_and_places(init, low, high):
    """Neighbors of white noise have nothing in common, and it does not say where they are; those of the others do."""
    field = started_field(white_noise(), init, 7, 1.0)
    centered = field - field.mean((2, 3), keepdim=True)
    for axis in (2, 3):
        ahead, behind = centered.narrow(axis, 1, 49), centered.narrow(axis, 0, 49)
        assert low < F.cosine_similarity(ahead, behind, dim=1).mean() < high
    assert (placed(field) < 0.3).all() if init == "normal" else (placed(field) > 0.999).all()


def test_how_large_a_start_is():
    noise = white_noise()
    assert started_field(noise, "normal", 7, 1.0) is noise
    for coarse in (2, 7, 50):
        assert started_field(noise, "smooth", coarse, 1.0).std().item() == pytest.approx(
            noise.std().item(), rel=1e-5
        )
    torch.testing.assert_close(started_field(noise, "smooth", 50, 1.0), noise)  # as coarse as it is itself
    for scale in (1.0, 0.02):  # sin^2 + cos^2 = 1
        waves = started_field(noise, "sincos", 7, scale)
        torch.testing.assert_close(waves.square().mean(1), torch.full((1, 50, 50), scale**2 / 2))
    one = started_field(noise, "sincos", 7, 1.0)[0, :, 3, 5]  # row 3, column 5: half of the width each
    assert one[0].item() == pytest.approx(torch.tensor(5.0).sin().item(), rel=1e-6)
    assert one[96].item() == pytest.approx(torch.tensor(3.0).sin().item(), rel=1e-6)


def test_coarse_noise_reaches_from_border_to_border():
    """Its samples stand where the field's do, corners on corners."""
    noise = white_noise(13)
    field, coarse = started_field(noise, "smooth", 5, 1.0), noise[..., :5, :5]
    ratio = field[..., ::3, ::3] / coarse
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_the_start_changes_the_field_alone():
    """The same network, tensor by tensor, to the bit, in student and teacher; nothing more is drawn."""
    before = networks()
    assert all(torch.equal(x, y) for x, y in zip(before.values(), networks("positions.init=normal").values()))
    for init in STARTS[1:]:
        after = networks(f"positions.init={init}", "positions.init_grid=4", "positions.init_scale=0.5")
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"{network}.backbone.pos_field" for network in ("student", "teacher")}
        assert torch.equal(after["student.backbone.pos_field"], after["teacher.backbone.pos_field"])
        assert after["student.backbone.pos_field"].is_contiguous()


def test_a_fixed_field_stays_and_its_run_goes_on(tmp_path):
    """After decaying steps, in student, teacher and the file; 3 iterations and 3 more are 6."""
    write_photos(tmp_path / "photos")
    words = [*FIXED, "optim.weight_decay=0.4", "optim.base_lr=0.1"]
    train(settings(tmp_path, "whole", *words))
    train(settings(tmp_path, "parts", *words), stop_after=3)
    train(settings(tmp_path, "parts", *words), resume="auto")
    whole, parts = (newest(tmp_path / run)[0].tensors() for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(name.startswith("optimizer.backbone.pos_field") for name in whole)
    assert any(name.startswith("optimizer.backbone.cls_pos") for name in whole)
    start = started_field(white_noise(7), "sincos", 7, 1.0)
    file = read_checkpoint(tmp_path / "whole" / "backbone.safetensors")
    for held in (
        *(whole[f"method.{n}.backbone.pos_field"] for n in ("student", "teacher")),
        file.state["pos_field"],
    ):
        assert torch.equal(held, start)
    assert file.model_kwargs["pos_encoding"] == "field" and "init" not in file.model_kwargs
    train(settings(tmp_path, "learns", FIXED[0]), stop_after=3)
    assert not torch.equal(
        newest(tmp_path / "learns")[0].tensors()["method.student.backbone.pos_field"], start
    )


def test_a_files_field_stays(tmp_path):
    write_photos(tmp_path / "photos")
    first = train(settings(tmp_path, "first"), stop_after=1)
    path = tmp_path / "first.safetensors"
    train(settings(tmp_path, "first"), resume="auto")
    (first / "backbone.safetensors").rename(path)
    words = [f"backbone.weights={path}", *FIXED]
    with pytest.warns(UserWarning, match="positions.init=sincos has no effect with backbone.weights"):
        method = Intertwined(settings(tmp_path, "second", *words))
    assert torch.equal(method.backbone.pos_field, read_checkpoint(path).state["pos_field"])
    assert not method.backbone.pos_field.requires_grad and method.backbone.cls_pos.requires_grad


def test_settings_without_effect_are_warnings_and_what_cannot_be_is_an_error():
    grid = [
        "positions.encoding=standard",
        "positions.grid=14",
        "positions.interpolation=dinov2",
        "positions.augment=false",
    ]
    for word in ("init=smooth", "learnable=false"):
        key = word.partition("=")[0]
        with pytest.warns(
            UserWarning, match=f"positions.{key} has no effect with positions.encoding=standard"
        ):
            load_config(None, [*grid, f"positions.{word}"])
    with pytest.raises(UserError, match="positions.init_grid=51 is more than positions.grid=50"):
        load_config(None, ["positions.init=smooth", "positions.init_grid=51"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(None, grid)
        load_config(None, ["positions.init_grid=51"])


def test_hashes_of_earlier_runs_stay():
    """Those of the commit before there was a choice; a choice is another hash."""
    paka = ["backbone.weights=start.pth"]
    for name, words, before in (
        ("intertwined-100ep", [], "75f00f18f4d4"),
        ("dinov2-100ep", [], "e8d179ef345b"),
        ("paka-tied-25ep", paka, "d3af030f1069"),
        ("mae-800ep", [], "096e57611bfb"),
    ):
        assert config_hash(hashed(load_config(name, words))) == before, name
    changes = ("init=smooth", "init_grid=9", "init_scale=0.5", "learnable=false")
    assert len({config_hash(hashed(load_config(None, [f"positions.{word}"]))) for word in changes}) == 4
