"""Millions of names in two arrays. Forked workers share them; they would copy a list of strings page by
page."""

from collections.abc import Iterable

import numpy as np


class Names:
    """A sequence of byte strings."""

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)  # [N] in bytes
        self.text = np.frombuffer(b"".join(names), np.uint8)  # [ends[-1]]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes()


def shown(name: bytes) -> str:
    """A name for messages, in one line: invalid UTF-8 and control characters become ``\\x..``."""
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
