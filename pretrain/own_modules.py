"""Modules of one's own, by name: a method, or what registers backbones, sources of images and labeled sets."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from pretrain.errors import UserError

VARIABLE = "POSFIELD_IMPORT"


def import_own() -> None:
    """Import the modules that the environment variable ``POSFIELD_IMPORT`` names, with commas between them: they
    register backbones, sources of images and labeled sets of one's own. A process that a command starts does the same.

    Raises:
        UserError: as :func:`own_module`.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        own_module(name, VARIABLE)


def own_module(name: str, area: str) -> ModuleType:
    """A module of one's own; the same file is imported once.

    Args:
        name: dotted (``my_package.simclr``), or the path of a ``.py`` file.
        area: what an error begins with.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return _module_of_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(f"{area}: {name} cannot be imported ({error})") from error


def _module_of_file(path: Path) -> ModuleType:
    name = f"posfield_own_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # else the next import would find half of it
        raise
    return module
