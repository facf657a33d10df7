"""Write a backbone, or a whole detector, as a file that needs none of this code, or in another library's format.

posfield export --weights run/backbone.safetensors --format onnx --size 1024 --output vit.onnx
posfield export --weights run/backbone.safetensors --format huggingface --output folder
posfield export --weights dino_deitsmall16_pretrain.pth --format posfield --output b.safetensors
posfield export --weights runs/det --size 1024 --output tuned.pt2     (of a fine-tuned run)
posfield export --weights runs/det --detector --output detector.onnx

Formats: torch (.pt2) and onnx are programs of one image size; timm and huggingface are folders with a model
card; torchvision and safetensors are tensors; posfield converts any other method's file to ours. The tool
reads each file back with its library and compares it with the network before it keeps it. It prints how to
load the file. Features are those after the final norm; images are RGB, normalized by the mean and std in the
file.

--detector writes the detector of a run of the torchvision engine as ONNX: a uint8 RGB image [1, 3, H, W] of any
size in; boxes [N, 4] in its pixels, scores [N], category ids [N] and, where the run learned masks, [N, 28, 28]
probabilities under the boxes out. Resizing, normalization and NMS are inside.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from det_plugin.run import engine_of, required_engine
from pretrain.backbones.vit import ViT
from pretrain.errors import TRUST_HELP, UserError, ensure
from pretrain.export import FORMATS, export, model_card
from pretrain.export.card import results_of
from pretrain.export.converted import build_whole, given, write_whole
from pretrain.files import write_text
from pretrain.results.provenance import file_hash, hashes_of
from pretrain.results.schema import FILE_NAME, Result, read_result
from pretrain.weights.container import IN_FOLDER

DEFAULT_SIZE_PX = 224


def backbone_of_run(folder: Path, trust: bool = False) -> ViT:
    """The backbone in the last checkpoint of a fine-tuning run, of any plug-in.

    Raises:
        UserError: there is no run; the detector does not run its backbone as a plain ViT, so that it is
            another function.
    """
    if engine := engine_of(folder):
        model: Any = importlib.import_module(f"det_plugin.{engine}_engine.predict").load_model(folder, trust)[
            0
        ]
        adapter: Any = model.backbone.net if engine == "detectron2" else model.backbone
    elif list(folder.glob("*.py")):
        from seg_plugin.predict import load_segmenter

        return load_segmenter(folder, "cpu", trust).model.backbone.vit
    else:
        what = "no folder of a fine-tuning run; of a pre-training, name the file in it"
        raise UserError(f"--weights: {folder} is {what}")
    ran = adapter.options
    is_plain = not ran.window_size and ran.final_norm and ran.keep_special_tokens
    how = "with windows, or without the final norm or [CLS]: no plain ViT"
    ensure(is_plain, f"--weights: {folder} ran its backbone {how}")
    return adapter.vit


def of_run(options: argparse.Namespace) -> tuple[ViT, dict[str, Any], list[Result]]:
    """A run's backbone, its provenance, and the results of the run itself."""
    for name in ("backbone", "source", "subnet", "patch_size", "results"):
        said = f"{options.weights} is a run's folder, which says all that itself"
        ensure(not getattr(options, name), f"--{name.replace('_', '-')}: {said}")
    return backbone_of_run(options.weights, options.trust), *told_of(options.weights)


def told_of(run: Path) -> tuple[dict[str, Any], list[Result]]:
    """A run's provenance, and the results of the run itself."""
    if not (run / FILE_NAME).is_file():  # it has not ended
        return {}, []
    own = read_result(run / FILE_NAME)
    keys = ("method", "effective_epochs", "weights_hash", "config_hash", "seed")
    told = {key: getattr(own, key) for key in keys}
    return {**told, "fine_tuned": f"{own.kind}, {own.protocol.label}"}, [own]


def of_file(options: argparse.Namespace) -> tuple[ViT, dict[str, Any], list[Result]]:
    """The same for a file of weights of any supported source."""
    file, said = (
        options.weights,
        {name: getattr(options, name) for name in ("source", "subnet", "patch_size")},
    )
    vit, told = build_whole(file, name=options.backbone, **said)
    same = {*hashes_of(file)} if "fine_tuned" in told else {*hashes_of(file), told["weights_hash"]}
    return vit, told, results_of(options.results, same) if options.results else []


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; ``size`` becomes (height, width)."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="PATH", help="any checkpoint, or a run's folder")
    add("--source", metavar="NAME", help="whose file it is, where that is not clear: dino, mae, timm, ...")
    add("--subnet", metavar="NAME", help="teacher | student, of a file that holds both")
    add("--backbone", metavar="NAME", help="where the weights do not say it: vit_small_patch16, ...")
    add("--patch-size", type=int, metavar="PX", help="resample the patch projection (14 -> 16)")
    add("--detector", action="store_true", help="the detector of a run, as onnx, not its backbone alone")
    add("--format", choices=[*FORMATS, "posfield"], help="default: torch, of a detector onnx")
    sides = f"side, or height and width ({DEFAULT_SIZE_PX})"
    add("--size", type=int, nargs="+", metavar="PX", help=sides)
    add("--output", type=Path, required=True, metavar="PATH", help="*.pt2, *.onnx, *.safetensors, a folder")
    add("--method", help="what tables and cards call it (as the file says)")
    add("--effective-epochs", type=float, metavar="N", help="of the pre-training (as the file says)")
    add("--card", type=Path, metavar="FILE", help="a model card, of a format that is a file")
    measured = "measured with these weights, for the card"
    add("--results", type=Path, nargs="+", default=[], metavar="RUNS", help=measured)
    add("--trust", action="store_true", help=TRUST_HELP)
    options = parser.parse_args(arguments)
    said = " ".join(map(str, options.size or []))
    ensure(len(options.size or [0]) <= 2, f"--size: one side, or height and width; not {said}")
    options.format = options.format or ("onnx" if options.detector else "torch")
    if options.detector:
        ensure(options.format == "onnx", f"--format: a detector is written as onnx, not as {options.format}")
        for name in ("backbone", "source", "subnet", "patch_size", "size", "card", "results"):
            option = f"--{name.replace('_', '-')}"
            ensure(not getattr(options, name), f"{option}: has no effect on a detector; leave it out")
    elif options.format == "posfield":
        for name in ("size", "card", "results"):
            ensure(not getattr(options, name), f"--{name}: has no effect on format posfield")
    else:
        shown = not options.results or options.card is not None or not FORMATS[options.format].suffix
        ensure(shown, "--results: they stand in the card; name its file by --card")
    weights = options.weights.resolve()
    replaces = options.output.resolve() in (weights, *weights.parents)
    ensure(not replaces, f"--output: {options.output} would replace the weights themselves")
    side = options.size or [DEFAULT_SIZE_PX]
    options.size = (side[0], side[-1])
    return options


def write_detector(options: argparse.Namespace) -> None:
    """Export a run's detector, and print how exact the file is and how to run it.

    Raises:
        UserError: there is no detection run, or Detectron2 trained it.
    """
    run, output = options.weights, options.output
    if required_engine(run) == "detectron2":
        way = "its tools/deploy/export_model.py exports models of its own; or train with --engine torchvision"
        raise UserError(
            f"--weights: {run} is a run of Detectron2's engine, whose detector is not exported here: {way}"
        )
    from det_plugin.torchvision_engine.export import export_detector, usage

    told = told_of(run)[0] | given(options.method, options.effective_epochs)
    check = export_detector(run, output, told)
    found = f"{check.matched} of {check.total} detections as the detector's on images of three sizes"
    print(f"{output}: {found}, largest difference {check.difference:.1e}\n")
    print(usage(str(output)))


def main(arguments: list[str]) -> None:
    """Parse, build, export, and print how exact the file is and how to load it."""
    options = parse(arguments)
    if options.detector:
        write_detector(options)
        return
    is_run = options.weights.is_dir() and not any((options.weights / name).exists() for name in IN_FOLDER)
    vit, told, results = (of_run if is_run else of_file)(options)
    told |= given(options.method, options.effective_epochs)
    if options.format == "posfield":
        print(f"{write_whole(vit, options.output, told)}: every tool takes it as --weights")
        return

    facts = {"file": options.output.name, "file_hash": None if is_run else file_hash(options.weights)}
    facts |= {"provenance": told, "results": results}

    def card(difference: float) -> str:
        return model_card(vit, options.format, options.size, difference, **facts)

    difference = export(vit, options.format, options.size, options.output, told, card)
    if options.card is not None:
        write_text(options.card, card(difference))
    exact = f"largest relative difference from the backbone {difference:.1e}"
    print(f"{options.output}: {options.size[0]} x {options.size[1]} px, {exact}\n")
    print(FORMATS[options.format].use(vit, options.size, str(options.output)).code)
