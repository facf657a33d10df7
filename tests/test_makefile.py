"""`make clean` removes what make made, and nothing else."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def clean(folder):
    command = ["make", "--file", str(ROOT / "Makefile"), "clean", "DEMO=mine", "VENV=mine"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_clean_leaves_what_is_not_of_make(tmp_path):
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "photo.jpg").touch()
    (tmp_path / "other.egg-info").mkdir()
    assert clean(tmp_path) == ["mine", "mine/data", "mine/photo.jpg", "other.egg-info"]
    (tmp_path / "mine" / "data" / "toy.json").touch()  # a demo's
    assert clean(tmp_path) == ["mine", "mine/photo.jpg", "other.egg-info"]
    (tmp_path / "mine" / ".installed").touch()  # an environment that `make setup` made
    assert clean(tmp_path) == ["other.egg-info"]
