"""Checkpoints: exact, whole whenever the process is killed, refused when damaged or hostile, the same over
any number of ranks.

Run as a program, this file is one rank of the tests of the sharded layout: ``test_checkpoint.py save|load
FOLDER RANKS RANK``.
"""

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pretrain.checkpoints import (
    Writer,
    clean,
    consolidate,
    find,
    load,
    load_state,
    newest,
    open_checkpoint,
    save,
    save_sharded,
    save_state,
)
from pretrain.checkpoints import sharded as sharded_layout
from pretrain.checkpoints import writer as single_layout
from pretrain.checkpoints.store import record_of, whole_directories
from pretrain.errors import UserError

META = {"progress": {"img_per_s": 0.1 + 0.2, "broken": ["é.jpg"]}, "n_images": 7}


def state(offset=0.0):
    """Every dtype, empty, 0-dim, strided and shared tensors."""
    x = torch.arange(15.0).reshape(5, 3) / 7 + offset
    return {
        "matrix": x,
        "shared": x,
        "strided": x.t(),
        "float64": torch.tensor([torch.pi, -0.0, float("inf"), 5e-324], dtype=torch.float64),
        "bf16": (x * 3).bfloat16()[:2],
        "half": x[0].half(),
        "step": torch.tensor(2**62 + 1),
        "scalar": torch.tensor(1 / 3 + offset, dtype=torch.float64),
        "small": torch.tensor([[-128, 127]], dtype=torch.int8),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }


SHARDS = {
    "matrix": Shard(0),
    "bf16": Shard(0),
    "strided": Shard(1),
    "float64": Replicate(),
    "shared": Shard(1),
}


def distributed_state(mesh, offset=0.0):
    """:func:`state` with some DTensors: uneven shards, fewer rows than ranks, other dimensions, replicas."""
    return {
        n: distribute_tensor(x.clone(), mesh, [SHARDS[n]]) if n in SHARDS else x
        for n, x in state(offset).items()
    }


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        y = ours[name].full_tensor() if isinstance(ours[name], DTensor) else ours[name]
        assert (y.dtype, y.shape) == (x.dtype, x.shape), name
        assert torch.equal(
            y.contiguous().view(-1).view(torch.uint8), x.contiguous().view(-1).view(torch.uint8)
        ), name


def zeros_like(tensors):
    return {name: torch.zeros_like(x) for name, x in tensors.items()}


def forge(path):
    """What an attacker can do as well: a manifest that fits the files."""
    files = {p.name: record_of(p) for p in path.iterdir() if p.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


@pytest.fixture
def one_rank(tmp_path):
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_every_dtype_round_trips(tmp_path):
    path = save(tmp_path, 12, state(), META, keep=2)
    assert path == tmp_path / "checkpoints" / "it_00000012"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "meta.json", "state.safetensors"]
    assert len({p.stat().st_mode for p in path.iterdir()}) == 1  # who may read one may read all
    found, messages = newest(tmp_path)
    assert (found.path, found.iteration, found.layout, messages) == (path, 12, "single", [])
    assert found.meta == {**META, "iteration": 12, "layout": "single"}
    assert_equal(found.tensors(), state())
    target = zeros_like(state())
    load(found, target)
    assert_equal(target, state())
    assert {n: (e.dtype, e.shape) for n, e in found.contents().items()} == {
        n: (x.dtype, x.shape) for n, x in state().items()
    }


def test_nested_state_round_trips(tmp_path):
    """An optimizer's and a scaler's state, and every type that JSON has no word for."""
    module = torch.nn.Linear(3, 2).double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1 / 3, betas=(0.9, 0.99))
    module(torch.ones(1, 3).double()).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38).state_dict()
    odd = [
        (),
        [],
        {},
        {1: (True, None)},
        "é",
        2**70,
        0.1 + 0.2,
        -0.0,
        float("-inf"),
        {"tensor": "x"},
        {"mapping": 1},
    ]
    given = {
        "n": 3,
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler,
        "odd": odd,
    }
    found = open_checkpoint(save_state(tmp_path, 3, given, keep=1))
    assert found.iteration == 3 and "model.weight" in found.contents()
    again = load_state(found)
    assert again.keys() == given.keys() and repr(again["odd"]) == repr(odd) and again["scaler"] == scaler
    assert repr(again["optimizer"]) == repr(given["optimizer"]) and torch.equal(
        again["model"]["weight"], module.weight
    )
    other = torch.optim.AdamW(module.parameters())
    other.load_state_dict(again["optimizer"])
    for ours, theirs in zip(other.state.values(), optimizer.state.values()):
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    with pytest.raises(AssertionError, match="scaler.0: .*set.* has no place in a checkpoint"):
        save_state(tmp_path, 4, {"scaler": [{1}]}, keep=1)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        {"x": {"tensor": "y"}},
        {"x": {"tensor": []}},
        {"x": {"pickle": "x"}},
        {"x": {}},
        {"x": {"mapping": 3}},
        [],
    ],
)
def test_a_state_that_is_described_wrongly_is_named(tmp_path, bad):
    found = open_checkpoint(save(tmp_path, 1, state(), {"state": bad}, keep=1))
    with pytest.raises(UserError, match="meta.json describes no state"):
        load_state(found)


def test_load_names_what_does_not_fit(tmp_path):
    found = open_checkpoint(save(tmp_path, 1, state(), META, keep=1))
    for name, tensor in [("other", torch.zeros(1)), ("matrix", torch.zeros(3, 5)), ("step", torch.zeros(()))]:
        with pytest.raises(UserError, match=rf"it_00000001.* {name}"):
            load(found, {name: tensor})


def test_keep_prunes_and_a_run_that_went_back_leaves_its_future_behind(tmp_path):
    for iteration in (3, 6, 9):
        save(tmp_path, iteration, state(), META, keep=2)
    assert [p.name for p in whole_directories(tmp_path)] == ["it_00000009", "it_00000006"]
    save(tmp_path, 7, state(1.0), META, keep=2)
    assert [p.name for p in whole_directories(tmp_path)] == ["it_00000007", "it_00000006"]
    save(tmp_path, 7, state(2.0), META, keep=None)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["it_00000006", "it_00000007"]
    assert_equal(newest(tmp_path)[0].tensors(), state(2.0))


class Killed(BaseException):
    """The process ends here."""


def kill_at(patch, step):
    """Let the process end right before its ``step``-th change of the file system; removing a folder is cut
    off half-way."""
    count = iter(range(1, 10**6))

    def counted(module, name, half=lambda *a: None):
        function = getattr(module, name)

        def stop(*arguments, **kwargs):
            if next(count) >= step:
                half(*arguments)
                raise Killed
            return function(*arguments, **kwargs)

        patch.setattr(module, name, stop)

    def half_removed(path, *_):
        for file in sorted(Path(path).glob("*"))[:1]:
            file.unlink()

    def half_written(tensors, path):
        Path(path).write_bytes(b"half")

    for name in ("fsync", "rename", "replace", "mkdir"):
        counted(os, name)
    counted(shutil, "rmtree", half_removed)
    from pretrain.checkpoints import tensors

    counted(tensors, "save_file", half_written)


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize(
    "iterations, keep",
    [((4,), 1), ((2, 4), 1), ((4, 6), 2), ((6,), 1)],
    ids=["first", "prune", "keep", "again"],
)
def test_killed_at_any_step_leaves_a_whole_one(tmp_path, request, layout, iterations, keep):
    if layout == "sharded":
        request.getfixturevalue("one_rank")
    write = save if layout == "single" else save_sharded
    for step in range(1, 100):
        folder = tmp_path / str(step)
        for iteration in iterations:
            save(folder, iteration, {"x": torch.tensor([float(iteration)])}, META, keep)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step)
            try:
                write(folder, 6, {"x": torch.tensor([60.0])}, META, keep)
                finished = True
            except (Killed, RuntimeError):  # DCP wraps whatever a rank raises
                finished = False
        found, messages = newest(folder)
        assert messages == [] and found.tensors()["x"].item() in (
            (60.0,) if finished else (float(iterations[-1]), 60.0)
        )
        assert all(open_checkpoint(path) for path in whole_directories(folder))  # no .tmp in the name: whole
        clean(folder)
        assert not list(folder.glob("checkpoints/*.tmp"))
        assert_equal(newest(folder)[0].tensors(), found.tensors())
        write(folder, 8, {"x": torch.tensor([80.0])}, META, keep)
        assert len(os.listdir(folder / "checkpoints")) <= keep
        assert newest(folder)[0].tensors()["x"].item() == 80
        if finished:
            break
    assert finished and step > 10


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_damaged_file_is_named_and_the_one_before_is_taken(tmp_path, request, layout):
    mesh = request.getfixturevalue("one_rank") if layout == "sharded" else None
    save(tmp_path, 1, {"x": torch.zeros(2)}, META, keep=2)
    path = (
        save(tmp_path, 2, state(), META, keep=2)
        if mesh is None
        else save_sharded(tmp_path, 2, distributed_state(mesh), META, keep=2)
    )
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        every = range(len(good)) if file.name == "manifest.json" else (0, len(good) // 2, len(good) - 1)
        damaged = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in every] + [good[:-1], b"", None]
        for data in damaged:
            file.unlink() if data is None else file.write_bytes(data)
            found, messages = newest(tmp_path)
            assert found.iteration == 1 and len(messages) == 1
            assert (file.name if file.name != "manifest.json" else str(path)) in messages[0]
            with pytest.raises(UserError, match="it_00000002"):
                find(tmp_path, "2")
            file.write_bytes(good)
    assert newest(tmp_path)[0].iteration == 2


def test_find_takes_what_is_asked_for(tmp_path):
    assert find(tmp_path / "none") == (None, [])
    for iteration in (1, 2):
        save(tmp_path / "run", iteration, state(), META, keep=2)
    first = tmp_path / "run" / "checkpoints" / "it_00000001"
    shutil.copytree(first, first.with_name("it_00000003.tmp"))
    assert find(tmp_path / "run")[0].iteration == 2
    for which in ("1", str(first)):
        assert find(tmp_path / "run", which)[0].path == first
    assert find(tmp_path / "other", str(tmp_path / "run"))[0].iteration == 2
    (tmp_path / "run" / "checkpoints" / "it_00000002" / "meta.json").unlink()
    assert "it_00000002/meta.json is missing" in find(tmp_path / "run")[1][0]
    (first / "meta.json").unlink()
    for which, named in [
        ("3", "it_00000003"),
        ("1", "it_00000001/meta.json"),
        (str(tmp_path / "run"), "it_00000002/meta.json.*it_00000001/meta.json"),
        (str(first.with_name("it_00000003.tmp")), r"it_00000003\.tmp was never finished"),
        (str(tmp_path), "manifest.json cannot be read as JSON"),
    ]:
        with pytest.raises(UserError, match=named):
            find(tmp_path / "run", which)


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_malicious_pickle_is_refused_wherever_it_lies(tmp_path, one_rank):
    marker, run = tmp_path / "executed", tmp_path / "run"
    pickle.loads(pickle.dumps(Evil(tmp_path / "control")))
    assert (tmp_path / "control").is_dir()  # it does bite
    evil = pickle.dumps(Evil(marker))
    torch.save(Evil(marker), tmp_path / "evil.pt")
    for write in (save, save_sharded):
        for name in [p.name for p in write(run, 1, state(), META, 1).iterdir()]:
            for bad in (evil, (tmp_path / "evil.pt").read_bytes()):
                for forged in (False, True):
                    shutil.rmtree(run)
                    path = write(run, 1, state(), META, 1)
                    (path / name).write_bytes(bad)
                    if forged and name != "manifest.json":
                        forge(path)
                    found, messages = newest(run)
                    if found is None:
                        assert name in messages[0]
                        continue
                    with pytest.raises(
                        UserError, match=name
                    ):  # a shard is not opened before its values are asked for
                        found.tensors()
                    for target in (
                        torch.zeros(5, 3),
                        distribute_tensor(torch.zeros(5, 3), one_rank, [Shard(0)]),
                    ):
                        with pytest.raises(UserError, match=name):
                            load(found, {"matrix": target})
    theirs = tmp_path / "run" / "checkpoints" / "it_00000009"
    dcp.save({"x": torch.ones(2)}, checkpoint_id=theirs)
    for name in [".metadata", "__0_0.distcp"]:
        (theirs / name).write_bytes(evil)
        for meta in (None, {"iteration": 9, "layout": "sharded"}, {"iteration": 9, "layout": "single"}):
            if meta is not None:
                (theirs / "meta.json").write_text(json.dumps(meta))
                forge(theirs)
            with pytest.raises(UserError, match="it_00000009"):
                open_checkpoint(theirs)
        for file in ("meta.json", "manifest.json"):
            (theirs / file).unlink()
    (run / "checkpoint.pt").write_bytes(evil)
    with pytest.raises(UserError, match="checkpoint.pt"):
        find(run, str(run / "checkpoint.pt"))
    assert not marker.exists()


def raw_safetensors(header, n_bytes=16, length=None):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(n_bytes)


HEADERS = {
    "huge": raw_safetensors({}, length=2**63 - 1),
    "longer": raw_safetensors({}, length=2**20),
    "overlap": raw_safetensors({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "xy"}, 8),
    "outside": raw_safetensors({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "too little": raw_safetensors({"x": {"dtype": "F32", "shape": [4096], "data_offsets": [0, 16]}}),
    "overflow": raw_safetensors({"x": {"dtype": "F32", "shape": [2**62, 16], "data_offsets": [0, 16]}}),
    "no JSON": struct.pack("<Q", 8) + b"\x80\x04xxxxxx" + bytes(16),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_safetensors_header_is_refused(tmp_path, kind):
    path = save(tmp_path, 1, state(), META, keep=1)
    (path / "state.safetensors").write_bytes(HEADERS[kind])
    forge(path)
    with pytest.raises(SafetensorError), safe_open(path / "state.safetensors", "pt") as file:
        file.get_tensor("x")
    found, messages = newest(tmp_path)
    assert found is None and "state.safetensors" in messages[0]
    with pytest.raises(UserError, match="state.safetensors"):
        open_checkpoint(path).tensors()


@pytest.mark.parametrize(
    "change",
    [
        {"pieces": []},
        {"shape": [2**50, 3]},
        {"shape": [-5, 3]},
        {"shape": "5"},
        {"dtype": "os.system"},
        {"dtype": "F16"},
        {"dtype": ["F32"]},
        {"file": "../../../secret.safetensors"},
        {"file": "/secret.safetensors"},
        {"file": ["a"]},
        {"offsets": [-1, 0]},
        {"offsets": [1, 0]},
        {"offsets": [0]},
        {"offsets": [0.0, 0]},
        {"key": "step@"},
        {"key": 5},
    ],
    ids=str,
)
def test_a_hostile_index_is_refused(tmp_path, one_rank, change):
    path = save_sharded(tmp_path, 1, distributed_state(one_rank), META, keep=1)
    index = json.loads((path / "index.json").read_text())
    where = index["matrix"] if change.keys() & {"pieces", "shape", "dtype"} else index["matrix"]["pieces"][0]
    where.update(change)
    (path / "index.json").write_text(json.dumps(index))
    forge(path)
    found, messages = newest(tmp_path)
    if found is None:
        assert "index.json" in messages[0] and "matrix" in messages[0]
    else:
        with pytest.raises(UserError, match="safetensors"):
            found.tensors()


def test_a_full_disk_names_the_folder_and_leaves_the_one_before(tmp_path, request):
    save(tmp_path, 1, state(), META, keep=1)
    request.getfixturevalue("one_rank")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"x": torch.zeros(100_000)}
    background = Writer(tmp_path, keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for write in (save, save_sharded):
            with pytest.raises(OSError, match="it_00000002 cannot be written.*too large"):
                write(tmp_path, 2, large, META, 1)
            assert os.listdir(tmp_path / "checkpoints") == ["it_00000001"]
        background.save(2, large, META)
        with pytest.raises(OSError, match="it_00000002 cannot be written"):
            background.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    background.wait()  # said once
    assert_equal(newest(tmp_path)[0].tensors(), state())


def test_in_background_equals_in_foreground(tmp_path, monkeypatch):
    """The values are those of the moment of save(), however late they are written; never two at a time."""
    go, written, order = threading.Event(), single_layout.write_tensors, []

    def slow(path, tensors):
        order.append(("begin", path.parent.name))
        assert go.wait(20)
        record = written(path, tensors)
        order.append(("end", path.parent.name))
        return record

    monkeypatch.setattr(single_layout, "write_tensors", slow)
    tensors = {name: x.clone() for name, x in state().items()}
    writer = Writer(tmp_path / "late", keep=5)
    writer.save(1, tensors, META)
    for x in tensors.values():
        x.zero_()
    assert newest(tmp_path / "late") == (None, [])
    go.set()
    writer.save(2, tensors, META)  # waits for the first
    writer.wait()
    assert [at for at, _ in order] == ["begin", "end"] * 2
    Writer(tmp_path / "now", keep=5, in_background=False).save(1, state(), META)
    for name in ("state.safetensors", "meta.json", "manifest.json"):
        late, now = (tmp_path / run / "checkpoints" / "it_00000001" / name for run in ("late", "now"))
        assert late.read_bytes() == now.read_bytes()
    assert_equal(newest(tmp_path / "late")[0].tensors(), zeros_like(state()))


def test_a_writer_removes_what_a_killed_run_left(tmp_path):
    save(tmp_path, 1, state(), META, keep=1)
    (tmp_path / "checkpoints" / "it_00000002.tmp").mkdir()
    (tmp_path / "checkpoints" / "it_00000002.tmp" / "state.safetensors").write_bytes(b"half")
    Writer(tmp_path, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["it_00000001"]


def ranks(n, action, folder):
    """Run this file as ``n`` gloo ranks."""
    env, pipes = (
        {**os.environ, "OMP_NUM_THREADS": "1"},
        {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
    )
    started = [
        subprocess.Popen([sys.executable, __file__, action, str(folder), str(n), str(rank)], env=env, **pipes)
        for rank in range(n)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in started:
            process.kill()


def test_shards_of_two_ranks_are_read_by_one_two_and_three(tmp_path, one_rank):
    save(tmp_path / "single", 1, state(), META, keep=1)
    ranks(2, "save", tmp_path)
    ranks(3, "load", tmp_path)
    found = open_checkpoint(tmp_path / "sync" / "checkpoints" / "it_00000004")
    assert found.layout == "sharded" and found.meta == {**META, "iteration": 4, "layout": "sharded"}
    assert {p.name for p in found.path.glob("*.safetensors")} == {
        f"shard_0000{rank}.safetensors" for rank in range(2)
    }
    assert_equal(found.tensors(), state())
    for target in (
        zeros_like(state()),
        {n: torch.zeros_like(x) for n, x in distributed_state(one_rank).items()},
    ):
        load(found, target)
        assert_equal(target, state())
    assert_equal(newest(tmp_path / "late")[0].tensors(), state())
    for folder in (tmp_path / "one_file", tmp_path / "sync"):
        path = consolidate(found, folder)
        assert path.name == "it_00000004" and sorted(os.listdir(path)) == [
            "manifest.json",
            "meta.json",
            "state.safetensors",
        ]
        again = newest(folder)[0]
        assert again.layout == "single" and again.meta == {**META, "iteration": 4, "layout": "single"}
        assert_equal(again.tensors(), state())


def as_rank(action, folder, n, rank):
    """What each rank does: save shards, now and in the background; load them and a single file into other
    shards."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous_{action}", rank=rank, world_size=n
    )
    mesh = init_device_mesh("cpu", (n,))
    if action == "save":
        for iteration in (2, 4):
            save_sharded(folder / "sync", iteration, distributed_state(mesh), META, keep=1)
        writer = Writer(folder / "late", keep=1, is_sharded=True)
        tensors, zeroed = distributed_state(mesh), threading.Event()
        written = sharded_layout.write_tensors
        sharded_layout.write_tensors = lambda *arguments: zeroed.wait(20) and written(*arguments)
        writer.save(1, tensors, META)
        for x in tensors.values():
            (x.to_local() if isinstance(x, DTensor) else x).zero_()
            dist.barrier()  # the training's own collectives, meanwhile
        assert newest(folder / "late") == (None, [])
        zeroed.set()
        writer.wait()
        if rank == 1:  # one rank cannot write: all are told, and the main process's files go
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with pytest.raises(OSError, match="it_00000006 cannot be written"):
            save_sharded(folder / "sync", 6, distributed_state(mesh), META, keep=1)
        dist.barrier()
        assert os.listdir(folder / "sync" / "checkpoints") == ["it_00000004"]
    for run in ("sync", "late", "single"):
        found, messages = find(folder / run)
        assert found is not None and messages == []
        for target in (distributed_state(mesh, offset=9.0), zeros_like(state())):
            load(found, target)
            assert_equal(target, state())
    with pytest.raises(UserError, match="it_00000007"):
        find(folder / "sync", "7")
    dist.destroy_process_group()


if __name__ == "__main__":
    as_rank(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
