"""What only a CUDA device can show; skipped, with the reason, where there is none."""

import json
import math

import pytest
import torch
from dense_fixture import DENSE, GRAM, TIED, write_start
from photos import TINY, last, write_photos

from det_plugin.protocol import protocol, with_overrides
from det_plugin.torchvision_engine.model import build_model
from pretrain.backbones.position import sample_field
from pretrain.benchmark.step import synthetic_batch
from pretrain.build import build_backbone
from pretrain.config import load_config
from pretrain.evaluation.clustering import kmeans
from pretrain.evaluation.in_context import Memory
from pretrain.train import train
from pretrain.trainer import Length, Trainer
from pretrain.views.regions import read_regions

DEVICE = "cuda"
BASELINE = [
    "positions.encoding=standard",
    "positions.grid=4",
    "positions.interpolation=dinov2",
    "positions.augment=false",
]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_positions_are_those_of_the_cpu_and_their_gradient_is_deterministic():
    field = torch.randn(1, 32, 50, 50, requires_grad=True)
    boxes, flips = torch.rand(16, 4).cumsum(1) / 4, torch.rand(16) < 0.5
    expected = sample_field(field, boxes, (14, 14), flips)
    gradients = []
    for _ in range(2):
        on_gpu = field.detach().cuda().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            got = sample_field(on_gpu, boxes.cuda(), (14, 14), flips.cuda())
        torch.testing.assert_close(got.float().cpu(), expected, atol=1e-5, rtol=1e-4)
        got.square().sum().backward()
        gradients.append(on_gpu.grad)
    assert torch.equal(*gradients)


def logs_of_straight_and_resumed(folder, overrides):
    """The lines of metrics of a run, and of one that stops after three of its six iterations and goes on."""
    logs = []
    for output, stops in (("straight", [None]), ("parts", [3, None])):
        words = [
            f"data.root={folder / 'photos'}",
            f"run.output={folder / output}",
            f"run.device={DEVICE}",
            "run.deterministic=always",
        ]
        config = load_config(None, last([*overrides, *words]))
        for stop in stops:
            train(config, resume="auto" if stop is None else "", stop_after=stop)
        logs.append(
            [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]
        )
    return logs


@pytest.mark.parametrize(
    "extra", [[], ["run.precision=float32"], BASELINE], ids=["bf16", "float32", "baseline"]
)
def test_pretraining_resumes_on_the_gpu(tmp_path, extra):
    write_photos(tmp_path / "photos")
    straight, resumed = logs_of_straight_and_resumed(tmp_path, [*TINY, *extra])
    assert len(straight) == 6 and straight == resumed


@pytest.mark.parametrize("extra", [[], TIED, GRAM], ids=["paka", "tied", "gram"])
def test_post_training_resumes_on_the_gpu(tmp_path, extra):
    write_photos(tmp_path / "photos")
    start = f"backbone.weights={write_start(tmp_path / 'start.safetensors')}"
    straight, resumed = logs_of_straight_and_resumed(tmp_path, [*DENSE, start, *extra])
    assert len(straight) == 6 and straight == resumed
    assert all(math.isfinite(value) for line in straight for value in line.values())


def test_regions_are_those_of_the_cpu_and_their_gradient_is_deterministic():
    patches, flips = torch.randn(8, 196, 32), torch.rand(8) < 0.5
    corners = torch.rand(8, 1, 2) * 0.3
    regions = torch.cat([corners, corners + 0.5], -1)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(8, 4)
    expected = read_regions(patches, (14, 14), boxes, flips, regions, 7, 2)
    gradients = []
    for _ in range(2):
        on_gpu = patches.to(DEVICE, copy=True).requires_grad_()
        got = read_regions(on_gpu, (14, 14), boxes.to(DEVICE), flips.to(DEVICE), regions.to(DEVICE), 7, 2)
        torch.testing.assert_close(got.cpu(), expected, atol=1e-4, rtol=1e-3)
        got.square().sum().backward()
        gradients.append(on_gpu.grad)
    assert torch.equal(*gradients)


def test_the_searches_of_dense_evaluation_are_those_of_the_cpu():
    rows, queries = torch.randn(500, 16), torch.randn(40, 16)
    found = []
    for device in ("cpu", DEVICE):
        memory = Memory(500, 16, 3, torch.device(device))
        memory.add(rows.to(device), torch.ones(500, 3, dtype=torch.int64, device=device))
        found.append(memory.nearest(queries.to(device), 30)[0].cpu())
    torch.testing.assert_close(*found, atol=2e-3, rtol=0)
    labels = [
        kmeans(rows.to(device), 8, torch.Generator().manual_seed(0)).labels.cpu()
        for device in ("cpu", DEVICE)
    ]
    assert (labels[0] == labels[1]).float().mean() > 0.9


CHUNKED_AND_PLAIN = [
    [],
    ["step.checkpointing=full"],
    ["step.checkpointing=selective"],
    ["step.compile=true"],
    BASELINE,
]


@pytest.mark.parametrize("extra", CHUNKED_AND_PLAIN, ids=lambda extra: extra[0] if extra else "method")
def test_a_step_never_waits_for_the_device(extra):
    """In the steady state the host only queues work; and the losses are the plain form's, to bfloat16's
    rounding."""
    config = load_config(None, last([*TINY, "run.device=cuda", *extra]))
    plain = load_config(None, last([*TINY, "run.device=cuda", "step.loss_rows=0", *extra]))
    trainer, reference = Trainer(config, Length(1, 100, 0)), Trainer(plain, Length(1, 100, 0))
    batches = [synthetic_batch(config, it).pin_memory() for it in range(4)]
    for batch in batches[:3]:
        trainer.step([batch]), reference.step([batch])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = trainer.step([batches[3]]).losses
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in reference.step([batches[3]]).losses.items():
        torch.testing.assert_close(losses[name], value, rtol=0.05, atol=0.05)


def test_the_detector_steps_in_mixed_precision():
    recipe = with_overrides(protocol("coco-12ep", "vit_tiny_patch16"), dict(image_size_px=256, channels=64))
    model = (
        build_model(build_backbone("vit_tiny_patch16", depth=2, pos_encoding="field"), recipe).cuda().train()
    )
    masks = torch.zeros(1, 256, 256, dtype=torch.uint8, device="cuda")
    masks[0, 40:120, 30:200] = 1
    boxes = torch.tensor([[30.0, 40, 200, 120]], device="cuda")
    target = {"boxes": boxes, "labels": torch.tensor([7], device="cuda"), "masks": masks}
    image = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        losses = model([image], [target])
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
