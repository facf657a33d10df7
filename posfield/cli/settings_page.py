"""The page of all settings, ``docs/settings.md``: what ``posfield config --markdown`` prints."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from det_plugin import protocol as detection
from pretrain.config import recipe_info, recipe_names, resolved
from pretrain.data.datasets import MaskRule
from pretrain.evaluation.dense import DenseSettings
from pretrain.jobs.compare_config import Comparison, Entry
from pretrain.methods import SHIPPED, TrainSettings, find_method
from pretrain.settings import (
    Settings,
    described,
    flat,
    in_words,
)


def page() -> str:
    """``docs/settings.md``: every setting of every command that has typed ones."""
    return "\n".join([HEAD, *_pretraining(), *_protocols(), *_others()])


def _pretraining() -> Iterator[str]:
    shared = described(TrainSettings)
    yield f"## Pre-training\n\n### Every method\n\n{_keys(shared)}"
    for name in SHIPPED:
        own = described(find_method(name).Settings)
        yield f"### Method `{name}`\n\nWhat it adds to the keys above, or sets otherwise.\n"
        yield _keys({key: said for key, said in own.items() if shared.get(key) != said})
    yield "### Recipes\n\nWhat each recipe sets over the defaults of its method and the recipes that it stands on.\n"
    for name in recipe_names():
        model, layers = resolved(name)
        rows = [
            (f"`{key}`", f"`{in_words(value)}`", layer.comments.get(key, ""))
            for layer in layers
            if layer.name == f"recipe {name}"
            for key, value in flat(layer.values).items()
            if key.partition(".")[0] not in ("recipe", "method")
        ]
        below = [
            f"`{layer.name.removeprefix('recipe ')}`" for layer in layers[:-1] if "variant" not in layer.name
        ]
        stands = [f"stands on {', '.join(base)}"] if (base := [b for b in below if b != f"`{name}`"]) else []
        yield f"#### {name}\n\n{', '.join([f'Method `{_method(model)}`', *stands])}.\n"
        yield _table(("key", "value", "why"), rows)
        for variant in recipe_info(name).variants:
            yield f"Where {_values(variant.when)}: {_values(variant.then)}.\n"


def _protocols() -> Iterator[str]:
    from seg_plugin import protocol as segmentation  # needs MMSegmentation

    for title, command, module, size in (
        ("Detection", "detect", detection, detection.protocol("coco-12ep", "vit_base_patch16")),
        ("Segmentation", "segment", segmentation, segmentation.protocol()),
    ):
        yield f"## {title}\n\nFields of the protocol, as `posfield {command} ... key=value` changes them.\n"
        yield _keys(described(size))
        rows = [(f"`{name}`", _values(values)) for name, values in module.PROTOCOLS.items()]
        yield _table(("`--protocol`" if command == "detect" else "protocol", "what it sets"), rows)
    rows = [(size, _values(values)) for size, values in detection.BY_SIZE.items()]
    yield "Of detection, by size of the backbone (the table above has ViT-B's):\n"
    yield _table(("size", "what it sets"), rows)


def _others() -> Iterator[str]:
    yield "## Dense evaluation\n\n`posfield evaluate dense ... TASK.KEY=VALUE`.\n"
    yield _keys(described(DenseSettings))
    yield "## Comparisons\n\nKeys of a file of `configs/compare/`; `posfield compare NAME key=value` changes them.\n"
    yield _keys(described(Comparison))
    yield "Keys of each of its `entries`:\n"
    yield _keys(described(Entry))
    yield "## Masks of your own\n\nKeys of `labels.yaml` in a folder of masks, and what their options set.\n"
    yield _keys(described(MaskRule))


def _keys(found: Mapping[str, tuple[str, ...]]) -> str:
    rows = [(f"`{key}`", *said) for key, said in found.items()]
    return _table(("key", "default; what it takes", "meaning", "source"), rows)


def _method(model: type[Settings]) -> str:
    return model.__module__.rpartition(".")[2]


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={in_words(value)}`" for key, value in values.items()) or "the table above"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; no bar divides a cell, and no tag is read in it."""
    cells = ([cell.replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in rows)
    lines = [head, ("---",) * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


HEAD = """# Settings

<!-- Made by `posfield config --markdown`; tests/test_settings.py holds it to the code. -->

Every key, what it takes, its default, what it means and where the default comes from: a table of a paper, a public
code, or ours. `posfield config NAME` prints a recipe or config with all of its values, and loads again.
An unknown key, a wrong type or a value out of range is one line that names key, value and file.
"""
