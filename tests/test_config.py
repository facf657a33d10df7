"""One default config: every key is read, unknown keys and wrong values are refused by name."""

from pathlib import Path

import pytest
from dense_fixture import DENSE, write_start
from omegaconf import DictConfig, OmegaConf
from photos import TINY, write_photos
from pretrain.recipe import pretraining_protocol

from pretrain import config as config_module
from pretrain.config import as_dict, from_dict, load_config
from pretrain.errors import UserError
from pretrain.train import train

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "pretrain"


def test_every_key_is_read(tmp_path, monkeypatch):
    """A run touches each key of default.yaml at least once; a key that nothing reads would lie to the user."""
    write_photos(tmp_path / "photos")
    read = set()
    get = DictConfig.__getitem__, DictConfig.__getattr__

    def remember(node, key):
        path = node._get_full_key(key)
        if path:
            read.add(path)

    def getitem(node, key):
        remember(node, key)
        return get[0](node, key)

    def getattribute(node, key):
        if not key.startswith("_"):
            remember(node, key)
        return get[1](node, key)

    config = load_config(None, [*TINY, f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / 'run'}"])
    sinkhorn = load_config(
        None, ["losses.centering=sinkhorn_knopp", *TINY, f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / 's'}"]
    )
    start = f"backbone.weights={write_start(tmp_path / 'start.safetensors')}"
    dense = load_config(None, [*DENSE, start, f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / 'd'}"])
    monkeypatch.setattr(DictConfig, "__getitem__", getitem)
    monkeypatch.setattr(DictConfig, "__getattr__", getattribute)
    # as_dict and load_config walk over all keys: only what a run asks for by name counts
    monkeypatch.setattr("pretrain.train.as_dict", lambda config: {})
    monkeypatch.setattr("pretrain.data.loader._plain", plain_with(read))
    train(config, stop_after_it=1)
    train(sinkhorn, stop_after_it=1)
    train(dense, stop_after_it=1)
    monkeypatch.undo()
    leaves = {f"{group}.{key}" for group, keys in as_dict(load_config()).items() for key in keys}
    assert leaves - read == set()


def plain_with(read):
    """Rules are built from whole groups: their dataclasses refuse a key that they do not have, so all of it is read."""
    original = __import__("pretrain.data.loader", fromlist=["_plain"])._plain

    def plain(group):
        values = original(group)
        read.update(f"{group._get_full_key('')}".rstrip(".") + f".{key}" for key in values)
        return values

    return plain


@pytest.mark.parametrize(
    "override, named",
    [
        ("optim.learning_rate=1", "optim.learning_rate"),
        ("optim=3", "optim"),
        ("optim.epochs=many", "optim.epochs"),
        ("optim.epochs=1.5", "optim.epochs"),
        ("optim.base_lr=fast", "optim.base_lr"),
        ("crops.ratio=[1.0]", "crops.ratio"),
        ("run.deterministic=1", "run.deterministic"),
        ("log.tensorboard=1", "log.tensorboard"),
        ("losses.centering=none", "losses.centering"),
        ("masks.content_share=0.7", "masks.content_share"),
        ("masks.ratio=[0.5,0.1]", "masks.ratio"),
        ("crops.local_px=100", "crops.local_px"),
        ("positions.s_min=0.0", "positions.s_min"),
        ("optim.batch_size=0", "optim.batch_size"),
        ("backbone.patch_size=0", "backbone.patch_size"),
        ("run.seed=-1", "run.seed"),
        ("crops.ratio=[2.0,1.0]", "crops.ratio"),
        ("color.blur_kernel_px=8", "color.blur_kernel_px"),
        ("color.jitter=[0.4,0.4,0.2,0.6]", "color.jitter"),
        ("backbone.drop_path=1.0", "backbone.drop_path"),
        ("losses.teacher_temperature=0.0", "losses.teacher_temperature"),
        ("optim.base_lr=.nan", "optim.base_lr"),
        ("losses.content=-1.0", "losses.content"),
        ("epochs", "epochs"),
    ],
)
def test_bad_overrides_are_named(override, named):
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        load_config(None, [override])


def test_values_keep_their_types():
    config = load_config(None, ["optim.base_lr=1e-3", "optim.clip_grad=3", "crops.ratio=[0.5, 2]"])
    assert config.optim.base_lr == 1e-3 and config.optim.clip_grad == 3.0 and list(config.crops.ratio) == [0.5, 2.0]
    assert isinstance(config.optim.clip_grad, float)


def test_children_change_their_base(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {epochs: 7, batch_size: 8}\nrun: {method: a}\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\noptim: {epochs: 9}\n")
    config = load_config(tmp_path / "child.yaml", ["run.seed=4"])
    assert (config.optim.epochs, config.optim.batch_size, config.run.method, config.run.seed) == (9, 8, "a", 4)
    assert from_dict(as_dict(config)) == config
    for text, named in [
        ("optim: {epoch: 1}", "optim.epoch"),
        ("- 1", "mapping"),
        ("a: [", "child.yaml"),
        ("base: none.yaml", "none.yaml"),
    ]:
        (tmp_path / "child.yaml").write_text(text)
        with pytest.raises(UserError, match=named):
            load_config(tmp_path / "child.yaml")


def test_the_defaults_are_the_papers():
    """Table 6."""
    c = load_config()
    assert (c.optim.epochs, c.optim.batch_size, c.optim.base_lr, c.optim.warmup_epochs) == (100, 512, 2e-3, 10)
    assert (c.optim.weight_decay, c.optim.weight_decay_end, c.optim.teacher_momentum) == (0.04, 0.4, 0.992)
    assert (c.backbone.drop_path, c.losses.teacher_temperature, c.heads.n_prototypes) == (0.1, 0.04, 65536)
    assert list(c.masks.ratio) == [0.1, 0.5] and (c.masks.content_share, c.masks.position_share) == (0.5, 0.5)
    assert (c.masks.content_shape, c.masks.position_shape) == ("box", "cross")
    assert (c.positions.scale, list(c.positions.beta), c.positions.s_min, c.positions.s_max, c.positions.grid) == (
        "beta",
        [2, 5],
        0.2,
        1.0,
        50,
    )


def test_a_setting_without_effect_is_a_warning():
    with pytest.warns(UserWarning, match="positions.augment has no effect"):
        load_config(None, ["positions.encoding=standard", "positions.interpolation=dinov2"])


def test_masks_without_their_loss_are_a_warning():
    with pytest.warns(UserWarning, match="masks.position_share and losses.position"):
        load_config(None, ["losses.position=0.0"])


def test_choices_name_existing_keys():
    config = load_config()
    for key in (*config_module.CHOICES, *config_module.RANGES, *config_module.RISING):
        assert OmegaConf.select(config, key) is not None, key


@pytest.mark.parametrize("size", ["s", "b"])
@pytest.mark.parametrize("method", ["intertwined", "dinov2"])
def test_the_shipped_recipes_are_the_papers(method, size):
    config = load_config(CONFIGS / f"{method}_vit{size}16.yaml")
    protocol = pretraining_protocol(config, 1_281_167)
    assert protocol.full and protocol.name == f"{method}-100ep" and config.run.method == method
    assert pretraining_protocol(config, 1000).deviations == {"data.n_images": [1_281_167, 1000]}


@pytest.mark.parametrize("name, label", [("toy", "intertwined-100ep"), ("toy_dinov2", "dinov2-100ep")])
def test_toy_recipes_say_that_they_are_scaled_down(name, label):
    protocol = pretraining_protocol(load_config(CONFIGS / f"{name}.yaml"), 300)
    assert not protocol.full and protocol.label.startswith(f"{label}, scaled down")
    assert protocol.deviations["crops.global_px"] == [224, 112]
    assert "positions.encoding" not in protocol.deviations
