"""Does pre-training on my photographs pay? Every start is fine-tuned on the same shares of your labels.

posfield worth --data LABELED --photos UNLABELED --starts none,dinov2_vits14.pth --output worth batch_size=16 epochs=50
posfield worth --data LABELED --starts dino.pth,dinov2_vits14.pth,mine/backbone.safetensors --shares 0.1,1 --output worth

--photos adds a start: the first file (or random weights), pre-trained on them (posfield pretrain --from). The shares
are nested, hold each class where a few images allow it, and are the same for all starts and seeds; the validation is
one for all. What is done is not run again (exit code 85: start it again). OUTPUT/worth.md, .csv and .png say what came
out, and in a sentence what the numbers allow to say. Words with = are fields of the detection protocol.
"""

import argparse
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from det_plugin.coco.layout import CocoFiles, locate
from det_plugin.coco.share import of_validation
from posfield.cli import submit
from pretrain.analysis.figures import grid_of_axes, save
from pretrain.cli import at_least, command, command_parser
from pretrain.errors import UserError
from pretrain.files import read_json, write_json, write_text
from pretrain.jobs import DONE, FAILED, GRACE_S, LEFT, Runner, Stage, raise_for
from pretrain.jobs.slurm import Queue
from pretrain.log import log
from pretrain.results import read_result
from pretrain.results.folder import leave_readme
from pretrain.results.render import render
from pretrain.results.worth import Scores, sentence, worth_table
from pretrain.run_lock import tidy
from pretrain.settings import above_zero

NO_WEIGHTS, OWN = "none", "photos"  # names of starts
COCO_KEYS = ("images", "annotations", "categories")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, checked, and those of posfield submit behind ``--``."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="ROOT", help="labeled images of any format")
    add("--val-share", type=float, default=0.0, metavar="SHARE", help="for validation, where there is none")
    add("--photos", metavar="PATH", help="unlabeled images to pre-train on")
    add("--starts", default="", metavar="FILE,...", help="weights; none: random initialization")
    add("--backbone", default="vit_small_patch16", metavar="NAME", help="of the start none (%(default)s)")
    add("--shares", default="0.1,0.3,1", metavar="SHARE,...", help="of the labels (%(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each start and share (%(default)s)")
    add("--frozen", action="store_true", help="only pyramid and heads learn: the features as they are")
    add("--pretrain", default="", metavar="'key=value ...'", help="settings of the pre-training on --photos")
    add("--engine", default="auto", choices=("auto", "detectron2", "torchvision"), help="(%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(%(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="data-loading processes of a run (%(default)s)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of all runs")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (%(default)s)")
    add("--max-minutes", type=float, default=float("inf"), metavar="M", help="then start it again")
    add(
        "--submit",
        action="store_true",
        help="a SLURM job for every run; options of posfield submit behind --",
    )
    add("overrides", nargs="*", metavar="key=value", help="fields of the protocol (epochs=50 batch_size=16)")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_intermixed_args(arguments[:end])
    options.starts = [word for word in options.starts.split(",") if word]
    options.pretrain = shlex.split(options.pretrain)
    options.shares = sorted({above_zero("--shares", word) for word in options.shares.split(",")})
    at_least(options, seeds=1, jobs=1, workers=0)
    if options.shares[-1] > 1:
        raise UserError(f"--shares: {options.shares[-1]:g} is more than all of the labels, 1")
    if len(options.starts) + bool(options.photos) < 2:
        raise UserError("--starts: nothing to compare; give two, or one and --photos")
    if options.max_minutes * 60 <= GRACE_S:
        raise UserError(f"--max-minutes is more than {GRACE_S / 60:g}")
    if arguments[end + 1 :] and not options.submit:
        raise UserError("--: what stands behind it is for --submit")
    return options, arguments[end + 1 :]


def starts_of(options: argparse.Namespace) -> dict[str, Path | None]:
    """{name: weights, or None}. A file is named after itself; one that every run calls alike, after its folder."""
    found: dict[str, Path | None] = {}
    for word in options.starts:
        path = None if word == NO_WEIGHTS else Path(word)
        if path is not None and not path.exists():
            raise UserError(f"--starts: no file {path}; give {NO_WEIGHTS} for random weights")
        name = word if path is None else path.absolute().parent.name if path.stem == "backbone" else path.stem
        if name in found or name == OWN:
            raise UserError(f"--starts: two are called {name}; rename one")
        found[name] = path
    if options.photos:
        found[OWN] = options.output / "pretrain" / "backbone.safetensors"
    return found


def write_shares(options: argparse.Namespace) -> dict[float, int]:
    """Write each share's annotations, and the .yaml file that names it with the validation; {share: images}.

    Raises:
        UserError: the folder holds shares of other labels; as :func:`det_plugin.coco.layout.locate`.
    """
    train, val = (locate(options.data, split, options.val_share) for split in ("train", "val"))
    content, folder, chosen = train.read(), options.output / "data", set[str]()
    _leave(folder / "val.json", val.read())
    n_images = {}
    for share in options.shares:
        names = {image["file_name"] for image in content["images"]}
        chosen |= (
            names if share == 1 else of_validation(content, share)
        )  # a larger share contains a smaller one
        _leave(folder / f"train_{share:g}.json", _part(content, chosen))
        n_images[share] = len(chosen)
        parts = {"train": _place(f"train_{share:g}.json", train), "val": _place("val.json", val)}
        write_json(folder / f"share_{share:g}.yaml", parts)  # JSON is YAML
    return n_images


def _part(content: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    kept = set(names)
    images = [image for image in content["images"] if image["file_name"] in kept]
    ids = {image["id"] for image in images}
    objects = [each for each in content["annotations"] if each["image_id"] in ids]
    return {"images": images, "annotations": objects, "categories": content["categories"]}


def _place(file: str, files: CocoFiles) -> dict[str, str]:
    return {"annotations": file, "images": str(files.images.absolute())}


def _leave(file: Path, content: Mapping[str, Any]) -> None:
    own = {key: content[key] for key in COCO_KEYS}
    if not file.is_file():
        write_json(file, own)
    elif read_json(file) != own:
        raise UserError(
            f"{file} is of other labels: {file.parent.parent} holds another comparison; choose another --output"
        )


def plan(
    options: argparse.Namespace, starts: Mapping[str, Path | None]
) -> tuple[list[Stage], dict[tuple[str, float, int], Stage]]:
    """The pre-training on --photos, if there is one; and the fine-tunings, seed by seed: one that is not finished has
    every start and share of its first seeds."""
    first = []
    if options.photos:
        file = next((path for path in starts.values() if path is not None and path != starts[OWN]), None)
        words = ["--data", options.photos, "--output", options.output / "pretrain", "--resume"]
        words += ["--from", file] if file else []
        own = [] if file else [f"backbone.name={options.backbone}"]
        own += [f"run.device={options.device}", f"data.workers={options.workers}"]
        first = [
            Stage(
                "pretrain", options.output / "pretrain", command("pretrain", *words, *own, *options.pretrain)
            )
        ]
    frozen = ["freeze_backbone=true", "drop_path=0"] if options.frozen else []
    runs = {}
    for seed in range(options.seeds):
        for share in options.shares:
            for name, weights in starts.items():
                folder = options.output / name / f"share_{share:g}" / f"seed_{seed}"
                words = [
                    "--data",
                    options.output / "data" / f"share_{share:g}.yaml",
                    "--output",
                    folder,
                    "--resume",
                ]
                words += ["--weights", weights] if weights else ["--backbone", options.backbone]
                words += [
                    "--engine",
                    options.engine,
                    "--device",
                    options.device,
                    "--workers",
                    options.workers,
                ]
                line = command("detect", *words, "--seed", seed, *frozen, *options.overrides)
                runs[name, share, seed] = Stage(f"detect {share:g}", folder, line)
    return first, runs


def scores_of(runs: Mapping[tuple[str, float, int], Stage]) -> Scores:
    """Of the runs that are done."""
    found: dict[tuple[str, float], dict[int, float]] = {}
    for (start, share, seed), stage in runs.items():
        if stage.is_done:
            found.setdefault((start, share), {})[seed] = read_result(stage.folder).metrics["box_ap"]
    return found


def write_results(
    scores: Scores, starts: Iterable[str], shares: Mapping[float, int], own: str, output: Path
) -> str:
    """Write ``worth.md``, ``.csv`` and ``.png``; the text of the first."""
    names = list(starts)
    table = worth_table(scores, names, shares, sentence(scores, names, shares, own))
    write_text(output / "worth.csv", render(table, "csv"))
    draw(scores, names, shares, output)
    leave_readme(output, "worth")
    return write_text(output / "worth.md", render(table, "md")).read_text()


def draw(scores: Scores, starts: Iterable[str], shares: Mapping[float, int], output: Path) -> Path:
    """The box AP against the number of labeled images: means, and bars from the least to the greatest seed."""
    figure, axes = grid_of_axes(1, 1, (6.0, 4.0))
    plot = axes[0][0]
    for start in starts:
        points = [
            (n, list(scores[start, share].values()))
            for share, n in shares.items()
            if (start, share) in scores
        ]
        if points:
            means = [sum(values) / len(values) for _, values in points]
            low = [mean - min(values) for mean, (_, values) in zip(means, points)]
            high = [max(values) - mean for mean, (_, values) in zip(means, points)]
            plot.errorbar([n for n, _ in points], means, [low, high], marker="o", capsize=3, label=start)
    plot.set(xscale="log", xlabel="labeled images", ylabel="box AP (%)")
    plot.set_xticks(list(shares.values()), [str(n) for n in shares.values()])
    plot.minorticks_off()
    if scores:
        plot.legend()
    title = "Box AP by start and share of the labels"
    caption = f"{title}. Points are means over seeds, bars reach from the least to the greatest."
    return save(figure, output, "worth.png", title, caption)


def main(arguments: list[str]) -> None:
    """Plan, go on, write what came out, and say what failed and what is left."""
    options, further = parse(arguments)
    starts = starts_of(options)
    if not {word.partition("=")[0] for word in options.overrides} & {"epochs", "max_iters"}:
        told = "say how long each fine-tuning is, for the protocol's length is made for COCO"
        raise UserError(f"epochs: {told}; for a few hundred images batch_size=16 epochs=50")
    queue = None
    if options.submit:
        words = [
            "--gpus",
            "0" if options.device == "cpu" else "1",
            "--folder",
            str(options.output / "jobs" / "%j"),
            *further,
        ]
        asked = submit.parse(words)[0]
        queue = Queue(submit.resources_of(asked), asked.folder)
    tidy(options.output, options.output / "data")
    shares = write_shares(options)
    first, runs = plan(options, starts)
    after = "a pre-training, then " if first else ""
    log(
        f"plan: {after}{len(runs)} fine-tunings: {len(starts)} starts, {len(shares)} shares, {options.seeds} seeds"
    )
    seconds = 60 * options.max_minutes - GRACE_S
    how = options.jobs, seconds, 0 if options.device == "cpu" else 1, queue
    before = Runner(*how).run({"pretrain": first}) if first else {"pretrain": DONE}
    is_ready = before["pretrain"] == DONE
    todo = {
        f"{s}/share_{share:g}/seed_{k}": [stage]
        for (s, share, k), stage in runs.items()
        if is_ready or s != OWN
    }
    ended = before | Runner(*how).run(todo)
    own = OWN if options.photos else list(starts)[-1]
    print(write_results(scores_of(runs), starts, shares, own, options.output))
    failed, left = ([name for name, how in ended.items() if how == which] for which in (FAILED, LEFT))
    left += [] if is_ready or failed or queue else [OWN]
    told = (
        f"{len(failed)} of {len(runs) + len(first)} runs failed: {', '.join(failed)} (why: {options.output / failed[0]}.log)"
        if failed
        else ""
    )
    raise_for(told, left, f"{len(runs) + len(first)} runs")
