"""Threads fixed, so that sums are added in one order; the small data sets that several files start from."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job ignores Ctrl-C, and its children do
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """One process imports yapf (of mmengine) before the workers do: where its grammar is not cached yet it
    writes the file in place, and a second process that imports it in that moment reads an empty one
    (EOFError)."""
    if not hasattr(config, "workerinput") and importlib.util.find_spec("yapf"):
        importlib.import_module("yapf")


# The files that take longest: begun last, they would keep one process at work while the others are done
LONGEST = (
    "wheel",
    "export_detector",
    "detectron2_runs",
    "torchvision_run",
    "soak",
    "worth",
    "seg_stock",
    "detectron2_resume",
)


def pytest_collection_modifyitems(items):
    """The longest files first."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture
def all_cores():
    """Two threads, for what takes minutes."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A COCO root of a few images."""
    from coco_fixture import write_coco

    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    """The same in ADE20K's layout."""
    from ade_fixture import write_ade

    return write_ade(tmp_path_factory.mktemp("data") / "ade")
