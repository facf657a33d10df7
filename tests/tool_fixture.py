"""The commands of ``posfield`` in the tests' own process."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from posfield.cli import COMMANDS, main

TOOLS = Path(__file__).parents[1] / "tools"


def load_tool(name: str) -> ModuleType:
    """The module of ``posfield NAME``."""
    return importlib.import_module(COMMANDS[name][0])


def ended(name: str, *words: object) -> int:
    """Run ``posfield NAME`` as a user would; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["posfield", *map(str, words)])
        try:
            main(*name.split())
        except SystemExit as end:
            return end.code
    return 0
