"""The console script ``posfield``: its commands, and how one is started."""

import importlib
import platform
import sys
from importlib.metadata import version

import posfield
from pretrain.cli import run

# {command: (module whose main(arguments) it is, what it does)}; a command of two words belongs to a group
COMMANDS = {
    "pretrain": ("pretrain.cli.train_ssl", "pre-train a backbone on images"),
    "detect": ("det_plugin.cli.train", "fine-tune a detector: COCO and data in its format"),
    "segment": ("posfield.cli.segment", "fine-tune a segmenter: ADE20K, VOC, Cityscapes, folders of masks"),
    "data check": ("posfield.cli.check", "what is in a labeled set, boxes or masks, and what is odd"),
    "predict": ("posfield.cli.predict", "detect objects in your images with a run of detect"),
    "embed": ("pretrain.cli.embed", "one vector an image, as .npz"),
    "evaluate dense": ("pretrain.cli.evaluate_dense", "frozen features: segmentation, clustering, k-NN"),
    "evaluate probes": ("pretrain.cli.probe", "the probes of a pre-training, on any checkpoint"),
    "evaluate position": ("pretrain.cli.position", "what each layer knows of position"),
    "evaluate discovery": ("pretrain.cli.discovery", "find objects without labels"),
    "analyze attention": ("pretrain.cli.attention", "measure and draw the attention of backbones"),
    "analyze features": ("pretrain.cli.features", "draw principal components and similarities"),
    "analyze crops": ("pretrain.cli.crops", "draw what a pre-training trains on"),
    "analyze detections": ("det_plugin.cli.figures", "draw what a detector finds in its validation images"),
    "analyze segmentations": ("seg_plugin.cli.figures", "draw what a segmenter predicts"),
    "compare": ("posfield.cli.compare", "fine-tune many backbones alike, on one machine or a cluster"),
    "worth": (
        "posfield.cli.worth",
        "does pre-training on my photographs pay? starts over shares of my labels",
    ),
    "ablation": ("posfield.cli.ablation", "the paper's ablations"),
    "export": (
        "posfield.cli.export",
        "write a backbone as ONNX, timm, Hugging Face, ...; a detector as ONNX",
    ),
    "table": ("pretrain.cli.table", "result.json of many runs -> a table, beside published results"),
    "report": ("pretrain.cli.report", "result.json of many runs -> one HTML page"),
    "submit": ("posfield.cli.submit", "start a command as a SLURM job that comes back until it is done"),
    "benchmark": ("posfield.cli.benchmark", "time and memory, as ratios measured side by side"),
    "config": ("posfield.cli.config", "print a config: every value, its meaning, its source"),
    "toy-data": ("pretrain.cli.toy_data", "write the photographs and labels of the demo"),
    "demo": ("posfield.cli.demo", "photographs -> pre-training -> detection, segmentation -> report"),
}
GROUPS = ("data", "evaluate", "analyze")


def main(*command: str) -> None:
    """Run the command that the words name: those given, then those of the command line.

    ``--help`` behind a command shows its options; ``--version`` alone says what runs.
    """
    words = [*command, *sys.argv[1:]]
    if words == ["--version"]:
        print(
            f"posfield {posfield.__version__}, Python {platform.python_version()}, torch {version('torch')}"
        )
        return
    group = words[0] if words and words[0] in GROUPS else ""
    name = " ".join(words[: 2 if group else 1])
    if name not in COMMANDS:
        is_asked = not words or words[-1] in ("-h", "--help")
        shown = [f"  {each:<22} {text}" for each, (_, text) in COMMANDS.items() if each.startswith(group)]
        usage = [f"usage: posfield {group or 'COMMAND'} ... [--help]", "", *shown]
        print(*usage, sep="\n", file=sys.stdout if is_asked else sys.stderr)
        if not is_asked:
            print(f"error: posfield {name}: no such command; they are above", file=sys.stderr)
        sys.exit(0 if is_asked else 2)
    sys.argv = [f"posfield {name}", *words[name.count(" ") + 1 :]]  # argparse prints the first as the program
    run(lambda arguments: importlib.import_module(COMMANDS[name][0]).main(arguments))
