"""The atomic write, and the lines and the bar that a run tells its user."""

import io
import os
import sys

import pytest
from rich.console import Console

from pretrain import log as log_module
from pretrain.errors import Interrupted
from pretrain.files import put_in_place, replacing
from pretrain.log import Progress, log, say
from pretrain.signals import StopSignals


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, synced = tmp_path / "new" / "a.json", []
    monkeypatch.setattr(os, "fsync", synced.append)
    with replacing(path) as partial:
        partial.write_text("one")
        assert not path.exists() and partial.parent == path.parent
    assert path.read_text() == "one" and len(synced) == 1
    with pytest.raises(OSError, match="disk full"), replacing(path) as partial:
        partial.write_text("tw")
        raise OSError("disk full")
    assert path.read_text() == "one" and os.listdir(path.parent) == ["a.json"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    put_in_place(tmp_path / "b", tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["b"]


def test_lines_come_from_the_first_rank_alone(capsys, monkeypatch):
    log("going on, 100%"), say("result: a")
    monkeypatch.setenv("RANK", "1")
    log("again"), say("again")
    assert capsys.readouterr() == ("result: a\n", "going on, 100%\n")


def test_an_evaluation_on_a_terminal_has_a_bar(monkeypatch):
    file, signals = io.StringIO(), StopSignals()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(log_module, "Console", lambda: Console(file=file, force_terminal=True, width=100))
    tell = Progress("knn", 3, signals)
    tell(2)
    signals.received = "SIGTERM"
    tell()
    assert "3/3" in file.getvalue() and "s each" in file.getvalue() and "of 3 images" not in file.getvalue()
    tell = Progress("knn", 3, signals)
    with pytest.raises(Interrupted, match="SIGTERM at knn, after 1 of 3 images"):
        tell()
