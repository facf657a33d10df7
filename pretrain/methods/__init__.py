"""One file a method. A config names its module: ``method: intertwined``."""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from pretrain.errors import UserError
from pretrain.methods.method import EMATeacher, Method, TrainSettings

SHIPPED = tuple(
    sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name not in ("method", "backbones")
    )
)


def find_method(name: str) -> type[Method]:
    """The method of a module.

    Args:
        name: a module of this package (``intertwined``), a dotted module of your own (``my_package.simclr``),
            or the path of a ``.py`` file. It must define one :class:`Method` with ``Settings``.

    Raises:
        UserError: no such module, or none or several methods in it.
    """
    module = _module(name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and not inspect.isabstract(value)
        if value.__module__ == module.__name__
    ]
    if len(found) != 1 or not hasattr(found[0], "Settings"):
        names = ", ".join(value.__name__ for value in found) or "none"
        raise UserError(f"method: {name} should define one Method with Settings, not {names}")
    return found[0]


def _module(name: str) -> ModuleType:
    if name in SHIPPED:
        return importlib.import_module(f"pretrain.methods.{name}")
    try:
        if name.endswith(".py"):
            return _module_of_file(Path(name))
        if "." in name:
            return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(f"method: {name} cannot be imported ({error})") from error
    own = "a dotted module or a .py file of your own"
    raise UserError(f"method: {name!r} is none of {', '.join(SHIPPED)}, nor {own}")


def _module_of_file(path: Path) -> ModuleType:
    """A file as a module; the same file is imported once."""
    name = f"posfield_method_{path.stem}"
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


__all__ = ["SHIPPED", "EMATeacher", "Method", "TrainSettings", "find_method"]
