"""Typed settings: a model beside the code that reads it; one way to load, check, change, compare, print it.

All three packages use this module, for runs, protocols, comparisons and results. A field carries its default,
its range, what it means and where its value comes from (:func:`setting`). Text never passes through YAML's
guesses: a field's type reads its words, so ``run.output=2024-10-01`` is a folder and ``run.seed=010`` is ten.
"""

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.errors import UserError
from pretrain.files import read_plain

MAX_YAML_BYTES = 2**22
NOTHING = ("null", "none", "None", "~", "")  # words for None, where a field allows it
KEY = "\0"  # the place of a key in an error; no file's name holds it


class Settings(BaseModel):
    """Base of every group of settings: immutable, no unknown key, no wrong type, only finite numbers.

    Class attributes:
        renamed: {old dotted key: new one}, relative to this model. Old words, files and saved runs still
            load.
        in_recipe: whether the group says what is learned; false: where and how a run computes it.
        fixed: whether the group must stay as it is when a run is resumed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}
    in_recipe: ClassVar[bool] = True
    fixed: ClassVar[bool] = True


Model = TypeVar("Model", bound=Settings)


def setting(
    default: Any,
    text: str,
    source: str = "ours",
    *,
    in_recipe: bool = True,
    fixed: bool = True,
    settable: bool = True,
    **limits: Any,
) -> Any:
    """A field of a :class:`Settings` model.

    Args:
        default: its default, or a function that makes it; ``...`` for none.
        text: what it means, with its unit.
        source: where the default comes from: a table of the paper, a public code, or "ours".
        in_recipe, fixed: as :class:`Settings`' class attributes, of this field alone.
        settable: whether words and files may change it.
        limits: pydantic's ``ge``, ``gt``, ``le``, ``lt``, ``min_length``, ``pattern``, ...
    """
    extra: dict[str, Any] = {"source": source, "in_recipe": in_recipe, "fixed": fixed, "settable": settable}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**made, description=f"{text} [{source}]", json_schema_extra=extra, **limits)


ours = partial(setting, source="ours")


@dataclass(frozen=True)
class Layer:
    """Values that one file, or the command line, sets.

    Attributes:
        name: of the file, or ``command line``.
        values: nested by group. A leaf is text, a list of texts, or a value that JSON can hold.
        comments: {dotted key: the comment on its line}.
        is_read: from a file, which may be any: where none of its keys is known, errors repeat nothing of it.
    """

    name: str
    values: Mapping[str, Any]
    comments: Mapping[str, str] = field(default_factory=dict)
    is_read: bool = False


# --- reading ----------------------------------------------------------------------------------------------


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """YAML whose scalars stay text, without anchors and without a key that stands twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("aliases (*name) are not allowed: write the value out")
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for at, key in enumerate(keys):
            line = node.value[at][0].start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {line}: the key is no text")
            if key in keys[:at]:
                raise yaml.YAMLError(f"line {line}: the key stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Layer:
    """The values of a YAML file, their scalars as text.

    Raises:
        UserError: no file, no UTF-8, no YAML, no mapping, an alias, a key that stands twice; names the file.
    """
    path = Path(path)
    try:
        text = read_plain(path, MAX_YAML_BYTES).decode()
        node = yaml.compose(text, _Loader)
        values = {} if node is None else yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"config: no file {path}: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # UnicodeDecodeError is a ValueError
        told = f"is no readable YAML ({without_content(error)}); save it as UTF-8 YAML"
        raise UserError(f"config: {path} {told}") from error
    if not isinstance(values, dict):
        raise UserError(f"config: {path} is no mapping of keys, such as 'run: ...'")
    return Layer(str(path), values, dict(_comments(node, text.splitlines())), is_read=True)


def without_content(error: Exception) -> str:
    """Why a file cannot be read as YAML or Python, and in which line, without what stands there: it may be any
    file of this machine."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        problem = re.sub(r"'(?!<)[^']{2,}'", "...", error.problem or "damaged")
        return f"line {error.problem_mark.line + 1}: {problem}"
    if isinstance(error, UnicodeDecodeError):
        n_before = error.object[: error.start].count(b"\n")
        return f"line {n_before + 1} is no UTF-8"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno} is no Python" if error.lineno else "no Python"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_layers(
    path: str | Path,
    find: Callable[[str, Path], Path] = lambda base, folder: folder / base,
    prepare: Callable[[Layer], Layer] = lambda layer: layer,
) -> list[Layer]:
    """A YAML file and its bases (``base:``, a name or a list of names), the most basic first, each file once.

    Args:
        path: of the file.
        find: gives a base's path, from its name and the folder of the file that names it.
        prepare: is called on each file's layer, before its bases are read.

    Returns:
        the layers, without ``base``.

    Raises:
        UserError: as :func:`read_yaml`; a base that is not a name, or that leads back to a file before it.
    """
    layers: dict[Path, Layer] = {}

    def read(at: Path, above: tuple[Path, ...]) -> None:
        chain = (*above, at)
        if at.resolve() in [before.resolve() for before in above]:
            raise UserError(f"config: base: {' -> '.join(map(str, chain))} is a circle; take one base out")
        layer = prepare(read_yaml(at))
        values = dict(layer.values)
        bases = values.pop("base", [])
        for base in bases if isinstance(bases, list) else [bases]:
            if not isinstance(base, str):
                raise UserError(f"config: base={shown(base)} ({at}) should be the name of a file")
            if base not in NOTHING:
                read(find(base, at.parent), chain)
        layers.setdefault(at.resolve(), replace(layer, values=values))

    read(Path(path), ())
    return list(layers.values())


def _comments(node: Any, lines: Sequence[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, comment at the end of its line)."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _comments(value, lines, f"{name}.")
        elif value.start_mark.line < len(lines):
            end = value.end_mark
            rest = lines[end.line][end.column :] if end.line < len(lines) else ""
            if match := re.search(r"#\s*(.*\S)", rest):
                yield name, match[1]


def read_words(words: Sequence[str]) -> Layer:
    """``group.key=value`` words of a command line.

    Raises:
        UserError: a word without ``=``, a key that is given twice, or a word that is no UTF-8.
    """
    return Layer("command line", opened(split_words(words)))


def split_words(words: Sequence[str]) -> dict[str, str]:
    """{key: text} of ``key=text`` words; errors as :func:`read_words`."""
    given: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"config: {word!r} is not of the form key=value")
        if key in given:
            raise UserError(f"config: {key} is given twice: {given[key]!r} and {text!r}; give it once")
        given[key] = text
    return given


def nested(
    changes: Mapping[str, Any], values: dict[str, Any] | None = None, group: str = ""
) -> dict[str, Any]:
    """{"group.key": value} and {"group": {"key": value}} as nested values; paths as texts.

    Raises:
        UserError: a key is given twice.
    """
    values = {} if values is None else values
    for key, value in changes.items():
        if isinstance(value, Mapping):
            nested(value, values, f"{group}{key}.")
        elif f"{group}{key}" in flat(values):
            raise UserError(f"config: {group}{key} is given twice; give it once")
        else:
            put(values, f"{group}{key}", str(value) if isinstance(value, Path) else value)
    return values


def opened(changes: Mapping[str, Any]) -> dict[str, Any]:
    """{"group.key": value} as nested values, each value as it is."""
    values: dict[str, Any] = {}
    for key, value in changes.items():
        put(values, key, value)
    return values


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested values."""
    *groups, last = key.split(".")
    both = "is given as a value and as a group of keys; give one of them"
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise UserError(f"config: {key}: {group} {both}")
    if isinstance(values.get(last), dict):
        raise UserError(f"config: {key} {both}")
    values[last] = value


# --- building ---------------------------------------------------------------------------------------------


def build(model: type[Model], layers: Sequence[Layer] = (), what: str = "config") -> Model:
    """A model from its defaults and some layers, each over those before it.

    Args:
        what: how an error calls the settings.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range; one line that names key, value and
            file.
    """
    # A group's default may differ from its model's: a layer that sets one key of it keeps the others.
    defaults = {key: info.default for key, info in model.model_fields.items()}
    merged = {key: group.model_dump() for key, group in defaults.items() if isinstance(group, Settings)}
    origins: dict[str, str] = {}
    for layer in layers:
        values = upgraded(model, layer.values)
        name = "" if layer.name == what else f" ({layer.name})"
        if layer.is_read and values and not _near(values, model):
            known = ", ".join(sorted(model.model_fields))
            raise UserError(f"{what}: {layer.name} is none: it holds no key of it; there are {known}")
        typed = _typed_group(model, values, f"{what}: {KEY}{name}", "")
        origins |= dict.fromkeys(flat(typed), name)
        _merge(merged, typed)
    return validated(model, merged, what, origins)


def _near(keys: Iterable[str], model: type[Settings]) -> bool:
    """Whether any is a model's, or nearly so."""
    known = list(model.model_fields)
    return any(difflib.get_close_matches(str(key), known, 1) for key in keys)


def replaced(settings: Model, changes: Mapping[str, Any], what: str = "config") -> Model:
    """The settings with some dotted keys changed, to values or their text; checked as by :func:`build`."""
    model, merged = type(settings), settings.model_dump()
    _merge(merged, _typed_group(model, upgraded(model, opened(changes)), f"{what}: {KEY}", ""))
    return validated(model, merged, what)


def upgraded(model: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with the keys that were renamed under their new names."""
    new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for old, name in model.renamed.items():
        group, _, key = old.rpartition(".")
        holder = new.get(group) if group else new
        if isinstance(holder, dict) and key in holder:
            value = holder.pop(key)
            is_group = isinstance(value, Mapping)
            items = {f"{name}.{inner}": v for inner, v in value.items()} if is_group else {name: value}
            for key, item in items.items():
                if any(f"{there}.".startswith(f"{key}.") for there in flat(new)):
                    both = f"{old} is the old name of {key}, and both are given"
                    raise UserError(f"config: {both}; give {key} alone")
                put(new, key, item)
            if group and not holder:
                new.pop(group)
    for key, info in model.model_fields.items():
        if _is_group(info.annotation) and isinstance(new.get(key), Mapping):
            new[key] = upgraded(info.annotation, new[key])  # type: ignore[arg-type]
    return new


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def validated(
    model: type[Model], values: Any, what: str = "config", origins: Mapping[str, str] = MappingProxyType({})
) -> Model:
    """A model from typed values, with its rules and ranges checked.

    Args:
        what: how an error calls the settings.
        origins: {dotted key: what an error says of where its value comes from}.

    Raises:
        UserError: one line that names key and value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{what}: {problem(error, origins)}") from error


def problem(error: ValidationError, origins: Mapping[str, str] = MappingProxyType({})) -> str:
    """What is wrong first with a model's values; ``origins`` as in :func:`validated`."""
    first = error.errors()[0]
    loc = first["loc"]
    key = _dotted(loc)
    if first["type"] == "value_error":  # a rule of ours: it names its keys, but not of which item of a list
        depth = max((i for i, part in enumerate(loc, 1) if isinstance(part, int)), default=0)
        return f"{_dotted(loc[:depth])}: {first['ctx']['error']}" if depth else str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{key} is missing; set it"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    holders = (".".join(map(str, loc[:n])) for n in range(len(loc), 0, -1))
    origin = next((origins[name] for name in holders if name in origins), "")
    reason = re.sub(r"^Input should|^(String|Tuple) should", "should", first["msg"])
    return f"{f'{key}=' if key else ''}{shown(first['input'])} {reason}{origin}"


def _dotted(loc: Sequence[str | int]) -> str:
    """``entries[0].file``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _typed_group(model: type[Settings], values: Any, where: str, prefix: str) -> dict[str, Any]:
    """Nested values in the types of a model's fields; ``where``: an error's beginning, KEY in it."""
    if not isinstance(values, Mapping):
        key = prefix.rstrip(".") or "it"
        raise UserError(f"{where.replace(KEY, key)} is a group of keys, not {shown(values)}; set {key}.KEY")
    typed = {}
    for key, value in values.items():
        name, info = f"{prefix}{key}", model.model_fields.get(key)
        if info is None or not _flag(info, "settable"):
            known = [k for k, i in model.model_fields.items() if _flag(i, "settable")]
            near = difflib.get_close_matches(str(key), known, 1)
            group = f"{prefix}* has" if prefix else "there are"
            hint = f"did you mean {prefix}{near[0]}?" if near else f"{group} {', '.join(sorted(known))}"
            raise UserError(f"{where.replace(KEY, f'unknown key {name!r}')}; {hint}")
        typed[key] = _typed_key(info.annotation, value, where, name)
    return typed


def _typed_key(kind: Any, value: Any, where: str, name: str) -> Any:
    try:
        return typed_value(kind, value, where, name)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        told = where.replace(KEY, f"{name}={shown(value)}")
        raise UserError(f"{told} should be {_kind_name(kind)}") from error


def _flag(info: Any, name: str) -> bool:
    return bool((info.json_schema_extra or {}).get(name, True))


def typed_value(kind: Any, value: Any, where: str = KEY, name: str = "value") -> Any:
    """A value, or its text, in the type of an annotation.

    Raises:
        TypeError, ValueError: it does not fit; UserError: a key of a group that does not.
    """
    kind = _bare(kind)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if _is_group(kind):
        return _typed_group(kind, value, where, f"{name}.")
    if origin in (types.UnionType, typing.Union):
        words = NOTHING[:4] if str in parts else NOTHING  # an empty text is a text
        if type(None) in parts and (value is None or (isinstance(value, str) and value in words)):
            return None
        return typed_value(next(part for part in parts if part is not type(None)), value, where, name)
    if origin is tuple:
        return _typed_tuple(parts, value, where, name)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return {str(k): _typed_key(parts[1], item, where, f"{name}.{k}") for k, item in value.items()}
    if kind is Any:
        return plain(value) if isinstance(value, str) else value
    return _typed_scalar(kind, value)


def _typed_tuple(parts: tuple[Any, ...], value: Any, where: str, name: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        inner = value.strip()
        if inner[:1] in ("[", "(") and inner[-1:] in ("]", ")"):
            inner = inner[1:-1]
        value = [item.strip() for item in inner.split(",")] if inner.strip() else []
        value = value[:-1] if value and not value[-1] else value  # (1,)
    elif not isinstance(value, list | tuple):
        value = [value]
    if parts[-1] is not Ellipsis and len(value) != len(parts):
        raise ValueError
    kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
    return tuple(
        typed_value(kind, item, where, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value))
    )


def _typed_scalar(kind: Any, value: Any) -> Any:
    """A number, a bool or a text; a Literal's check is pydantic's."""
    if not isinstance(value, str):
        is_bool = isinstance(value, bool) and kind is not bool
        if is_bool or kind is str or isinstance(value, Mapping | list | tuple):
            raise TypeError
        return float(value) if kind is float and isinstance(value, int) else value
    value.encode()  # a lone surrogate: bytes of a command line that are no UTF-8
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError
        return value.lower() == "true"
    if kind is int:
        if not re.fullmatch(r"[+-]?\d+", value):
            raise ValueError
        return int(value)
    if kind is float:
        return float(value)
    return value


def _bare(kind: Any) -> Any:
    """An annotation without its ranges."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _kind_name(kind: Any) -> str:
    """For people: ``a list of 2 numbers``."""
    kind = _bare(kind)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if _is_group(kind) or origin is dict:
        return "a group of keys"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _kind_name(part) for part in parts)
    if origin is tuple:
        count = "" if parts[-1] is Ellipsis else f"{len(parts)} "
        return f"a list of {count}values, each {_kind_name(parts[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "UTF-8 text"}
    return names.get(kind, f"one of {', '.join(map(str, parts))}" if parts else str(kind))


def plain(text: str) -> Any:
    """A text where no type says how to read it: null, true, false, a number, a list of these, or itself."""
    if text in NOTHING[:4]:
        return None
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?(0|[1-9]\d*)", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", text):  # 010 is a text
        return float(text)
    if text[:1] == "[" and text[-1:] == "]":
        return [plain(item.strip()) for item in text[1:-1].split(",") if item.strip()]
    return text


def above_zero(name: str, value: Any) -> float:
    """A finite number above 0, or its text.

    Raises:
        UserError: it is none; names it.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{name}={shown(value)} should be a number above 0")
    return number


def shown(value: Any) -> str:
    """A value in an error: one line, not longer than a line should be."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def rising(group: str, settings: Settings, *keys: str) -> None:
    """Check ranges (from, to) of a group in its validator.

    Raises:
        ValueError: one falls; names it.
    """
    for key in keys:
        low, high = getattr(settings, key)
        if low > high:
            raise ValueError(f"{group}.{key}={[low, high]} should rise")


# --- looking ----------------------------------------------------------------------------------------------


def as_dict(settings: Settings) -> dict[str, Any]:
    """Plain values (tuples as lists), as JSON and YAML hold them."""
    return settings.model_dump(mode="json")


def flat(values: Settings | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: plain value} of settings, or of nested values; each key begins with ``prefix``."""
    found: dict[str, Any] = {}
    for key, value in (as_dict(values) if isinstance(values, Settings) else values).items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(reference: Settings, settings: Settings) -> dict[str, list[Any]]:
    """{dotted key: [the reference's value, the settings']} of all that differs; None: it has no such key."""
    return compared(as_dict(reference), as_dict(settings))


def compared(before: Mapping[Any, Any], now: Mapping[Any, Any], prefix: str = "") -> dict[str, list[Any]]:
    """:func:`differences` of nested plain values. Lists of mappings go item by item: ``hooks.2.type``."""
    found: dict[str, list[Any]] = {}
    for key in {**before, **now}:
        a, b = _opened(before.get(key)), _opened(now.get(key))
        are_open = all(isinstance(value, Mapping) or value in (None, []) for value in (a, b))
        if isinstance(a or b, Mapping) and are_open:
            found |= compared(a or {}, b or {}, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = [before.get(key), now.get(key)]
    return found


def _opened(value: Any) -> Any:
    is_of_mappings = isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)
    return dict(enumerate(value)) if is_of_mappings else value


def fields(model: type[Settings], prefix: str = "") -> Iterator[tuple[str, Any, type[Settings]]]:
    """(dotted key, pydantic's field, the model that holds it) of every key, groups opened."""
    for key, info in model.model_fields.items():
        if _is_group(info.annotation):
            yield from fields(info.annotation, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{key}", info, model


def keys_where(model: type[Settings], flag: str, value: bool) -> frozenset[str]:
    """Dotted keys whose ``in_recipe`` or ``fixed``, their own and their group's, is ``value``."""
    return frozenset(
        key for key, info, holder in fields(model) if (getattr(holder, flag) and _flag(info, flag)) == value
    )


def printed(settings: Settings, layers: Sequence[Layer] = ()) -> str:
    """The settings as YAML that loads again; lines end with what a key means and where its value is from."""
    origins = {}
    for layer in layers:
        for key in flat(upgraded(type(settings), layer.values)):
            said = layer.comments.get(key, "")
            origins[key] = f"{layer.name}{': ' if said else ''}{said}"
    values, lines, group = flat(settings), list[str](), ""
    # keys without a group first
    for key, info, _ in sorted(fields(type(settings)), key=lambda item: "." in item[0]):
        parent, _, name = key.rpartition(".")
        if parent != group:
            lines += ["", f"{'  ' * parent.count('.')}{parent.rpartition('.')[2]}:"]
            group = parent
        value = _readable(json.dumps(values.get(key, {}), ensure_ascii=False))
        origin = f"; here: {_readable(origins[key])}" if key in origins else ""
        lines.append(f"{'  ' * key.count('.')}{name}: {value}".ljust(40) + f"  # {info.description}{origin}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _readable(text: str) -> str:
    """A text whose characters YAML does not take, or takes for the end of a line, are escaped as in JSON."""
    taken = r"\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff"
    return re.sub(f"[^{taken}]", lambda match: f"\\u{ord(match[0]):04x}", text)


def described(settings: Settings | type[Settings]) -> dict[str, tuple[str, ...]]:
    """{dotted key: (its default, type and range; what it means; where the default is from)}, for people.

    Args:
        settings: a model; or settings, whose values stand in place of the defaults.
    """
    model = settings if isinstance(settings, type) else type(settings)
    values = {} if isinstance(settings, type) else flat(settings)
    found = dict[str, tuple[str, ...]]()
    for key, info, _ in fields(model):
        if _flag(info, "settable"):
            default = values.get(key, info.get_default(call_default_factory=True))
            value = "required" if info.is_required() else f"`{in_words(default)}`"
            source = str((info.json_schema_extra or {}).get("source", "ours"))  # type: ignore[union-attr]
            text = (info.description or "").removesuffix(f" [{source}]")
            found[key] = (f"{value}; {kind_and_range(info)}", text, source)
    return found


def in_words(value: Any) -> str:
    """A value as a command line and YAML take it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_words, value))}]"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to", "multiple_of": "a multiple of"}


def kind_and_range(info: Any) -> str:
    """What a pydantic field takes: ``a number, from 0 to 1``."""
    limits, parts = list(info.metadata), typing.get_args(info.annotation)
    if typing.get_origin(info.annotation) is tuple:  # of its items
        limits += getattr(parts[0], "__metadata__", ())
    limits += [inner for limit in limits for inner in getattr(limit, "metadata", ())]
    bounds = {name: getattr(limit, name, None) for name in BOUNDS for limit in limits if hasattr(limit, name)}
    numbers = {name: f"{n:.6g}" if isinstance(n, float) else n for name, n in bounds.items() if n is not None}
    said = " ".join(f"{BOUNDS[name]} {number}" for name, number in numbers.items())
    return ", ".join(filter(None, [_kind_name(info.annotation).replace("UTF-8 ", ""), said]))


def json_schema(model: type[Settings]) -> dict[str, Any]:
    """The JSON schema of a YAML file of settings, with ``base``, for editors that complete and check it."""
    schema = _without_marks(model.model_json_schema())
    base = {"type": ["string", "array"], "items": {"type": "string"}}
    schema["properties"]["base"] = {**base, "description": "files, or recipes, that it changes"}
    return schema


def _without_marks(schema: Any) -> Any:
    """A schema without our own keys of a field, and without titles, which repeat its name."""
    if isinstance(schema, dict):
        marks = {"title", "source", "in_recipe", "fixed", "settable"}
        kept = {k: v for k, v in schema.items() if k not in marks or isinstance(v, dict)}
        # a default may hold such a key
        return {k: v if k == "default" else _without_marks(v) for k, v in kept.items()}
    return [_without_marks(item) for item in schema] if isinstance(schema, list) else schema
