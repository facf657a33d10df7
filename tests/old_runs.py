"""Run folders as commit 2c21771 wrote them, made anew from old_runs.json.

The file holds, for each run, its texts word for word ({ROOT}: the folder around; {WEIGHTS}: the hash of
the backbone's file), and of its tensors names and shapes: values are drawn here, by name. The runs were
made on the images of safety_net.py with configs/pretrain/toy.yaml and toy_paka.yaml, and with the
protocols coco-12ep and ade20k-160k at a size of seconds. ``*_stopped`` stopped after two of four iterations.

The product is called by the functions of the second block alone. What :func:`resumed` finds is recorded
in safety_net.json.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safety_net
import torch
from safetensors.torch import save_file
from torch import Tensor

RECORD = Path(__file__).with_name("old_runs.json")
BACKBONE = "pretrain_finished/backbone.safetensors"
SMALL_DET = {**safety_net.DET_SMALL, "eval_every": 2, "box_fc": 16}
SMALL_SEG = {**safety_net.SEG_SMALL, "max_iters": 4}

# --- making the folders ------------------------------------------------------------------------------------


def create(root: Path, only: str = "") -> Path:
    """The run folders (or ``only`` one) below ``root``, beside their data and the backbone of all."""
    safety_net.write_photos(root / "photos")
    safety_net.write_coco(root / "coco")
    safety_net.write_ade(root / "ade")
    runs = json.loads(RECORD.read_text(encoding="utf-8"))
    path = root / BACKBONE
    path.parent.mkdir(parents=True)
    write_tensors(path, runs["pretrain_finished"].pop("backbone.safetensors"))
    weights = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    for run, files in runs.items():
        if only not in ("", run):
            continue
        texts = {n: filled_in(t, root, weights) for n, t in files.items() if isinstance(t, str)}
        for name, text in texts.items():
            path = root / run / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for name, content in files.items():
            path = root / run / name
            if name.endswith(".safetensors"):
                write_tensors(path, content)
                write_manifest(path.parent)
            elif name not in texts:
                torch.save(decoded(content["pickled"], "", texts, root, weights), path)
    return root


def filled_in(text: str, root: Path, weights: str) -> str:
    """A text of the record as it stood in the folder."""
    return text.replace("{ROOT}", str(root)).replace("{WEIGHTS}", weights)


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """A safetensors file."""
    tensors = {name: drawn(word, name) for name, word in content["tensors"].items()}
    save_file(tensors, path, content["metadata"])


def write_manifest(folder: Path) -> None:
    """``manifest.json`` of a checkpoint's directory: sizes and checksums."""
    files = {}
    for name in ("state.safetensors", "meta.json"):
        data = (folder / name).read_bytes()
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=1))


def drawn(word: str, name: str) -> Tensor:
    """``tensor:SHAPE`` or ``tensor:SHAPE=VALUE``, float32; the numbers depend on the name alone.

    Weights of norms lie around 1, second moments are positive.
    """
    shape, _, value = word.removeprefix("tensor:").partition("=")
    size = [int(n) for n in shape.split(",") if n]
    if value:
        return torch.full(size, float(value))
    # Sums of twelve uniform numbers are nearly normal, and the same with every library.
    bits = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()))).random(
        (12, *size), np.float32
    )
    normal = torch.from_numpy(bits.sum(0, dtype=np.float32) - 6)
    if name.endswith("exp_avg_sq"):
        return normal.square() * 1e-4
    return normal * 0.02 + float("norm" in name and name.endswith("weight"))


def decoded(value: Any, name: str, texts: Mapping[str, str], root: Path, weights: str) -> Any:
    """A pickled value of the record, with its tensors, tuples, odd keys and histories of mmengine."""

    def inner(item: Any, key: Any) -> Any:
        return decoded(item, f"{name}.{key}", texts, root, weights)

    if isinstance(value, str):
        if value.startswith("tensor:"):
            return drawn(value, name)
        return texts[value[5:]] if value.startswith("file:") else filled_in(value, root, weights)
    if isinstance(value, list):
        return [inner(item, i) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "items:" in value:
        return {key: inner(item, key) for key, item in value["items:"]}
    if "tuple:" in value:
        return tuple(inner(item, i) for i, item in enumerate(value["tuple:"]))
    if "history:" in value:
        from mmengine.logging import HistoryBuffer

        return HistoryBuffer(*value["history:"])
    return {key: inner(item, key) for key, item in value.items()}


# --- the product ------------------------------------------------------------------------------------------


def resume_pretraining(folder: Path) -> Path:
    """Go on with a pre-training, with the config that its folder holds."""
    from pretrain.config import load_config
    from pretrain.train import train

    return train(load_config(folder / "config.yaml"), resume="auto")


def start_from(folder: Path, output: Path) -> Path:
    """A new pre-training with the networks of an old one."""
    from pretrain.config import load_config
    from pretrain.train import train

    words = [f"run.output={output}", f"run.start_from={folder}", "optim.epochs=1", "optim.warmup_epochs=0"]
    return train(load_config(folder / "config.yaml", words))


def state_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a pre-training's newest checkpoint."""
    from pretrain.checkpoints import newest

    found, _ = newest(folder)
    assert found is not None
    return found.tensors()


def detection_run(folder: Path) -> Any:
    """What was asked for when a detection run was started."""
    from det_plugin.protocol import protocol, with_overrides
    from det_plugin.run import DetectionRun

    root, name = folder.parent, "vit_tiny_patch16"
    recipe = with_overrides(protocol("coco-12ep", name), SMALL_DET)
    return DetectionRun(name, root / BACKBONE, root / "coco", folder, recipe, seed=5, device="cpu", workers=0)


def resume_torchvision(folder: Path) -> Path:
    """Go on with a run of the torchvision engine."""
    from det_plugin.torchvision_engine.train import train

    return train(detection_run(folder), resume=True)


def evaluate_torchvision(folder: Path) -> dict[str, Any]:
    """Metrics of its last checkpoint."""
    from det_plugin.torchvision_engine.train import evaluate_folder

    return evaluate_folder(folder, folder.parent / "coco", device="cpu", workers=0)


def resume_detectron2(folder: Path) -> Path:
    """Go on with a run of Detectron2's engine."""
    from det_plugin.detectron2_engine.train import train

    return train(detection_run(folder), resume=True)


def evaluate_detectron2(folder: Path) -> dict[str, Any]:
    """Metrics of its last checkpoint."""
    from det_plugin.detectron2_engine.train import evaluate_folder

    return evaluate_folder(folder, folder.parent / "coco", device="cpu", workers=0)


def detections(folder: Path, pixels: np.ndarray) -> list[dict[str, Any]]:
    """What a detection run's last checkpoint sees in an image."""
    from det_plugin.predict import load_detector

    return load_detector(folder, device="cpu").detect([pixels])[0]


def resume_segmentation(folder: Path) -> Path:
    """Go on with a segmentation run."""
    import mmengine.config.config

    from seg_plugin.protocol import protocol, with_overrides
    from seg_plugin.run import SegmentationRun, train

    mmengine.config.config.FormatCode = lambda text, **_: (text, True)  # it beautifies configs for seconds
    root, recipe = folder.parent, with_overrides(protocol(), SMALL_SEG)
    run = SegmentationRun("vit_tiny_patch16", root / BACKBONE, root / "ade", folder, recipe, 3, "cpu", 0)
    return train(run, resume=True)


def segmented(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """What a segmentation run's last checkpoint sees in its validation images, and the truth."""
    from seg_plugin.predict import dataset_of_run, load_segmenter, segment_dataset

    model = load_segmenter(folder, device="cpu").model
    dataset = dataset_of_run(model, "validation")
    found = segment_dataset(model, dataset, list(range(len(dataset))))
    return [(item.predicted, item.truth) for item in found if item.truth is not None]


def read_results(folder: Path) -> list[Any]:
    """All ``result.json`` below a folder."""
    from pretrain.results.runs import find_results
    from pretrain.results.schema import read_result

    return [read_result(path) for path in find_results([str(folder)])]


# --- resumed ----------------------------------------------------------------------------------------------

RESUMED: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "pretrain_stopped": (resume_pretraining, ()),
    "posttrain_stopped": (resume_pretraining, ()),
    "torchvision_stopped": (resume_torchvision, ("pycocotools",)),
    "detectron2_stopped": (resume_detectron2, ("detectron2",)),
    "segmentation_stopped": (resume_segmentation, ("mmseg",)),
}


def log_of(folder: Path) -> list[dict[str, float]]:
    """``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def resumed(root: Path, name: str) -> dict[str, Any]:
    """Go on with a stopped run to its end: its log as columns, and the tensors of a pre-training."""
    RESUMED[name][0](root / name)
    found: dict[str, Any] = {"logged": safety_net.by_name(log_of(root / name))}
    if RESUMED[name][0] is resume_pretraining:
        found["tensors"] = safety_net.described(state_of(root / name), safety_net.group_of_tensor)
    return found
