"""From names, files and words to the typed settings of a pre-training run; its recipe and its deviations.

A config names what it stands on: ``base: paka.yaml`` (a file beside it) or ``base: paka-25ep`` (a recipe,
shipped in ``pretrain/recipes``), or a list of these. One that names no recipe stands on its method's own. The
recipe's YAML is the only place where its values stand; a block ``recipe:`` in it says what else belongs to it
(:class:`RecipeInfo`).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pretrain.errors import TRUST, UserError
from pretrain.methods import SHIPPED as METHODS_SHIPPED
from pretrain.methods import TrainSettings, find_method
from pretrain.results.renamed import PRETRAINING
from pretrain.results.schema import Protocol
from pretrain.settings import (
    Layer,
    Settings,
    as_dict,
    build,
    differences,
    fields,
    flat,
    keys_where,
    nested,
    opened,
    read_layers,
    read_words,
    setting,
    shown,
    upgraded,
)

RECIPES = Path(__file__).parent / "recipes"
_TOP = Path(__file__).parents[1]
# configs/ of a checkout; posfield.configs of an installed wheel
SHIPPED = _TOP / "posfield" / "configs" if (_TOP / "posfield" / "configs").is_dir() else _TOP / "configs"
CONFIGS = SHIPPED / "pretrain"
VERSION = 1
SMALLEST_SIDE_PX = 512  # images that are scaled down further before they are cropped are other data


class Variant(Settings):
    """What a recipe changes for some sizes of the network."""

    when: dict[str, Any] = setting(..., "{dotted key: value or pattern}, all of them")
    then: dict[str, Any] = setting(..., "{dotted key: value}")


class RecipeInfo(Settings):
    """The block ``recipe:`` of a recipe's YAML."""

    n_images: int = setting(0, "images of its data set; 0: any", ge=0)
    backbones: tuple[str, ...] = setting((), "registry names that follow it; none: any")
    from_scratch: bool = setting(True, "whether it starts from scratch, or from backbone.weights")
    free: tuple[str, ...] = setting((), "dotted keys that are no part of it")
    variants: tuple[Variant, ...] = setting((), "what it changes for some sizes")


# --- loading ----------------------------------------------------------------------------------------------


Changes = Sequence[str] | Mapping[str, Any]  # "group.key=value" words, or {"group.key": value}, nested or not


def load_config(path: str | Path | None = None, words: Changes = ()) -> Any:
    """The settings of a run: its method's ``Settings``.

    Args:
        path: a YAML file, or the name of a recipe; none: the method's own recipe.
        words: ``group.key=value``, each over all files; or a mapping of keys to values.

    Raises:
        UserError: names the file, the key and the value.
    """
    settings = build(*resolved(path, words))
    if settings.recipe:  # else a wrong one would be found at the end of the run, when its result is written
        method = _method_in(_recipe(settings.recipe))
        if not issubclass(find_method(settings.method), find_method(method)):
            other = f"is of method={method}, not of {settings.method}"
            raise UserError(f"config: recipe={settings.recipe} {other}; take another")
    return settings


def load_saved(path: Path, words: Changes = (), trust: bool = False) -> Any:
    """:func:`load_config` of a file in a run's folder, which may be a stranger's.

    Args:
        trust: import a method that is no shipped one.

    Raises:
        UserError: as :func:`load_config`; it names such a method.
    """
    if not trust:
        read_layers(path, find_config, _without_code)
    return load_config(path, words)


def from_saved(values: Mapping[str, Any], trusted: str = "") -> Any:
    """The settings that an earlier run saved; keys that its code did not know yet have their defaults.

    Args:
        trusted: a method that may be imported although it is no shipped one.

    Raises:
        UserError: they cannot be read, or name another method that is no shipped one.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"saved config: {type(values).__name__} is no mapping of keys")
    layer = _modern(_without_code(Layer("saved config", values), trusted))
    return build(find_method(_method_in([layer])).Settings, [layer])


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The YAML that a name stands for: a path (relative to ``beside``), a recipe's name, or one of
    ``configs/pretrain``.

    Raises:
        UserError: there is none.
    """
    path = (beside or Path()) / os.path.expanduser(name)
    for found in (path, *(folder / f"{name}.yaml" for folder in (RECIPES, RECIPES / "ablation", CONFIGS))):
        if os.path.isfile(found):  # no error for a name that no file can have
            return found
    known = ", ".join(recipe_names())
    raise UserError(f"config: no file {path}, and no recipe of that name; there are {known}")


def recipe_names() -> list[str]:
    """The shipped recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _recipe(name: str) -> list[Layer]:
    """The layers of a recipe; none for "". Raises UserError where there is none of that name."""
    return read_layers(_recipe_path(name), find_config, _prepared) if name else []


def _recipe_path(name: str) -> Path:
    if name not in recipe_names():
        raise UserError(f"config: recipe={name!r} is none of {', '.join(recipe_names())}; take one of these")
    return RECIPES / f"{name}.yaml"


def resolved(path: str | Path | None = None, words: Changes = ()) -> tuple[type[TrainSettings], list[Layer]]:
    """The model and the layers, the most basic first, that :func:`load_config` builds settings of."""
    said = Layer("arguments", nested(words)) if isinstance(words, Mapping) else read_words(words)
    typed = _modern(replace(said, values=_own_path(said.values, Path())))
    layers = [] if path is None else read_layers(find_config(path), find_config, _prepared)
    model = find_method(_method_in([*layers, typed])).Settings
    if not _recipe_in(layers)[0]:
        layers = [*_recipe(model.model_fields["recipe"].default), *layers]
    name, n = _recipe_in(layers)
    layers.append(typed)
    return model, [*layers[:n], *_variants(model, layers, recipe_info(name)), *layers[n:]]


def _recipe_in(layers: Sequence[Layer]) -> tuple[str, int]:
    """The recipe that layers stand on, the last one, and the number of layers up to it; ("", 0): none."""
    of_recipes = {f"recipe {name}": name for name in recipe_names()}
    found = [(of_recipes[layer.name], n) for n, layer in enumerate(layers, 1) if layer.name in of_recipes]
    return found[-1] if found else ("", 0)


def _prepared(layer: Layer) -> Layer:
    """A file's layer under today's names. A recipe is called after its file, and holds that name as
    ``recipe``; a name there in another file (a run's) is one more base."""
    path, values = Path(layer.name), dict(layer.values)
    if is_recipe := path.parent.resolve() == RECIPES.resolve():
        values["recipe"] = path.stem
    values = dict(_modern(replace(layer, values=_own_path(values, path.parent))).values)
    named, bases = values.get("recipe", ""), values.get("base", [])
    if is_recipe:
        return replace(layer, name=f"recipe {named}", values=values)
    if not isinstance(named, str):
        own = "only files of pretrain/recipes describe a recipe"
        raise UserError(f"config: {path}: {own}; write 'base: NAME'")
    if named:
        bases = [*(bases if isinstance(bases, list) else [bases]), str(_recipe_path(named).resolve())]
    return replace(layer, values={**values, "base": bases})


def _own_path(values: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A method that is a file is named relative to its config's folder, or to the working one."""
    name = values.get("method")
    if isinstance(name, str) and name.endswith(".py") and not Path(name).is_absolute():
        return {**values, "method": str((folder / name).resolve())}
    return values


def _method_in(layers: Iterable[Layer]) -> str:
    """The method that layers name, the last one that does."""
    name = str(TrainSettings.model_fields["method"].default)
    for layer in layers:
        name = layer.values.get("method", name)
        if not isinstance(name, str):
            raise UserError(f"config: method={shown(name)} ({layer.name}) should be the name of one method")
    return name


def _variants(model: type[TrainSettings], layers: Sequence[Layer], info: RecipeInfo) -> list[Layer]:
    """What a recipe changes for the sizes that a config asks for: over the recipe, under its own words."""
    said = {key: info.default for key, info, _ in fields(model)}
    for layer in layers:
        said |= flat(layer.values)
    return [
        Layer("recipe's variant", opened(variant.then))
        for variant in info.variants
        if all(fnmatch(str(said[key]), str(wanted)) for key, wanted in variant.when.items())
    ]


# --- configs of earlier versions --------------------------------------------------------------------------

METHODS = {"intertwined": "intertwined", "dense": "paka"}  # run.algorithm


class _Renamed(Settings):
    renamed = PRETRAINING


def _without_code(layer: Layer, trusted: str = "") -> Layer:
    """The layer, unless its method would be imported from elsewhere."""
    method = upgraded(_Renamed, layer.values).get("method", trusted)
    known = (trusted, *METHODS, *METHODS_SHIPPED)
    if isinstance(method, str) and method not in known:
        raise UserError(f"config: {layer.name}: method={method!r} is code that would be run; {TRUST}")
    return layer


def _modern(layer: Layer) -> Layer:
    """A layer under today's names. Whole configs of old held the keys of all methods and named no recipe."""
    values = upgraded(_Renamed, layer.values)
    method = values.get("method")
    if isinstance(method, str):
        values["method"] = method = METHODS.get(method, method)
        is_whole = all(isinstance(values.get(group), Mapping) for group in TrainSettings.groups())
        if is_whole and "recipe" not in values:
            model = find_method(method).Settings
            values = _known(model, values)
            values["recipe"] = _recipe_of(build(model, [Layer("saved config", values)]))
    return replace(layer, values=values)


def _known(model: type[TrainSettings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values without the keys that only the other methods of that time have."""
    others = {key for name in METHODS.values() for key, _, _ in fields(find_method(name).Settings)}
    others -= {key for key, _, _ in fields(model)}
    return opened({key: value for key, value in flat(values).items() if key not in others and value != {}})


def _recipe_of(settings: TrainSettings) -> str:
    """The recipe of a config that names none, by the words (texts, true, false; not numbers, since runs are
    scaled down) in which it differs from the defaults: the config holds them all. Of several the one with
    the most words; else the method's own."""
    model, held = type(settings), flat(settings)
    weights = Layer("run", {"backbone": {"weights": settings.backbone.weights}})
    defaults, no_part = flat(build(model, [weights])), keys_where(model, "in_recipe", False)
    n_words = {str(model.model_fields["recipe"].default): -1}
    for name in recipe_names():
        layers = _recipe(name)
        if _method_in(layers) == settings.method:
            recipe = flat(build(model, [*layers, weights]))
            told = (key for key in recipe if recipe[key] != defaults[key] and key not in no_part)
            words = {key: recipe[key] for key in told if isinstance(recipe[key], str | bool)}
            if words.items() <= held.items():
                n_words[name] = len(words)
    return max(n_words, key=lambda name: n_words[name])


# --- the recipe of a run ----------------------------------------------------------------------------------


def run_protocol(
    settings: TrainSettings, n_images: int, others: Mapping[str, list[Any]] | None = None
) -> Protocol:
    """The recipe that a run stands on (without one its method's defaults), and every setting that differs.

    ``optim.batch_size`` is the number of images a step over all ranks and micro-batches, so neither the ranks
    nor ``step.accumulate`` make another recipe.

    Args:
        n_images: size of the run's data set; for a recipe that names a data set, its size is part of it.
        others: further deviations.
    """
    info = recipe_info(settings.recipe)
    deviations = {**_deviations(settings, info), **(others or {})}
    if 0 < settings.data.max_side_px < SMALLEST_SIDE_PX:
        deviations["data.max_side_px"] = [0, settings.data.max_side_px]
    if info.n_images and n_images != info.n_images:
        deviations["data.n_images"] = [info.n_images, n_images]
    name = settings.recipe or Path(settings.method).stem
    return Protocol(name=name, version=VERSION, full=not deviations, deviations=deviations)


def recipe_info(name: str) -> RecipeInfo:
    """The blocks ``recipe:`` of a recipe and its bases, each over those before it; of "" the defaults."""
    layers = read_layers(_recipe_path(name), find_config) if name else []
    blocks = [Layer(layer.name, layer.values.get("recipe", {})) for layer in layers]
    return build(RecipeInfo, blocks, "recipe")


def _deviations(settings: TrainSettings, info: RecipeInfo) -> dict[str, list[Any]]:
    """{dotted key: [the recipe's value, the run's]}."""
    model = type(settings)
    said = [Layer("run", {"backbone": as_dict(settings.backbone)})]
    # a post-training is none without
    own = Layer("run", {"backbone": {"weights": settings.backbone.weights}})
    reference = build(model, [*_recipe(settings.recipe), *_variants(model, said, info), own])
    no_part = {*keys_where(model, "in_recipe", False), *info.free, "method"}
    found = {key: pair for key, pair in differences(reference, settings).items() if key not in no_part}
    method = _method_in(_recipe(settings.recipe)) if settings.recipe else settings.method
    if find_method(method) is not find_method(settings.method):  # one that stands on the recipe's
        found["method"] = [method, Path(settings.method).stem]
    if info.backbones:
        found.pop("backbone.name", None)
        if settings.backbone.name not in info.backbones:
            found["backbone.name"] = [" or ".join(info.backbones[:2]), settings.backbone.name]
    starts = {"run.init_from": settings.run.init_from}
    if info.from_scratch:
        starts["backbone.weights"] = settings.backbone.weights
    for key, start in starts.items():
        if start:
            found[key] = ["from scratch" if info.from_scratch else "from backbone.weights", Path(start).name]
    return found
