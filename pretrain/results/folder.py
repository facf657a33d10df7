"""What each file of a run's folder is: one table, from which ``docs/run-folder.md`` and the ``README.txt`` in every
such folder are made."""

from fnmatch import fnmatch
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

from pretrain.files import write_text

README = "README.txt"
PRETRAIN, DETECT, SEGMENT = ("pretrain",), ("detection",), ("segmentation",)
TRAININGS = PRETRAIN + DETECT + SEGMENT
DENSE, ANALYSIS = ("dense",), ("analysis",)
COMPARE, WORTH, ABLATION = ("compare",), ("worth",), ("ablation",)
MANY = COMPARE + WORTH + ABLATION
ANALYSES = ", ".join(
    f"posfield {name}"
    for name in ("analyze attention", "analyze features", "evaluate position", "evaluate discovery")
)
# {kind: what such a folder is of, and the commands that make it}
TITLES = {
    "pretrain": ("Pre-training and post-training", "posfield pretrain"),
    "detection": ("Detection, of either engine", "posfield detect"),
    "segmentation": ("Segmentation, one run or a sweep", "posfield segment"),
    "dense": ("Dense evaluation", "posfield evaluate dense"),
    "analysis": (
        "Analysis",
        ANALYSES,
    ),
    "compare": ("Comparison", "posfield compare"),
    "worth": ("What pre-training is worth", "posfield worth"),
    "ablation": ("Ablation", "posfield ablation"),
}
ENDED = "once nobody goes on"  # with --resume
BESIDE = "beside it .command (whose it is), .run (its exit code), .job (on SLURM) and .log"
PAGE = "if no report is wanted"


class File(NamedTuple):
    """Some files of a run's folder.

    Attributes:
        name: a pattern, relative to the folder; ``*`` also stands for folders.
        kinds: of the folders that may hold it.
        what: it is.
        readers: who reads it.
        goes: when it may be deleted.
    """

    name: str
    kinds: tuple[str, ...]
    what: str
    readers: str
    goes: str = "no"


def _all(name: str, what: str, readers: str, goes: str = "no") -> File:
    return File(name, tuple(TITLES), what, readers, goes)


FILES = (
    File(
        "result.json",
        TRAININGS + DENSE,
        "what was run, and what came out: metrics, deviations from the protocol, hashes, versions, hardware, time",
        "posfield table, report, compare; the same command: it is there once the run is finished",
    ),
    # what a run leaves
    File(
        "backbone.safetensors",
        PRETRAIN,
        "the backbone, in float32, with what it was trained on in its header",
        "everything that takes --weights",
    ),
    File(
        "best.safetensors",
        DETECT,
        "the detector at its best evaluation; on data of your own alone",
        "posfield predict, export",
        "if the last weights do",
    ),
    File(
        "model_*.pth",
        DETECT,
        "Detectron2: the detector and its state",
        "posfield predict; --resume",
        "but for the last",
    ),
    File(
        "iter_*.pth",
        SEGMENT,
        "the segmenter and its state after so many iterations",
        "posfield predict; --resume",
        "but for the last",
    ),
    File(
        "best_mIoU_iter_*.pth",
        SEGMENT,
        "the segmenter at its best validation; on data of your own alone",
        "posfield predict",
        "if the last weights do",
    ),
    File(
        "last_checkpoint",
        DETECT + SEGMENT,
        "the name of the newest .pth file",
        "--resume; Detectron2, mmengine",
    ),
    File(
        "checkpoints/it_*",
        PRETRAIN,
        "all that the run goes on from after so many iterations: networks, heads, optimizer, counters; SHA-256 of each",
        "--resume; run.init_from",
        ENDED,
    ),
    File(
        "checkpoints/it_*",
        DETECT,
        "torchvision engine: the detector and its state after so many iterations; SHA-256 of each file",
        "posfield predict, export; --resume",
        "but for the last",
    ),
    # what it was asked for
    File("config.yaml", PRETRAIN, "every setting of the run", "posfield pretrain --config; analyze crops"),
    File(
        "config.json",
        DETECT,
        "torchvision engine: every setting, and the classes",
        "--resume; posfield predict, export",
    ),
    File("config.yaml", DETECT, "Detectron2: its config, as it was asked for", "Detectron2's launcher"),
    File(
        "config_resolved.yaml",
        DETECT,
        "Detectron2: its config with every value",
        "--resume; posfield predict",
    ),
    File(
        "config.py", SEGMENT, "mmengine's config with every value", "posfield predict; MMSegmentation's tools"
    ),
    File("settings.json", SEGMENT, "what tells this run from others", "--resume"),
    File("start.json", DETECT + SEGMENT, "the words that it was started with", "--resume --output FOLDER"),
    File(
        "data.json",
        DETECT + SEGMENT,
        "which images and labels it was trained on, by number, names and sizes",
        "--resume",
    ),
    File("split.json", DETECT + SEGMENT, "how --val-share divided the images", "you; posfield predict"),
    # how it went
    File(
        "metrics.jsonl",
        TRAININGS,
        "a line for every few iterations: losses, learning rate; evaluations",
        "posfield report",
        PAGE,
    ),
    File(
        "probes.jsonl",
        PRETRAIN + DETECT,
        "probes of a pre-training while it runs; else empty",
        "posfield report",
        PAGE,
    ),
    File(
        "speed.jsonl",
        PRETRAIN + DETECT,
        "images a second, share of the time that waits for data, memory",
        "you",
        "yes",
    ),
    File("tensorboard/*", PRETRAIN + DETECT, "the same, and pictures", "tensorboard --logdir FOLDER", "yes"),
    File(
        "wandb*",
        PRETRAIN,
        "of Weights & Biases; wandb_id: the run that a resumed one goes on in",
        "--resume",
        ENDED,
    ),
    File("broken_images.txt", TRAININGS, "images that could not be read, and why", "you", "yes"),
    File("warnings.txt", TRAININGS, "what libraries warned of, each line once", "you", "yes"),
    File("log.txt*", DETECT, "Detectron2's log", "you", "yes"),
    File(
        "20*_*/*",
        SEGMENT,
        "mmengine's logs, a folder for each start",
        "you; posfield segment --sweep status",
        "yes",
    ),
    File(
        "predictions.json",
        DETECT,
        "torchvision engine: what it finds in the validation images, in COCO's format",
        "posfield analyze detections",
        "yes",
    ),
    File("coco_instances_results.json", DETECT, "Detectron2: the same", "posfield analyze detections", "yes"),
    File(
        "inference/*", DETECT, "the same, of Detectron2's own launcher", "posfield analyze detections", "yes"
    ),
    File(
        "points/*",
        SEGMENT,
        f"of a sweep: a run folder for each setting and seed; {BESIDE}",
        "posfield segment --sweep",
        "if the sweep is finished",
    ),
    # evaluations and analyses
    File(
        "tasks/*",
        DENSE,
        "finished tasks: numbers (.json) and maps (.npz)",
        "--resume",
        "once result.json is there",
    ),
    File("knn/*", DENSE, "of k-NN beside a set with masks: a folder like this one", "posfield table"),
    File(
        "checkpoints/*",
        ANALYSIS,
        "a folder for each file of weights: result.json and its numbers",
        "posfield table; the same command, which goes on",
    ),
    File("*.csv", ANALYSIS, "the numbers of all files of weights together", "you", "yes"),
    File("*.html", ANALYSIS, "one page with numbers and pictures", "your browser", "yes"),
    # many runs
    File(
        "weights/*",
        COMPARE,
        "the files of weights as its runs read them, and what each was made from",
        "the runs",
    ),
    File("*/det_*", COMPARE, f"a run folder for each row and seed; {BESIDE}", "posfield compare"),
    File("*/seg_*", COMPARE, "the same, of segmentation", "posfield compare"),
    File("jobs/*", COMPARE + WORTH + ABLATION, "SLURM's logs", "you", ENDED),
    File("data/*", WORTH, "the shares of the labels that its runs learn from", "the runs"),
    File(
        "pretrain*", WORTH, "the run folder of the pre-training on your photographs, and its .log", "the runs"
    ),
    File("*/share_*", WORTH, f"a run folder for each start, share and seed; {BESIDE}", "posfield worth"),
    File("data/*", ABLATION, "the toy data", "the runs"),
    File(
        "*/seed_*",
        ABLATION,
        f"two run folders for each row and seed, pretrain and det; {BESIDE}",
        "posfield ablation",
    ),
    File("*.md", MANY, "the table", "you", "yes"),
    File("*.csv", MANY, "the table", "a spreadsheet", "yes"),
    File("*.html", COMPARE + ABLATION, "the table", "your browser", "yes"),
    File("*.tex", COMPARE + ABLATION, "the table", "LaTeX", "yes"),
    File("worth.png", WORTH, "the plot", "you", "yes"),
    File("captions.json", WORTH, "what the plot shows", "posfield report", "with it"),
    # everywhere
    File(
        "figures/*",
        TRAININGS + DENSE + ANALYSIS,
        "pictures, and captions.json: what they show",
        "posfield report",
        "yes",
    ),
    _all(
        ".lock", "while a process works here: which one", "other processes, which keep out", "if it has ended"
    ),
    _all(
        ".*.partial",
        "a file that is being written, or was when its process was killed",
        "nobody",
        "if none works here",
    ),
    _all(README, "this list", "you", "yes"),
)


def files_of(kind: str) -> list[File]:
    """The files of a folder of a kind."""
    return [file for file in FILES if kind in file.kinds]


def unnamed(folder: Path, kind: str) -> list[str]:
    """Files in a folder that the table does not name."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if not any(fnmatch(name, file.name) for file in files_of(kind))]


def leave_readme(folder: Path, kind: str) -> Path:
    """Write ``README.txt``: what the files of the folder are."""
    return write_text(folder / README, readme(kind))


def readme(kind: str) -> str:
    """The text of ``README.txt`` in a folder of a kind."""
    title, commands = TITLES[kind]
    lines = [f"{title}: a folder of {commands}.", "Not every folder has every file.", ""]
    for file in files_of(kind):
        told = f"{file.what}. Read by: {file.readers}. May be deleted: {file.goes}."
        lines += [file.name, *wrap(told, 100, initial_indent="    ", subsequent_indent="    "), ""]
    return "\n".join(lines)


def page() -> str:
    """``docs/run-folder.md``."""
    text = HEAD
    for kind, (title, commands) in TITLES.items():
        text += f"\n## {title}\n\n`{commands.replace(', ', '`, `')}`\n\n"
        text += "| file | what it is | read by | may be deleted |\n| --- | --- | --- | --- |\n"
        text += "".join(f"| `{f.name}` | {f.what} | {f.readers} | {f.goes} |\n" for f in files_of(kind))
    return text


HEAD = """# The run folder

<!-- Made from pretrain/results/folder.py, to which tests/test_results.py holds it. -->

Every run leaves one folder, and nothing outside it. The same list lies in each as `README.txt`.
To move a run, move its folder; to remove a run, remove its folder. A file gets its name only when it is whole, so a
killed process leaves no half of one. Run folders of others are read as data and never run: see
[Security](security.md).
"""
