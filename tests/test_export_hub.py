"""torch.hub finds the repository's entry points from any folder, and they build what the weights are of."""

import configparser
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbone_fixture import randomize

from pretrain.build import backbone_names, build_backbone
from pretrain.weights import save_backbone

ROOT = Path(__file__).resolve().parents[1]
TINY = "vit_tiny_patch16"


def hub(*arguments, **model_kwargs):
    return torch.hub.load(str(ROOT), *arguments, source="local", **model_kwargs)


@pytest.fixture
def weights(tmp_path):
    vit = randomize(build_backbone(TINY, depth=1, pos_encoding="field", layerscale=0.3))
    return save_backbone(
        tmp_path / "backbone.safetensors", vit.state_dict(), name=TINY, model_kwargs=vit.model_kwargs
    )


@torch.no_grad()
def test_the_hub_builds_what_the_weights_are_of(weights):
    image = torch.randn(1, 3, 32, 48)
    expected = build_backbone(TINY, weights).eval()(image)
    for model in (
        hub("posfield", weights=weights),
        hub("posfield", str(weights)),
        hub(TINY, weights=weights),
    ):
        assert not model.training
        for output, wanted in zip(model(image), expected):
            assert torch.equal(output, wanted)


@pytest.fixture
def hubconf(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("hubconf")


def test_every_name_of_the_registry_is_an_entry_point(hubconf):
    listed = [
        name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")
    ]  # torch.hub's rule
    assert sorted(listed) == sorted([*backbone_names(), "posfield"])
    assert "evaluation mode" in hubconf.vit_tiny_patch16.__doc__
    assert hub("vit_tiny_patch16_reg4", depth=1, patch_size=14).n_registers == 4


def test_the_dependencies_are_installed_with_the_package(hubconf):
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    required = {line.split()[0] for line in options["options"]["install_requires"].split("\n") if line}
    assert set(hubconf.dependencies) <= required


def test_the_hub_needs_no_installation_and_no_folder(weights):
    """A fresh process without the installed package, in the worst of folders: the tool pretrain.py does
    not shadow the package."""
    program = (
        "import sys, torch; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]; "
        f"model = torch.hub.load({str(ROOT)!r}, 'posfield', source='local', weights={str(weights)!r}); "
        "import pretrain; print(pretrain.__file__, model.embed_dim)"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=ROOT / "tools", capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(ROOT / "pretrain" / "__init__.py"), "192"]
