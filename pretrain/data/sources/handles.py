"""The open files of a source: a few, in this process only."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Handles(Generic[T]):
    """Keeps the ``size`` objects used last. Pickles leave them out; a forked process opens its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._process = os.getpid()

    def get(self, key: Hashable, open_it: Callable[[], T]) -> T:
        """The object under ``key``, opened if necessary; the least recently used one is dropped."""
        if self._process != os.getpid():
            self._kept, self._process = OrderedDict(), os.getpid()
        if key not in self._kept:
            self._kept[key] = open_it()
        self._kept.move_to_end(key)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
