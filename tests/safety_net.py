"""What a rebuilding must not change, recorded at commit 2c21771.

    python tests/safety_net.py --check [GROUP ...]     say what differs from safety_net.json (exit code 1)
    python tests/safety_net.py --record [GROUP ...]    write it anew
    python tests/safety_net.py --spell [GROUP ...]     print it with what the hashes stand for, to be diffed
                                                       with what a checkout of an earlier commit prints

A deliberate change gets a commit of its own that says why and records the group anew. The groups: losses and
tensors of pre-training, draws of the loader, resolved configs, tables, features of every kind of weights,
steps of the engines of fine-tuning, old runs gone on with.

On the machine of the record (same processor, torch and libraries) everything is compared to the bit.
Elsewhere hashes of computed numbers say nothing, and floats must agree to a relative 1e-4. Words, configs
and tables are compared exactly everywhere.

The calls into the product stand in the first block. Where the product's interface changes, that block
follows, and it translates new names back into those of the record: names of losses and tensors are its keys.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
RECORD = HERE / "safety_net.json"
CONFIGS = HERE.parent / "configs"
CPU = torch.device("cpu")
TOLERANCE = 1e-4
# For numbers that are small differences of larger ones: float32 rounds these in another way elsewhere.
FLOOR = 1e-6

# --- the product: everything that is called by name --------------------------------------------------------

# Pre-training at a size of milliseconds. {name in the record: key=value words of the product}
SMALL = [
    "backbone.depth=2",
    "optim.batch_size=8",
    "optim.epoch_iters=1",  # warm-up ends after two steps, the last layer is frozen for one
    "data.workers=0",
    "run.device=cpu",
    "heads.hidden_dim=128",
    "heads.bottleneck_dim=64",
    "log.tensorboard=false",
]


def small_config(name: str, photos: Path, start: Path, path: str, accumulate: int, checkpointing: str) -> Any:
    """configs/pretrain/NAME.yaml, small, on the photos; a post-training starts from ``start``."""
    words = [*SMALL, f"data.root={photos}", f"data.path={path}"]
    words += [f"step.accumulate={accumulate}", f"step.checkpointing={checkpointing}"]
    words += [f"backbone.weights={start}"] if name in POST_TRAININGS else []
    return load(name, words)


def batches_config(name: str, photos: Path, start: Path) -> Any:
    """The rules of views at the recipe's own size; crops are not made."""
    words = [*SMALL, f"data.root={photos}", "data.path=device"]
    if name == "whole":  # the same crops for teacher and student, as Gram anchoring of whole images has it
        name, words = "toy_gram", [*words, "crops.local_rule=same", "crops.n_local=2", "crops.local_px=112"]
    words += [f"backbone.weights={start}"] if name in POST_TRAININGS else []
    return load(name, words)


def load(name: str, words: Sequence[str]) -> Any:
    """A config, resolved."""
    from pretrain.config import load_config

    return load_config(CONFIGS / "pretrain" / f"{name}.yaml", words)


def write_start(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A backbone as toy.yaml's pre-training leaves it, shallow, and its tensors."""
    from pretrain.build import build_backbone
    from pretrain.weights import save_backbone

    torch.manual_seed(0)
    vit = build_backbone("vit_tiny_patch16", depth=2, pos_encoding="field", pos_grid=20, mask_tokens=True)
    path = save_backbone(
        folder / "start.safetensors",
        vit.state_dict(),
        name="vit_tiny_patch16",
        model_kwargs=vit.model_kwargs,
        provenance={},
    )
    return path, vit.state_dict()


def steps_of(config: Any, n: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What the first n steps log, and the tensors of networks (``method.*``) and optimizer after them."""
    from pretrain.data.loader import build_dataset, build_loader
    from pretrain.device import deterministic
    from pretrain.trainer import Length, Trainer

    with deterministic(True):
        dataset = build_dataset(config)
        trainer = Trainer(config, Length.of(config, len(dataset)))
        loader = iter(build_loader(config, dataset, 0, n))
        logged = []
        for _ in range(n):
            parts = [next(loader)[0] for _ in range(config.step.accumulate)]
            logs = trainer.step(parts, examine=True)
            logged.append({name: float(term) for name, term in logs.losses.items()} | logs.scheduled)
        return logged, trainer.tensors()


def batches_of(config: Any, n: int) -> list[dict[str, Tensor]]:
    """The draws of the loader's first n batches."""
    from pretrain.data.loader import build_dataset, build_loader
    from pretrain.views import Masks

    found = []
    for batch, _ in build_loader(config, build_dataset(config), 0, n):
        views, masks, colors = batch.views, batch.masks, batch.colors
        if masks is None:  # a post-training masks nothing; 2c21771 drew empty masks for it
            nothing = np.zeros(
                (views.n_global * len(views.boxes), np.prod(config.view_settings().grid)), bool
            )
            masks = Masks.of(nothing, nothing)
        found.append(
            {
                "boxes": views.boxes,
                "flips": views.flips,
                "position_boxes": views.position_boxes,
                "position_flips": torch.cat([views.globals[1], views.locals[1]]),
                "content_masks": masks.content,
                "position_masks": masks.position,
                "content_index": masks.content_index,
                "position_index": masks.position_index,
                "content_weight": masks.content_weight,
                "position_weight": masks.position_weight,
                "color_jitter": colors.jitter,
                "color_order": colors.order,
                "color_factors": colors.factors,
                "color_gray": colors.gray,
                "color_sigma": colors.sigma,
                "color_solarize": colors.solarize,
            }
        )
    return found


def detection_protocols() -> list[str]:
    """Their names."""
    from det_plugin.protocol import PROTOCOLS

    return list(PROTOCOLS)


def segmentation_protocols() -> list[str]:
    """Their names."""
    from seg_plugin.protocol import PROTOCOLS

    return list(PROTOCOLS)


def detectron2_config(name: str, backbone: str) -> dict[str, Any]:
    """Model, solver and loaders as Detectron2 gets them, interpolations as written; not our evaluator."""
    from omegaconf import OmegaConf

    from det_plugin.detectron2_engine.lazy import config
    from det_plugin.protocol import protocol

    plain = OmegaConf.to_container(
        config(protocol(name, backbone), backbone, data="COCO", output="OUTPUT"), resolve=False
    )
    del plain["dataloader"]["evaluator"]
    return plain


def mmengine_config(name: str, backbone: str) -> dict[str, Any]:
    """The config as mmengine gets it; without our hook."""
    from mmengine.config import Config

    from seg_plugin.config import segmenter_config
    from seg_plugin.protocol import protocol, with_overrides

    recipe = protocol(name)
    recipe = recipe if recipe.num_classes else with_overrides(recipe, {"num_classes": 3})  # one's own data
    plain = Config(segmenter_config(recipe, backbone, data_root="DATA")).to_dict()
    del plain["custom_hooks"]
    return plain


def torchvision_objects(
    name: str, backbone: str
) -> tuple[torch.nn.Module, torch.optim.Optimizer, list[float], list[Any]]:
    """Detector (without weights) and optimizer of a protocol; learning rates; lengths and geometries."""
    from det_plugin.augment import evaluation_geometry, jitter
    from det_plugin.protocol import protocol
    from det_plugin.torchvision_engine.model import build_model
    from det_plugin.torchvision_engine.optim import build_optimizer, lr_at, set_lr
    from pretrain.build import build_for_fine_tuning

    recipe = protocol(name, backbone)
    with quick_initialization():
        model = build_model(build_for_fine_tuning(backbone, None, drop_path=recipe.drop_path), recipe)
    optimizer = build_optimizer(model, recipe)
    set_lr(optimizer, recipe.lr)
    its = [
        0,
        1,
        125,
        249,
        250,
        *(it + k for it in recipe.milestones for k in (-1, 0)),
        recipe.max_iters - 1,
    ]
    sizes = [(640, 480), (333, 500), (1200, 800)]
    drawn = [jitter(size, recipe, np.random.default_rng([i, 5])) for i, size in enumerate(sizes)]
    drawn += [evaluation_geometry(size, recipe.image_size_px) for size in sizes]
    lengths = [
        recipe.max_iters,
        recipe.eval_every,
        recipe.batch_size,
        recipe.train_share,
        recipe.amp,
        recipe.amp_dtype,
    ]
    return (
        model,
        optimizer,
        [lr_at(it, recipe) for it in its],
        [*lengths, *([g.flip, g.resized, g.crop] for g in drawn)],
    )


@contextmanager
def quick_initialization() -> Iterator[None]:
    """For objects whose weights do not matter."""
    with ExitStack() as stack:
        for name in ("trunc_normal_", "kaiming_uniform_", "normal_", "uniform_"):
            stack.enter_context(mock.patch.object(torch.nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def result_of(**fields: Any) -> Any:
    """A run's result; ``protocol`` is (name, deviations)."""
    from pretrain.results.schema import Protocol, Result

    name, deviations = fields.pop("protocol")
    return Result(
        protocol=Protocol(name=name, version=1, full=not deviations, deviations=deviations), **fields
    )


def rendered(results: Sequence[Any], layout: str, published: str, format: str, against: str = "") -> str:
    """All tables of some results."""
    from pretrain.results.render import render_all
    from pretrain.results.report import tables_of

    return render_all(tables_of(results, layout, published, against), format)


def ablation_rendered(pairs: Sequence[tuple[Any, Any]], reference: str, format: str) -> str:
    """The table of an ablation of (pre-training, fine-tuning)."""
    from pretrain.results.ablation import Trial, ablation_table
    from pretrain.results.render import render

    return render(ablation_table([Trial(*pair) for pair in pairs], reference), format)


def merged(results: Sequence[Any]) -> list[list[Any]]:
    """Method, seeds, and number of scaled-down protocols of each row that the results make."""
    from pretrain.results.rows import merge

    return [[row.run.method, row.seeds, len(row.scaled)] for row in merge(results)]


def read_backbone(path: Path, options: Mapping[str, Any]) -> tuple[str, torch.nn.Module, dict[str, Any]]:
    """The registry name that a file says, its network, and the words that it says of itself."""
    from pretrain.build import build_backbone
    from pretrain.weights import backbone_name, read_checkpoint

    name = backbone_name(None, path)
    vit = build_backbone(name, path, **options).eval()
    said = read_checkpoint(path, subnet=options.get("subnet")).provenance
    return name, vit, dict(sorted(said.items()))


def open_images(root: Path, kind: str, split: str = "") -> list[tuple[str, bytes]]:
    """(name, encoded image) of all images of a source, in its order."""
    from source_fixture import opened

    source = opened(root, kind, split)
    return [(source.name(i), source.read(i)) for i in range(len(source))]


DET_SMALL = dict(
    max_iters=4, milestones=(2,), warmup_iters=1, batch_size=2, eval_every=4, image_size_px=64,
    channels=16, box_fc=32, box_convs=1, mask_convs=1, num_classes=3, roi_batch_per_image=16, lr=1e-3,
    rpn_pre_nms=(100, 50), rpn_post_nms=(50, 20), anchor_sizes_px=(8, 16, 32, 64, 128), amp=False,
    detections_per_image=10,
)  # fmt: skip
DET_FLAGS = dict(depth=2, pos_encoding="field", pos_grid=6, n_registers=1)
SEG_SMALL = dict(
    max_iters=2, val_every=2, resize_px=(96, 48), crop_px=48, slide_crop_px=48,
    slide_stride_px=32, num_classes=4, reduce_zero_label=True, batch_size=2,
)  # fmt: skip


def torchvision_steps(
    coco: Path, folder: Path, n: int, accumulate: int
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses of the torchvision engine's first steps, and the detector after them."""
    from det_plugin.coco.annotations import Data
    from det_plugin.loader import positions
    from det_plugin.protocol import protocol, with_overrides
    from det_plugin.run import DetectionRun
    from det_plugin.torchvision_engine.loader import TrainSamples
    from det_plugin.torchvision_engine.trainer import Trainer
    from pretrain.device import deterministic

    recipe = with_overrides(protocol("coco-12ep", "vit_tiny_patch16"), DET_SMALL)
    run = DetectionRun(
        "vit_tiny_patch16",
        None,
        coco,
        folder,
        recipe,
        5,
        "cpu",
        workers=0,
        accumulate=accumulate,
        model_kwargs=DET_FLAGS,
    )
    with deterministic(True):
        trainer, data = Trainer(run, CPU), Data.read(coco, recipe)
        samples = TrainSamples(data.train, recipe, run.seed)
        logged = [
            trainer.step([samples[i] for i in positions(it, recipe.batch_size, 0, 1)]) for it in range(n)
        ]
        return logged, trainer.model.state_dict()


def detectron2_steps(
    coco: Path, folder: Path, n: int, accumulate: int
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The same of Detectron2's engine."""
    from detectron2.config import instantiate
    from detectron2.engine import hooks
    from detectron2.utils.events import EventStorage

    from det_plugin.detectron2_engine.lazy import config
    from det_plugin.detectron2_engine.trainer import AccumulatingTrainer
    from det_plugin.protocol import protocol, with_overrides
    from pretrain.device import deterministic

    recipe = with_overrides(protocol("coco-12ep", "vit_tiny_patch16"), DET_SMALL)
    model_kwargs = dict(data=coco, output=folder, model_kwargs=DET_FLAGS, seed=5, device="cpu", workers=0)
    cfg = config(recipe, "vit_tiny_patch16", **model_kwargs)
    torch.manual_seed(5)
    np.random.seed(5)
    with deterministic(True):
        model = instantiate(cfg.model)
        cfg.optimizer.params.model = model
        parts = instantiate(cfg.dataloader.train).parts(accumulate)
        trainer = AccumulatingTrainer(
            model, parts, instantiate(cfg.optimizer), accumulate=accumulate, amp=False
        )
        trainer.register_hooks([hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))])
        logged = []
        with EventStorage(0) as trainer.storage:
            trainer.iter, trainer.start_iter, trainer.max_iter = 0, 0, n
            trainer.before_train()
            for trainer.iter in range(n):
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
                logged.append(dict(trainer.last))
        parts.close()
        return logged, model.state_dict()


def mmseg_run(ade: Path, folder: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """A whole run of two iterations and a validation: the lines of its log, and its network."""
    import mmengine.config.config

    from seg_plugin.protocol import protocol, with_overrides
    from seg_plugin.run import SegmentationRun, train

    mmengine.config.config.FormatCode = lambda text, **_: (text, True)  # it beautifies configs for seconds
    recipe = with_overrides(protocol(), SEG_SMALL)
    train(
        SegmentationRun("vit_tiny_patch16", None, ade, folder, recipe, 3, "cpu", 0, dict(depth=2, pos_grid=6))
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, torch.load(folder / "iter_2.pth", weights_only=True)["state_dict"]


# --- images by integer arithmetic -------------------------------------------------------------------------


def picture(index: int, height: int, width: int) -> np.ndarray:
    """Slow waves with a little grain, [H, W, 3] uint8; the same on every machine and with every library."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    channels = []
    for k in range(3):
        wave = (
            x * (3 + (index + k) % 4)
            + y * (2 + (2 * index + k) % 5)
            + ((x * y) >> 5) * (1 + k)
            + 61 * index
            + 97 * k
        ) % 510
        grain = ((x * 7919 + y * 104729 + index * 1299709 + k * 15485863) * 1103515245 >> 9) & 15
        channels.append(np.abs(wave - 255) * 15 // 16 + grain)
    return np.stack(channels, -1).clip(0, 255).astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """A PNG, whatever the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def write_photos(folder: Path, n: int = 20) -> Path:
    """A folder of small images of several shapes."""
    for i in range(n):
        write_png(folder / f"{i:03}.png", picture(i, 60 + 9 * (i % 5), 150 - 11 * (i % 7)))
    return folder


def write_coco(root: Path) -> Path:
    """COCO's layout: rectangles and diamonds of three classes in nine images, with an RLE and a crowd."""
    for split, n, first in (("train", 6, 1), ("val", 3, 101)):
        images, annotations = [], []
        for i in range(n):
            width, height = [(96, 64), (64, 96), (80, 80)][i % 3]
            images.append(
                {"id": first + i, "file_name": f"{first + i:06}.png", "width": width, "height": height}
            )
            write_png(root / f"{split}2017" / images[-1]["file_name"], picture(first + i, height, width))
            for k in range(2):
                x, y, w, h = (
                    4 + k * width // 2,
                    6 + 5 * ((i + k) % 4),
                    18 + 3 * ((i + 2 * k) % 4),
                    22 + 4 * ((2 * i + k) % 5),
                )
                box = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                diamond = [[x + w // 2, y, x + w, y + h // 2, x + w // 2, y + h, x, y + h // 2]]
                shape: Any = [box, diamond][(i + k) % 2]
                if i == k == 0:  # column by column
                    gap = height - h
                    runs = [x * height + y, *([h, gap] * w)]
                    shape = {"size": [height, width], "counts": [*runs[:-1], height * width - sum(runs[:-1])]}
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": first + i,
                        "category_id": [3, 7, 90][(i + k) % 3],
                    }
                    | {
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": int(i == 1 and k == 1),
                        "segmentation": shape,
                    }
                )
        categories = [{"id": id, "name": name} for id, name in ((3, "rectangle"), (7, "disc"), (90, "bar"))]
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


def write_ade(root: Path) -> Path:
    """ADE20K's layout with four classes, stored from 1. The images are PNGs in spite of their names."""
    for split, n in (("training", 5), ("validation", 2)):
        for i in range(n):
            height, width = (40, 56) if i % 2 else (56, 40)
            y, x = np.mgrid[:height, :width]
            labels = (1 + (x // 14 + y // 13 + i) % 4).astype(np.uint8)
            labels[:2] = 0
            pixels = picture(i, height, width) // 2 + labels[..., None] * np.array([30, 20, 9], np.uint8)
            write_png(root / "images" / split / f"{i:04}.jpg", pixels)
            write_png(root / "annotations" / split / f"{i:04}.png", labels)
    return root


SPELLED = False  # --spell


# --- hashes -----------------------------------------------------------------------------------------------


def short_hash(*parts: bytes) -> str:
    """48 bits of SHA-256."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def tensor_hash(tensor: Tensor) -> str:
    """Of dtype, shape and bytes."""
    return short_hash(
        f"{tensor.dtype} {tuple(tensor.shape)}".encode(), tensor.detach().cpu().numpy().tobytes()
    )


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Of names and contents, whatever their order."""
    return short_hash(*(f"{name} {tensor_hash(tensors[name])}".encode() for name in sorted(tensors)))


def size_of(tensors: Iterable[Tensor]) -> float:
    """The sum of absolute values, in float64."""
    return sum(float(tensor.double().abs().sum()) for tensor in tensors)


def described(tensors: Mapping[str, Tensor], group_of: Callable[[str], str]) -> dict[str, Any]:
    """Of each group of tensors: how many, their hash, and the sum of their absolute values."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(group_of(name), {})[name] = tensor
    return {
        name: {"count": len(group), "hash": spelled_tensors(group), "sum": size_of(group.values())}
        for name, group in sorted(groups.items())
    }


def spelled_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """Their hash, or each one's."""
    return (
        {name: tensor_hash(tensors[name]) for name in sorted(tensors)} if SPELLED else tensors_hash(tensors)
    )


def text_hash(text: str) -> Any:
    """A text's hash, or its lines."""
    return text.splitlines() if SPELLED else short_hash(text.encode())


def by_name(logged: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Lines of a log as columns."""
    names = dict.fromkeys(name for line in logged for name in line)
    return {name: [line[name] for line in logged if name in line] for name in names}


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: leaf} of nested dicts and lists; an empty one is a leaf."""
    if isinstance(value, Mapping | list | tuple) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {
            k: v
            for key, item in items
            for k, v in leaves(item, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: value}


def word(value: Any) -> Any:
    """A leaf as JSON has it. Of our own functions the name alone is kept: modules move."""
    if isinstance(value, type) or callable(value):
        value = f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, str) and value.split(".")[0] in ("det_plugin", "seg_plugin", "pretrain"):
        return f"ours.{value.split('.')[-1]}"
    return value if value is None or isinstance(value, str | bool | int | float) else repr(value)


def config_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of each section of a config: how many leaves, and the hash of its canonical JSON."""
    found = {}
    for section, content in sorted(config.items()):
        flat = {key: word(value) for key, value in leaves(content, section).items()}
        found[section] = flat if SPELLED else [len(flat), text_hash(json.dumps(flat, sort_keys=True))]
    return found


# --- the groups -------------------------------------------------------------------------------------------

POST_TRAININGS = ("toy_paka", "toy_paka_tied", "toy_gram")
BACKBONES = ("vit_small_patch16", "vit_base_patch16")
N_STEPS, N_BATCHES = 3, 20


def group_of_tensor(name: str) -> str:
    """Student, teacher, centers; AdamW's moments and steps."""
    words = name.split(".")
    if words[0] == "optimizer":
        return f"optimizer.{words[-1]}"
    return ".".join(words[:2]) if words[1] in ("student", "teacher") else "method.rest"


def pretraining_steps(folder: Path) -> dict[str, Any]:
    """Three steps of every toy config, by data path, accumulation and checkpointing."""
    photos, (start, state) = write_photos(folder / "photos"), write_start(folder)
    found: dict[str, Any] = {"start": described(state, lambda name: "backbone")}
    for name in ("toy", "toy_dinov2", "toy_paka", "toy_gram"):
        for path in ("cpu", "device"):
            for accumulate in (1, 2):
                for checkpointing in ("none", "full"):
                    config = small_config(name, photos, start, path, accumulate, checkpointing)
                    logged, tensors = steps_of(config, N_STEPS)
                    key = f"{name} {path} accumulate={accumulate} checkpointing={checkpointing}"
                    found[key] = {"logged": by_name(logged), "tensors": described(tensors, group_of_tensor)}
    return found


def loader_batches(folder: Path) -> dict[str, Any]:
    """Boxes, flips, position boxes, masks and colors of the first batches."""
    photos, (start, _) = write_photos(folder / "photos"), write_start(folder)
    found = {}
    for name in ("toy", "toy_dinov2", "toy_paka", "toy_paka_tied", "whole"):
        drawn = batches_of(batches_config(name, photos, start), N_BATCHES)
        assert len(drawn) == N_BATCHES
        found[name] = {
            key: {
                "hash": short_hash(*(tensor_hash(batch[key]).encode() for batch in drawn)),
                "sum": size_of(batch[key] for batch in drawn),
                "last": drawn[-1][key].flatten()[:4].tolist(),
            }
            for key in drawn[0]
        }
    return found


def detectron2_protocols(folder: Path) -> dict[str, Any]:
    """Detectron2's config of every protocol and backbone."""
    return {
        f"{name} {backbone}": config_record(detectron2_config(name, backbone))
        for name in detection_protocols()
        for backbone in BACKBONES
    }


def mmengine_protocols(folder: Path) -> dict[str, Any]:
    """mmengine's config of every protocol and backbone."""
    return {
        f"{name} {backbone}": config_record(mmengine_config(name, backbone))
        for name in segmentation_protocols()
        for backbone in BACKBONES
    }


def plain_attributes(module: torch.nn.Module) -> Any:
    """Numbers and words that a module holds. Of our own classes without their names, which may change."""
    kinds = (bool, int, float, str)
    values = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    values = {
        k: v
        for k, v in values.items()
        if isinstance(v, kinds) or isinstance(v, tuple | list) and all(isinstance(x, kinds) for x in v)
    }
    if type(module).__module__.split(".")[0] in ("det_plugin", "pretrain"):
        return sorted(json.dumps(v) for v in values.values())
    return values


def torchvision_protocols(folder: Path) -> dict[str, Any]:
    """What the torchvision engine builds of every protocol and backbone."""
    found = {}
    for name in detection_protocols():
        for backbone in BACKBONES:
            model, optimizer, rates, data = torchvision_objects(name, backbone)
            modules = [[type(m).__name__, plain_attributes(m)] for m in model.modules()]
            shapes = {key: [list(p.shape), p.requires_grad] for key, p in model.named_parameters()}
            names = {id(p): key for key, p in model.named_parameters()}
            groups = {
                names[id(p)]: [group[key] for key in ("lr", "weight_decay", "betas", "eps")]
                for group in optimizer.param_groups
                for p in group["params"]
            }
            sections = {"modules": modules, "parameters": shapes, "optimizer": groups, "data": data}
            found[f"{name} {backbone}"] = {**config_record(sections), "rates": rates}
    return found


def some_results() -> list[Any]:
    """Measured rows: seeds, an ablation, a scaled-down run, post-trainings, dense evaluations."""
    base = dict(
        backbone="vit_small_patch16", effective_epochs=346.94, config_hash="0123456789ab",
        weights_hash="ba9876543210", git_commit=None, packages={"torch": "2.15.0"}, wall_time_s=3723.0,
        hardware={"cpu": "a", "cores": 2, "gpus": []}, peak_memory_mib=1234.5,
        created="2026-01-31T12:00:00+00:00",
    )  # fmt: skip

    def result(kind: str, method: str, protocol: str, metrics: Mapping[str, Any], **changes: Any) -> Any:
        deviations = changes.pop("deviations", {})
        fields = {**base, "seed": 0, **changes, "protocol": (protocol, deviations), "metrics": dict(metrics)}
        return result_of(kind=kind, method=method, **fields)

    losses = {"loss": 14.1, "image": 5.5, "content": 4.4, "position": 4.5, "koleo": -0.3, "n_skipped": 0}
    scores = {"box_ap": 41.25, "mask_ap": 37.5, "box_ap50": 62.0, "box_ap_classes": {"a": 40.0, "b": 42.5}}
    ablated = {"masks.position_shape": ["cross", "box"]}
    scaled = {"iterations_it": [22128, 60], "batch_size": [64, 2]}
    toy = {"optim.epochs": [100, 14], "backbone.name": ["vit_small_patch16", "vit_tiny_patch16"]}
    own, box, dino = "intertwined", dict(weights_hash="b0x"), dict(weights_hash="d1n0")
    odd, post, big = "paka | a_b & <c>", dict(weights_hash="p0st"), dict(backbone="vit_base_patch16_reg4")
    boxes, low = "intertwined, box-wise position masks", {"box_ap": 12.3, "mask_ap": 11.1}
    paka, gram = {"loss": 0.3, "cka": 0.3, "overlaps": 0.6}, {"loss": 0.01, "gram": 0.01, "overlaps": 0.5}
    # fmt: off
    return [
        result("pretrain", own, "intertwined-100ep", losses),
        *(result("detection", own, "coco-12ep", {**scores, "box_ap": 41.25 + k}, seed=k) for k in range(3)),
        result("segmentation", own, "ade20k-160k", {"miou": 43.21, "macc": 54.0, "iou": {"wall": 70.1}}),
        result("pretrain", boxes, "intertwined-100ep", losses, deviations=ablated, **box),
        result("detection", boxes, "coco-12ep", {"box_ap": 40.9, "mask_ap": 37.1}, **box),
        result("pretrain", "dinov2", "dinov2-100ep", {"loss": 9.75, "image": 5.25}, deviations=toy, **dino),
        result("detection", "dinov2", "coco-12ep", low, deviations=scaled, **dino),
        result("segmentation", "dinov2", "voc2012-40k", {"miou": 33.3}, **dino),
        result("pretrain", "paka", "paka-25ep", paka, **post),
        result("pretrain", "gram", "gram-25ep", gram, weights_hash="9ram", seed=1),
        result("detection", odd, "coco-50ep", {"box_ap": 50.0, "mask_ap": 44.0}, **big),
        result("dense", "dinov2r", "dense-voc2012", {"linear_miou": 74.0, "in_context_miou": 70.0}),
        result("dense", "paka", "dense-voc2012", {"linear_miou": 76.0, "clustering_k500_miou": 60.0}, **post),
        result("dense", "paka", "dense-knn", {"knn_top1": 71.0}, deviations={"images": [50000, 100]}, **post),
    ]
    # fmt: on


def tables(folder: Path) -> dict[str, Any]:
    """Every table of the published numbers, and of these beside measured ones, in every format."""
    results = some_results()
    kinds = {"nothing measured": [], "all": results, "dense alone": [r for r in results if r.kind == "dense"]}
    kinds["pre-trainings alone"] = [r for r in results if r.kind == "pretrain"]
    found: dict[str, Any] = {}
    for kind, chosen in kinds.items():
        for layout in ("list", "paper", "dense"):
            for published in ("", "all", "1,7"):
                key = f"{kind}, {layout}, {published or 'usual'}"
                texts = [
                    rendered(chosen, layout, published, format) for format in ("md", "csv", "latex", "html")
                ]
                found[key] = [[len(text), text_hash(text)] for text in texts]
    found["against dinov2r"] = text_hash(rendered(results, "dense", "", "md", "dinov2r"))
    stages = [[r for r in results if r.kind == kind and r.seed == 0] for kind in ("pretrain", "detection")]
    pairs = [(a, b) for a in stages[0] for b in stages[1] if a.method == b.method != "dinov2"]
    for format in ("md", "csv", "latex", "html"):
        found[f"ablation, {format}"] = text_hash(ablation_rendered(pairs, "intertwined", format))
    found["merged"] = merged(results)
    return found


def weight_files(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A file of every source, as the tests of that source make it, and the options to read it with."""
    import public_fixture
    import reference_vit
    import test_lomar
    import test_weights_dino
    import test_weights_dinov2
    import test_weights_huggingface as hub
    import test_weights_loca
    import test_weights_mae
    import test_weights_patchwise
    import test_weights_tuned

    saved = reference_vit.saved
    files: dict[str, tuple[Path, dict[str, Any]]] = {"posfield": (write_start(folder / "posfield")[0], {})}
    for name in ("dino", "ibot", "ibot_scaled", "mugs", "cribo", "croc"):
        for subnet in ("teacher", "student"):
            files[f"{name} {subnet}"] = (
                saved(folder / name, test_weights_dino.full(name)[0]),
                {"subnet": subnet},
            )
    for registers in (0, 4):
        torch.manual_seed(1)
        state = test_weights_dinov2.published(registers)[0]
        path = saved(
            folder / f"dinov2_{registers}", state, f"dinov2_vits14{'_reg4' * (registers > 0)}_pretrain.pth"
        )
        files[f"dinov2 registers={registers}"] = (path, {})
        files[f"dinov2 registers={registers} at 16 px"] = (path, {"patch_size": 16})
    torch.manual_seed(2)
    trained = {
        name: test_weights_dinov2.training(test_weights_dinov2.published(seed=i)[0], 2)
        for i, name in enumerate(("teacher", "student"))
    }
    files["dinov2 training"] = (saved(folder / "dinov2_training", trained), {"subnet": "student"})
    for name in ("ViTModel", "ViTMSNModel", "Dinov2Model", "Dinov2WithRegistersForImageClassification"):
        files[f"huggingface {name}"] = (hub.saved(hub.tiny(name), folder / name), {})
    mae = hub.tiny("ViTMAEForPreTraining", decoder_num_hidden_layers=1)
    files["huggingface ViTMAEForPreTraining"] = (hub.saved(mae, folder / "ViTMAE"), {})
    for name, options in {
        "timm": {},
        "timm registers": dict(registers=2),
        "timm without cls": dict(class_token=False, global_pool="avg"),
    }.items():
        model = public_fixture.timm_vit(16, (5, 5), **options)
        files[name] = (saved(folder / name.replace(" ", "_"), model.state_dict(), "vit.pth"), {})
    (folder / "loca").mkdir()
    loca = folder / "loca" / "loca_vsmall_imnet1k"
    loca.write_bytes(
        test_weights_loca.packed(
            test_weights_loca.state_of(test_weights_loca.network(0), test_weights_loca.network(1))
        )
    )
    files["loca"] = (loca, {})
    (folder / "lomar").mkdir()
    lomar = test_lomar.randomize(test_lomar.PublicLoMaR()).state_dict()
    files["lomar"] = (test_lomar.write(folder / "lomar" / "checkpoint-399.pth", lomar), {})
    for layouts in (test_weights_mae.LAYOUTS, test_weights_tuned.LAYOUTS):
        for name, (_, content, _) in layouts.items():
            files[name] = (saved(folder / name.replace(" ", "_"), content), {})
    for name in ("selfpatch", "flsl", "flsl without a norm", "flsl on modes"):
        files[name] = (saved(folder / name.replace(" ", "_"), test_weights_patchwise.full(name)[0]), {})
    return files


@torch.no_grad()
def weight_features(folder: Path) -> dict[str, Any]:
    """Features of one image by a backbone of every source."""
    found = {}
    for name, (path, options) in weight_files(folder).items():
        says, vit, said = read_backbone(path, options)
        pixels = torch.from_numpy(picture(3, 5 * vit.patch_size, 9 * vit.patch_size)).permute(2, 0, 1)[None]
        tokens = vit(pixels.float() / 127.5 - 1)
        outputs = {
            key: value for key, value in zip(("cls", "registers", "patches"), tokens) if value is not None
        }
        numbers = [
            float(x) for x in outputs["patches"].flatten()[:: max(1, outputs["patches"].numel() // 4)][:4]
        ]
        said = {key: word(value) for key, value in said.items()}
        found[name] = {"backbone": says, "says": said, "hash": spelled_tensors(outputs), "numbers": numbers}
    return found


def image_sources(folder: Path) -> dict[str, Any]:
    """Names and contents of images by every kind of source."""
    from source_fixture import write_shards

    photos = write_photos(folder / "photos", 6)
    (folder / "list.txt").write_text("".join(f"photos/{i:03}.png\n" for i in (4, 0, 2)))
    kinds = {
        "folder": (photos, ""),
        "list": (folder / "list.txt", ""),
        "coco": (write_coco(folder / "coco"), "train2017"),
        "tar": (write_shards(folder / "shards"), ""),
    }
    found = {}
    for kind, (root, split) in kinds.items():
        images = open_images(root, kind, split)
        # PNGs are compressed by a library: their pixels are the content.
        pixels = [
            np.asarray(Image.open(p)).tobytes() if (p := folder / "photos" / n).is_file() else b
            for n, b in images
        ]
        pixels = pixels if kind in ("folder", "tar") else []
        found[kind] = {
            "names": short_hash(*(name.encode() for name, _ in images)),
            "n": len(images),
            "=": short_hash(*pixels),
        }
    return found


def engine_record(
    steps: Callable[..., tuple[list[dict[str, float]], dict[str, Tensor]]], *arguments: Any
) -> dict[str, Any]:
    """Losses and parameters of an engine's first steps."""
    logged, tensors = steps(*arguments)
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {"logged": by_name(logged), "tensors": described(floats, lambda name: name.split(".")[0])}


def torchvision_detection(folder: Path) -> dict[str, Any]:
    """Steps of the torchvision engine."""
    coco = write_coco(folder / "coco")
    return {
        f"accumulate={n}": engine_record(torchvision_steps, coco, folder / "run", N_STEPS, n) for n in (1, 2)
    }


def detectron2_detection(folder: Path) -> dict[str, Any]:
    """Steps of Detectron2's engine."""
    coco = write_coco(folder / "coco")
    return {
        f"accumulate={n}": engine_record(detectron2_steps, coco, folder / "run", N_STEPS, n) for n in (1, 2)
    }


def segmentation(folder: Path) -> dict[str, Any]:
    """A run in MMSegmentation."""
    return engine_record(mmseg_run, write_ade(folder / "ade"), folder / "run")


def resumed(name: str) -> Callable[[Path], dict[str, Any]]:
    """An old run, gone on with (:mod:`old_runs`)."""

    def group(folder: Path) -> dict[str, Any]:
        import old_runs

        return old_runs.resumed(old_runs.create(folder, name), name)

    return group


OLD_RUNS = ("pretrain", "posttrain", "torchvision", "detectron2", "segmentation")
GROUPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "pretraining": pretraining_steps,
    "batches": loader_batches,
    "detectron2_protocols": detectron2_protocols,
    "mmengine_protocols": mmengine_protocols,
    "torchvision_protocols": torchvision_protocols,
    "tables": tables,
    "weights": weight_features,
    "sources": image_sources,
    "torchvision_detection": torchvision_detection,
    "detectron2_detection": detectron2_detection,
    "segmentation": segmentation,
    **{f"resumed_{name}": resumed(f"{name}_stopped") for name in OLD_RUNS},
}
EXACT = (
    "detectron2_protocols",
    "mmengine_protocols",
    "torchvision_protocols",
    "tables",
    "sources",
)  # no machine computes these
NEEDS = {
    "detectron2_protocols": ("detectron2",),
    "detectron2_detection": ("detectron2",),
    "mmengine_protocols": ("mmseg",),
    "segmentation": ("mmseg",),
    "weights": ("timm", "transformers", "msgpack"),
    "torchvision_detection": ("pycocotools",),
    "resumed_torchvision": ("pycocotools",),
    "resumed_detectron2": ("detectron2",),
    "resumed_segmentation": ("mmseg",),
}

# --- recording and comparing -------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What exact numbers depend on."""
    import cv2
    import torchvision

    cpu = {}
    if Path("/proc/cpuinfo").is_file():
        lines = [
            line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        ]
        cpu = {key.strip(): value.strip() for key, _, value in lines}
    return {
        "cpu": " ".join(cpu.get(key, "?") for key in ("model name", "cpu family", "model", "stepping")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def measure(group: str) -> dict[str, Any]:
    """A group as the code at hand computes it, on one thread, as JSON holds it."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return json.loads(json.dumps(GROUPS[group](Path(folder))))
        finally:
            torch.set_num_threads(n_threads)


def read_record() -> dict[str, Any]:
    """The file; of nothing an empty one."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {"machines": {}, "groups": {}}


def is_exact(group: str) -> bool:
    """Whether a group can be compared to the bit here."""
    return group in EXACT or read_record()["machines"].get(group) == machine()


def differences(group: str, found: Mapping[str, Any]) -> list[str]:
    """What of a group is not as recorded, one line a leaf."""
    exact = is_exact(group)
    old, new = leaves(read_record()["groups"][group]), leaves(found)
    lines = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if not exact and key.split(".")[-1] == "hash":
            continue
        if not exact and isinstance(a, float) and isinstance(b, float):
            if abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + FLOOR:
                continue
        if a != b:
            lines.append(f"{group}: {key}: recorded {a!r}, now {b!r}")
    return lines


def write_record(groups: Sequence[str]) -> None:
    """Record some groups anew; the others stay."""
    record = read_record()
    for group in groups:
        record["groups"][group], record["machines"][group] = measure(group), machine()
    for key in ("machines", "groups"):
        record[key] = {group: record[key][group] for group in GROUPS if group in record[key]}
    RECORD.write_text(compact(record) + "\n")


def compact(value: Any, depth: int = 0) -> str:
    """JSON with a line a run, so that a diff names what changed."""
    if isinstance(value, dict) and value and depth < 3:
        inner = ",\n".join(
            f"{' ' * (depth + 1)}{json.dumps(k)}: {compact(v, depth + 1)}" for k, v in value.items()
        )
        return f"{{\n{inner}\n{' ' * depth}}}"
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", action="store_true")
    action.add_argument("--check", action="store_true")
    action.add_argument("--spell", action="store_true")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    options = parser.parse_args()
    groups = options.groups or list(GROUPS)
    if options.record:
        write_record(groups)
        return 0
    if options.spell:
        global SPELLED
        SPELLED = True
        print(json.dumps({group: measure(group) for group in groups}, indent=1, ensure_ascii=False))
        return 0
    wrong = 0
    for group in groups:
        lines = differences(group, measure(group))
        how = "" if is_exact(group) else f" above {TOLERANCE:g}: another machine"
        print(f"{group}: {len(lines)} differences{how}")
        print("".join(f"  {line}\n" for line in lines), end="", flush=True)
        wrong += bool(lines)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
