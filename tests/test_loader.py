"""From files to batches: streams of random numbers, parts of a batch, workers, both data paths; and the
benchmark's measure."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from photos import TINY, last, write_photos

from pretrain.benchmark.data import measure
from pretrain.config import load_config
from pretrain.data.loader import Decoded, Sample, build_dataset, build_loader
from pretrain.data.sampler import ORDER, SampleIndices, generator
from pretrain.errors import UserError
from pretrain.settings import replaced
from pretrain.views.batch import Batch
from pretrain.views.device_pixels import CanvasBatch
from pretrain.views.masks import MaskSettings
from pretrain.views.records import Record


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos", n=12)


def settings(photos, *extra):
    return load_config(None, last([*TINY, f"data.root={photos}", "optim.batch_size=6", *extra]))


def batches(config, end_iter=2):
    return list(build_loader(config, build_dataset(config), 0, end_iter))


def tensors(record, prefix=""):
    """All tensors of a batch by name."""
    found = {}
    for name, value in vars(record).items():
        if isinstance(value, torch.Tensor):
            found[prefix + name] = value
        elif isinstance(value, Record):
            found |= tensors(value, f"{prefix}{name}.")
    return found


def assert_equal(a, b):
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys() and len(one) >= 11
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("path", ["cpu", "device"])
def test_workers_change_nothing(photos, path):
    alone = batches(settings(photos, f"data.path={path}"))
    for n in (1, 2):
        for (a, _), (b, _) in zip(
            alone, batches(settings(photos, f"data.path={path}", f"data.workers={n}")), strict=True
        ):
            a, b = (
                a.to(torch.device("cpu")),
                b.to(torch.device("cpu")),
            )  # a canvas is undefined beside its images
            assert_equal(a, b)


def one_crop_batches(config, masks):
    """Of one global crop an image and no local ones, as MAE's."""
    dataset = build_dataset(config)
    crops = replaced(dataset.rules.crops, {"n_global": 1, "n_local": 0})
    dataset.rules = replace(dataset.rules, crops=crops, masks=masks)
    return [batch for batch, _ in build_loader(config, dataset, 0, 2)]


@pytest.mark.parametrize("path", ["cpu", "device"])
@pytest.mark.parametrize(
    "masks",
    [None, MaskSettings(content_share=1, position_share=0, ratio=(0.75, 0.75), content_shape="random")],
    ids=["none", "mae"],
)
def test_one_crop_an_image(photos, path, masks):
    """Its box, flip and masks are the same in any number of workers and parts; without masks there are
    none."""
    whole = one_crop_batches(settings(photos, f"data.path={path}"), masks)
    workers = one_crop_batches(settings(photos, f"data.path={path}", "data.workers=2"), masks)
    parts = one_crop_batches(settings(photos, f"data.path={path}", "step.accumulate=3"), masks)
    assert len(whole) == len(workers) == 2 and len(parts) == 6
    for it, (a, b) in enumerate(zip(whole, workers)):
        a, b, *own = (batch.to(torch.device("cpu")) for batch in (a, b, *parts[3 * it : 3 * it + 3]))
        assert (
            a.global_crops.shape == (6, 3, 64, 64)
            and a.local_crops.shape == (0, 3, 32, 32)
            and a.views.boxes.shape == (6, 1, 4)
        )
        assert tensors(a).keys() == tensors(b).keys()
        assert all(torch.equal(value, tensors(b)[name]) for name, value in tensors(a).items())
        assert torch.equal(torch.cat([part.views.boxes for part in own]), a.views.boxes)
        torch.testing.assert_close(
            torch.cat([part.global_crops for part in own]), a.global_crops, rtol=0, atol=0
        )
        if masks is None:
            assert all(batch.masks is None for batch in (a, b, *own))
        else:
            assert (a.masks.content.sum(1) == 12).all()
            assert torch.equal(torch.cat([part.masks.content for part in own]), a.masks.content)


def test_a_batch_sends_few_shared_files(photos):
    """Pickled as a worker does: small tensors by value, large ones shared, all equal and in one piece with
    their records."""
    batch, _ = batches(settings(photos, "data.path=device"), 1)[0]
    again = pickle.loads(pickle.dumps(batch))
    assert_equal(batch, again)
    assert again.views.n_global == 2 and again.rule == batch.rule
    state = batch.masks.__getstate__()
    assert all(isinstance(value, np.ndarray) for value in state.values())


def test_the_paths_hand_over_bytes_or_images(photos):
    (on_cpu, _), (on_device, _) = (
        batches(settings(photos, f"data.path={path}"), 1)[0] for path in ("cpu", "device")
    )
    assert isinstance(on_cpu, Batch) and on_cpu.global_crops.dtype == on_cpu.local_crops.dtype == torch.uint8
    assert isinstance(on_device, CanvasBatch) and on_device.canvas.shape == (
        6,
        96,
        96,
        3,
    )  # 70 x 90 px, in steps of 32
    a, b = on_cpu.to(torch.device("cpu")), on_device.to(torch.device("cpu"))
    assert torch.equal(a.views.boxes, b.views.boxes) and torch.equal(a.masks.position, b.masks.position)
    assert (a.global_crops - b.global_crops).abs().mean() * 0.23 * 255 < 0.5
    auto = build_dataset(settings(photos))  # TINY's run.device is the CPU
    assert isinstance(auto[0], Sample) and isinstance(
        build_dataset(settings(photos, "data.path=device"))[0], Decoded
    )


def test_the_device_path_bounds_the_images(tmp_path):
    photos = write_photos(tmp_path / "large", n=1, size=(1000, 600))
    sides = [
        ("cpu", 0, (600, 1000)),
        ("device", 0, (307, 512)),
        ("device", 100, (60, 100)),
        ("cpu", 100, (60, 100)),
    ]
    for path, side, size in sides:
        dataset = build_dataset(settings(photos, f"data.path={path}", f"data.max_side_px={side}"))
        assert dataset.read(0)[0].shape == (*size, 3)


def test_parts_of_a_batch_are_its_rows(photos):
    whole = [batch for batch, _ in batches(settings(photos))]
    parts = [batch for batch, _ in batches(settings(photos, "step.accumulate=3"))]
    assert len(whole) == 2 and len(parts) == 6 and all(part.n_images == 2 for part in parts)
    for it, batch in enumerate(whole):
        for number, part in enumerate(parts[3 * it : 3 * it + 3]):
            rows = slice(2 * number, 2 * number + 2)
            assert torch.equal(part.views.boxes, batch.views.boxes[rows])
            for a, b in ((part.global_crops, batch.global_crops), (part.local_crops, batch.local_crops)):
                assert torch.equal(a.unflatten(0, (-1, 2)), b.unflatten(0, (-1, 6))[:, rows])
            for kind in ("content", "position"):
                mask = getattr(batch.masks, kind).unflatten(0, (2, 6))[:, rows].flatten(0, 1)
                assert torch.equal(getattr(part.masks, kind), mask)
                assert torch.equal(getattr(part.masks, f"{kind}_index"), mask.flatten().nonzero()[:, 0])


def test_ranks_and_parts_cover_a_batch_once():
    indices = [list(SampleIndices(3, 5, 12, rank, 2, n_micro_batches=3)) for rank in (0, 1)]
    assert indices[0][:3] == [[36, 37], [38, 39], [40, 41]] and indices[1][:3] == [
        [42, 43],
        [44, 45],
        [46, 47],
    ]
    assert len(SampleIndices(3, 5, 12, 0, 2, n_micro_batches=3)) == len(indices[0]) == 6


def test_parts_must_divide_the_share(photos):
    config = settings(photos, "step.accumulate=4")
    with pytest.raises(UserError, match=r"step\.accumulate=4"):
        build_loader(config, build_dataset(config), 0, 1)


def test_pixels_do_not_change_with_the_augmentation_of_positions(photos):
    """Boxes, flips and colors have their own numbers: an ablation of positions sees the same crops."""
    on, off = (batches(settings(photos, f"positions.augment={flag}"), 1)[0][0] for flag in ("true", "false"))
    assert torch.equal(on.global_crops, off.global_crops) and torch.equal(on.local_crops, off.local_crops)
    assert torch.equal(on.views.boxes, off.views.boxes) and not torch.equal(
        on.views.position_boxes, off.views.position_boxes
    )


def test_streams_are_apart():
    """Every seed, stream and position has its own numbers, the same each time."""
    first = {
        (s, k, p): generator(s, k, p).random(4).tobytes()
        for s in (0, 1, 2**31)
        for k in (ORDER, 2, 3, 4)
        for p in (0, 1, 2**40)
    }
    assert len(set(first.values())) == len(first)
    assert generator(1, 2, 3).random(4).tobytes() == generator(1, 2, 3).random(4).tobytes()
    long = generator(0, 2, 0).random(100_000)
    assert not np.isin(
        generator(0, 2, 1).random(100), long
    ).any()  # no position runs into the next one's numbers


def test_unreadable_images_are_replaced_by_drawn_ones(photos):
    names = sorted(p.name for p in photos.iterdir())
    (photos / names[4]).write_bytes(b"no picture")
    dataset = build_dataset(settings(photos))
    position = next(p for p in range(12) if dataset.order.image(p) == 4)
    image, broken = dataset.read(position)
    assert len(broken) == 1 and broken[0].startswith(names[4]) and "(" in broken[0]
    assert np.array_equal(
        image, build_dataset(settings(photos)).read(position)[0]
    )  # the same substitute every time
    pictures = [
        dataset.read(next(p for p in range(12) if dataset.order.image(p) == i))[0]
        for i in range(12)
        if i != 4
    ]
    assert sum(np.array_equal(image, picture) for picture in pictures) == 1
    listed = [name for _, unreadable in batches(settings(photos)) for name in unreadable]
    assert listed == list(broken)
    for name in names:
        (photos / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match="16 images in a row"):
        dataset.read(0)


def test_the_benchmark_measures_every_contender():
    figures = measure(rounds=1, batch=1, images_a_turn=2)
    assert {
        f"{name}_img_per_s" for name in ("decode", "torchvision", "cpu", "device_worker", "device_render")
    } < set(figures)
    assert all(figures[name] > 0 for name in figures if name.endswith("img_per_s"))
    assert (
        figures["cpu_ratio"] > 0 and figures["device_worker_ratio"] > 0
    )  # the bounds are `tools/benchmark.py data`'s
