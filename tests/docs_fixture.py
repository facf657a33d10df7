"""The code blocks of the documentation, their commands read without running them, and the same commands at tiny size."""

import argparse
import contextlib
import functools
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from ade_fixture import write_ade, write_own, write_voc
from coco_fixture import write_coco
from photos import TINY, last, write_photos
from reference_vit import saved
from seg_fixture import TINY as SEGMENTATION
from seg_fixture import write_weights
from test_det_plan import WORDS as DETECTION
from test_weights_dinov2 import published
from tool_fixture import load_tool

from det_plugin import plan
from det_plugin import protocol as detection
from posfield.cli import COMMANDS, GROUPS
from pretrain.cli import fields_and_kwargs
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.evaluation.dense import DENSE_TASKS, KNN, settings_of
from pretrain.settings import flat
from seg_plugin import protocol as segmentation

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
SHELLS = ("bash", "sh", "console", "shell")
PROGRAMS = ("posfield", "python", "python3", "torchrun", "make", "pip", "pytest", "docker")
# Programs that are not ours, and words of a shell
OTHERS = (
    ".",
    "cd",
    "conda",
    "docker",
    "export",
    "git",
    "mkdir",
    "nvidia-smi",
    "source",
    "tar",
    "unzip",
    "apt-get",
)
LAUNCHER = "$DETECTRON2_SRC/tools/lazyconfig_train_net.py"


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    is_run: bool

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of its command lines; none where it is no block of commands."""
        lines = self.text.replace("\\\n", " ").splitlines()
        starts = {line.split()[0] for line in lines if line.strip()}
        if self.language not in SHELLS and (self.language or not starts & {*PROGRAMS}):
            return []
        parts = [part for line in lines for part in re.split(r"\s&&\s", line)]
        return [words for part in parts if (words := without_variables(shlex.split(part, comments=True)))]


def without_variables(words: list[str]) -> list[str]:
    """A command without the variables that are set before it, and without a prompt."""
    while words and (re.fullmatch(r"\w+=\S*", words[0]) or words[0] == "$"):
        words = words[1:]
    return words


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = path.read_text().splitlines()
    page, begun = str(path.relative_to(ROOT)), 0
    fence = re.compile(r"^(\s*)(```+)\s*(\w*)")
    before = ""
    open_at: tuple[str, str, str] | None = None
    for number, line in enumerate(lines, 1):
        found = fence.match(line)
        if found and open_at is None:
            open_at, begun = (found[1], found[2], found[3]), number
        elif found and open_at and found[2] == open_at[1]:
            text = "\n".join(row.removeprefix(open_at[0]) for row in lines[begun : number - 1])
            yield Block(page, begun, open_at[2], text, not NOT_RUN.search(before))
            open_at = None
        elif open_at is None and line.strip():
            before = line
        if found and open_at is None:
            before = ""


def mentions(path: Path) -> list[list[str]]:
    """The words of the commands of ``posfield`` that a text names between backticks, outside its blocks."""
    prose = re.sub(r"(?ms)^\s*```.*?^\s*```", "", path.read_text())
    found = [code.replace("\n", " ") for code in re.findall(r"`(posfield [^`]+)`", prose)]
    return [shlex.split(code)[1:] for code in found]


def pages() -> list[Path]:
    """The pages of the site, in the order of its navigation."""

    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for child in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[union-attr, attr-defined]
                yield from files(child)

    return [DOCS / name for name in files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])]


# --- read, not run ----------------------------------------------------------------------------------------


class _Read(Exception):
    """What a command's parser made of its words."""


def posfield_words(words: list[str]) -> list[str] | None:
    """The words behind ``posfield`` of a command line in any of its forms; None: it is another program."""
    if words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        words = ["python", *words[start:]]
    if words[0] == "posfield":
        return words[1:]
    if words[0].startswith("python") and words[1:3] == ["-m", "posfield"]:
        return words[3:]
    if words[0].startswith("python") and words[1].startswith("tools/"):
        name = re.search(r'main\("([^"]+)"\)', (ROOT / words[1]).read_text())
        return [*name[1].split(), *words[2:]] if name else None
    return None


def split_name(words: list[str]) -> tuple[str, list[str]]:
    """The command of ``posfield``, and its words."""
    n = 2 if words[0] in GROUPS else 1
    return " ".join(words[:n]), words[n:]


def read(name: str, words: list[str]) -> argparse.Namespace:
    """The options of ``posfield NAME WORDS``, held against its parser and its settings.

    Raises:
        UserError: no such command, option or key, or a value that the key does not take.
    """
    if name == "--help":
        return argparse.Namespace()
    if name not in COMMANDS:
        raise UserError(f"posfield has no command {name!r}")
    inner: list[str] = []
    if name in ("submit", "compare", "worth") and "--" in words:
        words, inner = words[: words.index("--")], words[words.index("--") + 1 :]
    found = parsed(name, [*words, *["--", "x"] * (name == "submit")])[1]
    if not any(word in ("-h", "--help") for word in words):
        check_settings(name, found)
    if name == "submit" and inner[0] in COMMANDS:
        read(*split_name([word.replace("{index}", "0") for word in inner]))
    return found


def parsed(name: str, words: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser of a command, and what it made of the words.

    Raises:
        UserError: it does not take them.
    """
    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, method)

            def stop(self, arguments, parse=parse):
                raise _Read(self, parse(self, arguments) if words else argparse.Namespace())

            patch.setattr(argparse.ArgumentParser, method, stop)
        try:
            load_tool(name).main(words)
        except _Read as found:
            return found.args  # type: ignore[return-value]
        except SystemExit as end:
            raise UserError(f"posfield {name} does not take {shlex.join(words)}") from end
    raise AssertionError(f"posfield {name} has no parser")


@functools.cache
def options_of(name: str) -> frozenset[str]:
    """The options that a command has."""
    return frozenset(parsed(name, ["--", "x"] if name == "submit" else [])[0]._option_string_actions)


def check_mention(words: list[str]) -> None:
    """Raises UserError where a command in prose, which may be a part of one, names a command or options that there are
    not. Words in capitals stand for any."""
    name, rest = split_name(words)
    if words[0].isupper() or words[0].startswith("-") or words[-1] in (*GROUPS, "...") and len(words) <= 2:
        return
    if name not in COMMANDS:
        raise UserError(f"posfield has no command {name!r}")
    rest = rest[: rest.index("--")] if "--" in rest else rest
    named = {word.partition("=")[0] for word in rest if word.startswith("--")}
    if unknown := sorted(named - options_of(name) - {"--traceback"}):
        raise UserError(f"posfield {name} has no option {unknown[0]}")


def check_settings(name: str, options: argparse.Namespace) -> None:
    """Raises UserError where a ``key=value`` word is none."""
    words = getattr(options, "overrides", [])
    if name == "pretrain":
        recipe = "own-images" if options.start else "own-images-scratch" if options.data else None
        load_config(options.config or recipe, words)
    elif name == "config":
        load_config(options.name, words)
    elif name in ("detect", "worth"):
        detection_fields(words, getattr(options, "protocol", "coco-12ep"))
        load_config("own-images", shlex.split(getattr(options, "pretrain", "")))
    elif name == "segment":
        fields, _ = fields_and_kwargs(words)
        fields.pop("epochs", None)
        base = segmentation.protocol(segmentation.OWN)
        segmentation.with_overrides(base, {"num_classes": "2", **fields})
    elif name == "evaluate dense":
        settings_of([*DENSE_TASKS, KNN], [*words, *(word for word in options.tasks if "=" in word)], 0)
    elif name == "compare":
        options.only = [word for word in options.only if "=" not in word]
        load_tool(name).read(options)
    elif name == "ablation":
        load_config("toy", options.pretrain)
        detection_fields(options.detection)
    elif name == "benchmark" and options.what == "det-step":
        detection_fields(words)
    elif name == "benchmark":
        load_config("intertwined_vits16", words)


def detection_fields(words: list[str], name: str = "coco-12ep") -> None:
    """Raises UserError where a word is no field of detection's protocol."""
    fields, _ = fields_and_kwargs(words)
    base = detection.protocol(name, "vit_small_patch16")
    fields.pop("epochs", None)
    detection.with_overrides(base, {**plan.whole_schedule(base, fields), **fields})


def check_command(words: list[str]) -> None:
    """Raises UserError where a command line of any program names what there is not."""
    if (ours := posfield_words(words)) is not None:
        read(*split_name(ours))
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        if unknown := [word for word in words[1:] if "=" not in word and word not in targets]:
            raise UserError(f"make has no target {unknown[0]}")
    elif words[0] == "pytest" or words[1:3] == ["-m", "pytest"]:
        files = [word for word in words if word.endswith(".py")]
        if missing := [name for name in files if not list(ROOT.glob(name))]:
            raise UserError(f"no file {missing[0]}")
    elif words[0] == "pip" or words[1:3] == ["-m", "pip"] or words[1:3] == ["-m", "venv"]:
        extras = {
            e for word in words for found in re.findall(r"\[([\w,]+)\]", word) for e in found.split(",")
        }
        if unknown := sorted(
            extra for extra in extras if f"\n{extra} =" not in (ROOT / "setup.cfg").read_text()
        ):
            raise UserError(f"setup.cfg has no extra {unknown[0]}")
    elif words[:2] == ["python", LAUNCHER]:
        if not (ROOT / words[words.index("--config-file") + 1]).is_file():
            raise UserError(f"no such config in {shlex.join(words)}")
    elif words[0] not in OTHERS and words[1:3] not in (["-m", "http.server"],):
        raise UserError(f"{words[0]} is no program of a list that is known to the test")


# --- at tiny size -----------------------------------------------------------------------------------------


def write_world(folder: Path) -> None:
    """What the pages take for given, under the names that they use: photographs, labels, public weights, runs."""
    write_photos(folder / "photos")
    write_coco(folder / "EXPORT")
    write_coco(folder / "COCO")
    write_ade(folder / "ADE")
    write_own(folder / "MASKS")
    write_voc(folder / "VOCdevkit" / "VOC2012")
    for part in ("train", "val"):
        for number in range(2):
            write_photos(folder / "IMAGENET" / part / f"n{number}", n=3, seed=number)
    for registers, name in ((0, "dinov2_vits14"), (4, "dinov2_vits14_reg4")):
        saved(folder, published(registers=registers)[0], f"{name}_pretrain.pth")
    (folder / "W").mkdir()
    for run in ("mine", "runs/mine", "runs/b16", "runs/s16"):
        (folder / run).mkdir(parents=True)
        write_weights(folder / run)


def with_options(words: list[str], **values: object) -> list[str]:
    """The words with options set: replaced where they stand, else added."""
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if option in words:
            at = words.index(option)
            words = [*words[: at + 1], str(value), *words[at + 2 :]]
        else:
            words = [option, str(value), *words]
    return words


def with_fields(words: list[str], fields: list[str], without: tuple[str, ...] = ()) -> list[str]:
    """The words with fields set, and without some."""
    own = [word for word in words if "=" in word and not word.startswith("-")]
    rest = [word for word in words if word not in own]
    return [*rest, *last([*(w for w in own if w.partition("=")[0] not in without), *fields])]


def tiny_pretrain(words: list[str]) -> list[str]:
    """A pre-training of two layers and a few images."""
    options = read("pretrain", words)
    if options.resume and not (options.config or options.start):
        return words
    recipe = options.config or (
        "own-images" if options.start else "own-images-scratch" if options.data else None
    )
    known = flat(load_config(recipe).model_dump())
    has_start = options.start or any(word.startswith("backbone.weights=") for word in words)
    of_file = ("backbone.", "positions.") if has_start else ()
    few = [w for w in TINY if w.partition("=")[0] in known and not w.startswith(of_file or "\0")]
    return with_fields(words, [*few, "optim.epochs=1", "step.accumulate=1"], ("step.parallel", "data.split"))


def tiny_detect(words: list[str]) -> list[str]:
    """A detector of a few channels, two iterations."""
    if "--data" not in words:
        return with_options(words, workers=0, device="cpu")
    fields = [word for word in DETECTION if not word.startswith("backbone.")]
    if "--accumulate" in words and words[words.index("--accumulate") + 1] != "0":
        words = with_options(words, accumulate=2)
    words = with_options(words, workers=0, device="cpu", engine="torchvision")
    return with_fields(words, [*fields, "max_iters=2", "eval_every=2"], ("epochs",))


def tiny_segment(words: list[str]) -> list[str]:
    """Two iterations on a few pixels."""
    if "--data" not in words:
        return with_options(words, workers=0, device="cpu")
    fields = [
        f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in {**SEGMENTATION, "max_iters": 2, "val_every": 2}.items()
        if key not in ("num_classes", "reduce_zero_label")
    ]
    return with_fields(with_options(words, workers=0, device="cpu"), fields, ("epochs",))


SMALL = {
    "pretrain": tiny_pretrain,
    "detect": tiny_detect,
    "segment": tiny_segment,
    "toy-data": partial(with_options, images=6, train=8, val=3, size=64),
    "analyze features": partial(with_options, size=64, max_images=2),
    "analyze attention": partial(with_options, size=64, max_images=2),
    "evaluate position": partial(with_options, size=64, max_images=2),
    "evaluate discovery": partial(with_options, size=64, max_images=2),
    "evaluate probes": partial(with_options, knn_k=1),
    "export": lambda words: words if "--detector" in words else with_options(words, size=64),
    "embed": partial(with_options, size=64),
}


def made_tiny(name: str, words: list[str]) -> list[str]:
    """A command of ``posfield`` at tiny size; what stands in its folder from an earlier page is removed."""
    words = SMALL[name](words) if name in SMALL else words
    if name in ("pretrain", "detect", "segment") and not any(word.startswith("--resume") for word in words):
        with contextlib.suppress(ValueError):
            shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
    return words
