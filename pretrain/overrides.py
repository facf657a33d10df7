"""A frozen dataclass of settings: change fields by name, with the types held, and say what was changed."""

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

import yaml

from pretrain.errors import UserError

Settings = TypeVar("Settings")
FIXED = ("name", "version")  # what a protocol is called is no setting of it


def assignments(arguments: Sequence[str]) -> dict[str, str]:
    """``key=value`` words of a command line as a dict.

    Raises:
        UserError: a word that is none, or a key that is given twice.
    """
    given: dict[str, str] = {}
    for word in arguments:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise UserError(f"{word!r} is no key=value")
        if key in given:
            raise UserError(f"{key} is given twice: {given[key]!r} and {value!r}")
        given[key] = value
    return given


def fields_and_flags(arguments: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Words of a fine-tuning's command line: ``key=value`` fields of the protocol, and ``backbone.key=value`` flags of the ViT.

    Returns:
        fields as text (:func:`with_overrides` types them), and flags as YAML reads them.

    Raises:
        UserError: as :func:`assignments`.
    """
    given = assignments(arguments)
    flags = {}
    for key, text in given.items():
        name = key.removeprefix("backbone.")
        if name == key:
            continue
        if name in ("name", "weights"):
            raise UserError(f"{key}: give it as --{'backbone' if name == 'name' else 'weights'}")
        try:
            flags[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{key}={text!r} cannot be read") from error
    return {key: text for key, text in given.items() if not key.startswith("backbone.")}, flags


def with_overrides(base: Settings, overrides: Mapping[str, Any], what: str = "protocol") -> Settings:
    """``base`` with some fields changed.

    Args:
        base: a frozen dataclass of bool, int, float, str and tuples of them; its annotations are the types.
        overrides: field -> value, or the value's text: ``"1e-4"``, ``"true"``, ``"0.9, 0.95"`` (brackets are allowed).
        what: how an error calls ``base``.

    Raises:
        UserError: an unknown field, or a value of another type, by name.
    """
    types = typing.get_type_hints(type(base))
    known = sorted({f.name for f in fields(base)} - set(FIXED))  # type: ignore[arg-type]
    changed = {}
    for key, value in overrides.items():
        if key not in known:
            raise UserError(f"{what}: no field {key!r}; there are {', '.join(known)}")
        try:
            changed[key] = _cast(value, types[key])
        except (TypeError, ValueError) as error:
            raise UserError(f"{what}: {key}={value!r} should be like {getattr(base, key)!r}") from error
    return replace(base, **changed)  # type: ignore[type-var]


def differences(reference: Any, run: Any) -> dict[str, list[Any]]:
    """Fields in which two dataclasses of one type differ: ``{field: [reference's, run's]}``."""
    expected, found = asdict(reference), asdict(run)
    return {key: [expected[key], found[key]] for key in expected if expected[key] != found[key]}


def _cast(value: Any, kind: Any) -> Any:
    """``value``, or its text, in the type of an annotation; ValueError or TypeError where it does not fit."""
    if typing.get_origin(kind) is tuple:
        return _cast_tuple(value, typing.get_args(kind))
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if kind is bool:
        text = str(value).lower()
        if not isinstance(value, (bool, str)) or text not in ("true", "false"):
            raise TypeError
        return text == "true"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    if kind is int and isinstance(value, float):
        raise TypeError
    number = kind(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _cast_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.strip(" ()[]").split(",") if part.strip()]
    elif not isinstance(value, (list, tuple)):
        value = [value]
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise ValueError
    return tuple(_cast(item, kind) for item, kind in zip(value, kinds))
