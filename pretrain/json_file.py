"""Mappings in JSON files: one way to read them, one line for whatever is wrong."""

import json
from pathlib import Path
from typing import Any

from pretrain.errors import UserError


def read_json(path: Path, area: str) -> dict[str, Any]:
    """The mapping in a JSON file.

    Args:
        area: what the error begins with: ``weights``, ``data.root``, ...

    Raises:
        UserError: names the file that is missing, is no JSON in UTF-8, or holds no mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:100]
        raise UserError(f"{area}: {path} cannot be read as JSON ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{area}: {path} holds no mapping")
    return content
