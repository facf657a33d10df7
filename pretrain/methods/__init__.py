"""One file a method. A config names its module: ``method: intertwined``."""

import importlib
import inspect
import pkgutil
from types import ModuleType

from pretrain.errors import UserError
from pretrain.methods.method import EMATeacher, Method, TrainSettings
from pretrain.own_modules import own_module

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
        unfinished = [
            f"{v.__name__} without {', '.join(sorted(v.__abstractmethods__))}"
            for v in vars(module).values()
            if inspect.isabstract(v) and v.__module__ == module.__name__
        ]
        names = ", ".join([*(value.__name__ for value in found), *unfinished]) or "none"
        raise UserError(f"method: {name} should define one Method with Settings, not {names}")
    return found[0]


def _module(name: str) -> ModuleType:
    if name in SHIPPED:
        return importlib.import_module(f"pretrain.methods.{name}")
    if name.endswith(".py") or "." in name:
        return own_module(name, "method")
    own = "a dotted module or a .py file of your own"
    raise UserError(f"method: {name!r} is none of {', '.join(SHIPPED)}, nor {own}")


__all__ = ["SHIPPED", "EMATeacher", "Method", "TrainSettings", "find_method"]
