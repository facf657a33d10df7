"""The wheel, made from the source distribution and installed without the checkout: configs are found by name, every command
runs in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pretrain", "det_plugin", "seg_plugin", "posfield", "configs")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A virtual environment with the wheel; its other packages are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    said = subprocess.run(
        [sys.executable, "-c", build], check=True, cwd=source, stdout=subprocess.PIPE, text=True
    )
    packed = folder / said.stdout.splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", packed]
    subprocess.run([*map(str, wheel)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    own = next((folder / "venv").glob("lib/python*/site-packages"))
    # As a line of a .pth file: the .pth files in there, the editable install's among them, are not read
    (own / "others.pth").write_text(sysconfig.get_path("purelib"))
    (built,) = (folder / "dist").glob("*.whl")
    install = [*pip, "--python", folder / "venv", "install", "--no-deps", "--no-index", built]
    subprocess.run([*map(str, install)], check=True)
    (folder / "empty").mkdir()
    shutil.rmtree(source)
    return folder


def posfield(home, *words, code=0):
    """Run the console script in the empty folder; returns stdout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [str(home / "venv" / "bin" / "posfield"), *map(str, words)]
    done = subprocess.run(command, cwd=home / "empty", capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout if code == 0 else done.stderr


def test_it_is_the_wheel_and_finds_its_configs_by_name(home):
    code = "import posfield, pretrain; print(posfield.__file__, pretrain.__file__)"
    python = home / "venv" / "bin" / "python"
    said = subprocess.check_output([python, "-c", code], text=True, cwd=home / "empty", env={})
    assert all(path.startswith(str(home / "venv")) for path in said.split())
    assert "intertwined" in posfield(home, "config", "toy")
    assert "vit_base_patch16" in posfield(home, "config", "intertwined_vitb16")
    assert "no file nothing, and no recipe of that name" in posfield(home, "config", "nothing", code=2)
    shipped = home / "venv" / "lib"
    for pattern in ("det/*.py", "seg/*.py", "compare/*.yaml", "pretrain/*.yaml"):
        names = {path.name for path in shipped.glob(f"python*/site-packages/posfield/configs/{pattern}")}
        assert names == {path.name for path in (ROOT / "configs").glob(pattern)}


def test_the_demo_and_what_follows_it(home):
    posfield(home, "demo", "--quick", "--output", "demo")
    demo, backbone = home / "empty" / "demo", "demo/pretrain_intertwined/backbone.safetensors"
    assert (demo / "report.html").stat().st_size > 100_000
    assert (demo / "table.md").read_text().count("scaled down") > 4
    posfield(home, "predict", "--run", "demo/detect_intertwined", "--images", "demo/data/coco/val2017",
             "--output", "found")  # fmt: skip
    assert (home / "empty" / "found" / "predictions.json").is_file()
    posfield(home, "predict", "--run", "demo/segment_dinov2", "--images", "demo/data/coco/val2017",
             "--output", "labels")  # fmt: skip
    maps = sorted((home / "empty" / "labels" / "labels").iterdir())
    assert len(maps) == 12 and len(list((home / "empty" / "labels" / "pictures").iterdir())) == 12
    assert set(np.unique(Image.open(maps[0]))) <= set(range(7))
    assert len((home / "empty" / "labels" / "classes.txt").read_text().splitlines()) == 6
    posfield(home, "export", "--weights", backbone, "--format", "safetensors", "--output", "out.safetensors")
    words = ["linear.epochs=1", "linear.batch_size=4", "linear.image_px=64", "in_context.image_px=64"]
    posfield(home, "evaluate", "dense", "--weights", backbone, "--data", "demo/data/ade", "--output",
             "dense", "--tasks", "in_context", *words[3:])  # fmt: skip
    assert "in" in posfield(home, "table", "dense", "--layout", "dense", "--format", "md")
    posfield(home, "report", "demo", "--output", "report.html")
    posfield(home, "embed", "--weights", backbone, "--images", "demo/data/images", "--output", "e.npz",
             "--size", 112)  # fmt: skip
    assert sorted(path.name for path in (home / "empty").iterdir()) == [
        "demo", "dense", "e.npz", "found", "labels", "out.safetensors", "report.html",
    ]  # fmt: skip
