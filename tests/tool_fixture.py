"""The command line tools as modules."""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def load_tool(name: str) -> ModuleType:
    """tools/NAME.py. sys.path is left as it was: a tool replaces the first entry, and tools/pretrain.py
    must not be found there."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def ended(name: str, *words: object) -> int:
    """Run tools/NAME.py in this process as a user would; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        try:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0
