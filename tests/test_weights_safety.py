"""Files from strangers: nothing in them runs, memory stays bounded, and each is read or refused in one line
that names it.

``python tests/test_weights_safety.py LIST`` reads the files of a list in a process of its own and prints what
came of each.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_weights import (
    EITHER,
    NAME,
    READ,
    REFUSED,
    Pickled,
    flax,
    hexed,
    odd_storages,
    our_metadata,
    pickles,
    rewritten,
    safetensors_bytes,
    state_dict,
    tensor_at,
    torch_bytes,
    write_hostile_files,
    zips,
)
from safetensors.torch import save_file

from pretrain.build import build_backbone
from pretrain.errors import UserError
from pretrain.results.provenance import file_hash
from pretrain.weights import read_checkpoint, save_backbone

MAX_RESIDENT_MB = 400  # above the imported libraries; the largest hostile file has 64 MB
MAX_ADDRESSED_MB = 2048  # likewise, by RLIMIT_AS
HANG_S = 120  # a guard, not a speed


def read_all(path):
    """In a process of its own: what comes of every file of a list, and the memory that it takes, as JSON
    on stdout."""
    folder, names = json.loads(Path(path).read_text())
    outcomes = {}
    build_backbone(NAME, weights=Path(folder, "good.pth"))  # what is loaded at the first use does not count
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "linux":
        addressed = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (addressed + (MAX_ADDRESSED_MB << 20),) * 2)
    for name in names:
        try:
            build_backbone(NAME, weights=Path(folder, name))
            outcomes[name] = READ
        except UserError as error:
            outcomes[name] = f"{REFUSED}: {error}"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    print(json.dumps({"outcomes": outcomes, "peak_mb": peak_mb}))


def in_a_process(folder, names, list_file):
    list_file.write_text(json.dumps([str(folder), names]))
    command = [sys.executable, "-W", "ignore", __file__, str(list_file)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    return subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_S, env=environment, cwd=list_file.parent
    )


@pytest.mark.filterwarnings("ignore")  # torch's, of sparse and quantized tensors
def test_hostile_files(tmp_path):
    expected = write_hostile_files(tmp_path / "files")
    assert len(expected) > 250
    done = in_a_process(tmp_path / "files", list(expected), tmp_path / "list.json")
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    assert done.stdout.count("\n") == 1  # nothing in a file ran, nothing is said aside
    told = json.loads(done.stdout)
    outcomes = told["outcomes"]
    wrong = {
        name: outcomes[name]
        for name, e in expected.items()
        if not outcomes[name].startswith((READ, REFUSED) if e == EITHER else e)
    }
    assert not wrong
    refusals = {name: outcome for name, outcome in outcomes.items() if outcome.startswith(REFUSED)}
    assert not {name: outcome for name, outcome in refusals.items() if "\n" in outcome or len(outcome) > 1500}
    assert not {
        name: outcome
        for name, outcome in refusals.items()
        if name.split("/")[-1] not in outcome and "\0" not in name
    }
    assert not any("MemoryError" in outcome for outcome in outcomes.values())
    if sys.platform == "linux":
        assert told["peak_mb"] < MAX_RESIDENT_MB


@pytest.mark.parametrize(
    "content, named",
    [
        (Pickled(os.system, "echo ran"), r"posix\.system"),
        (Pickled(bytearray, 8), "bytearray"),
        (hexed(3), "encodes bytes as hex"),
        (np.zeros(3), r"_reconstruct"),
    ],
)
def test_what_is_no_data_is_named(tmp_path, content, named):
    torch.save({"a": content}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a\.pth.*{named}"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_numbers_become_float32(tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        read = read_checkpoint(tmp_path / name).state
        assert all(
            value.dtype == torch.float32 and torch.equal(value, state[key].float())
            for key, value in read.items()
        )


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_zip_is_mapped_and_not_read(tmp_path):
    """Of a full checkpoint only the network that is wanted costs memory: the rest is never touched."""
    path = tmp_path / "full.pth"
    torch.save({"model": state_dict(), "optimizer": {"exp_avg": torch.zeros(1 << 20)}}, path)
    checkpoint = read_checkpoint(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    del checkpoint
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "make, name, named",
    [
        (zips, "bomb.pth", "is compressed"),
        (zips, "lying_directory.pth", "more bytes than it has"),
        (zips, "twice.pth", "a record twice"),
        (zips, "program.pt", "TorchScript"),
        (odd_storages, "short.pth", r"short\.pth: record data/\d+ has 764 bytes, the tensor in it 768; copy"),
        (odd_storages, "doubles.pth", r"record data/0 has 768 bytes, the tensor in it 1536; copy"),
        (odd_storages, "no_record.pth", r"record data/3 is missing; copy"),
        (odd_storages, "supplement.pth", "more bytes than it has"),
        (odd_storages, "renamed.pth", "names a storage as torch never does"),
        (flax, "flax_negative_chunks", "chunks of 4 numbers for an array"),
        (pickles, "expanded.pth", r"blocks\.0\.extra declares \(1099511627776,\)"),
        (pickles, "doubled.pth", "a tuple of more than 1000 items"),
        (pickles, "numpy_V.pth", r"no checkpoint of plain tensors \(KeyError\)"),
        (pickles, "shared.pth", "declares tensors of 1048576000"),
        (flax, "flax_arrays", "exceeds max_array_len"),
        (flax, "flax_map", "exceeds max_map_len"),
        (flax, "flax_items_of_items", "more than 1000000 items"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, of sparse and quantized tensors
def test_what_is_wrong_is_named(tmp_path, make, name, named):
    content = next(content for found, content, _ in make() if found == name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=named):
        read_checkpoint(tmp_path / name)


def test_a_file_of_ours_still_flows(tmp_path):
    vit = build_backbone(NAME, depth=1, mask_tokens=True)
    path = save_backbone(
        tmp_path / "b.safetensors", vit.state_dict(), name=NAME, model_kwargs=vit.model_kwargs
    )
    folder = tmp_path / "run"
    folder.mkdir()
    path.rename(folder / "backbone.safetensors")
    for place in (folder, folder / "backbone.safetensors"):
        again = build_backbone(NAME, weights=place, mask_tokens=True)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("method", ["a\nb", "a" * 256, 3, None])
def test_a_method_is_a_line(tmp_path, method):
    vit = build_backbone(NAME, depth=1)
    path = save_backbone(
        tmp_path / "b.safetensors",
        vit.state_dict(),
        name=NAME,
        model_kwargs=vit.model_kwargs,
        provenance={"method": method},
    )
    if method is None:
        assert read_checkpoint(path).provenance["method"] is None
        return
    with pytest.raises(UserError, match=r"b\.safetensors has damaged metadata \(method") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "content", [{"a": torch.zeros(1)}, Pickled(os.system, "true")], ids=["read", "refused"]
)
def test_what_others_allow_stays_allowed(tmp_path, content):
    torch.serialization.add_safe_globals([np.dtype])  # as seg_plugin.compat does
    before = set(torch.serialization.get_safe_globals())
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before and np.dtype in before


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("has_cls", "yes", "neither true nor false"),
        ("has_cls", None, "neither true nor false"),
        ("relative_positions", 1, "neither true nor false"),
        ("mask_tokens", "a", "neither true nor false"),
        ("layerscale", "x", "no number"),
        ("layerscale", float("nan"), "not between"),
        ("layerscale", 10**400, "not between"),
        ("drop_path", 10**400, "not between"),
        ("drop_path", True, "no number"),
        ("mlp_ratio", True, "no size"),
        ("gelu", ["erf"], "no name"),
        ("attention", {}, "no name"),
    ],
)
def test_a_flag_of_a_wrong_type_or_size_is_named(tmp_path, key, value, named):
    (tmp_path / "a.safetensors").write_bytes(our_metadata(**{key: value}))
    with pytest.raises(UserError, match=rf"a\.safetensors: {key} of .{{1,60}} .*{named}") as error:
        read_checkpoint(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "dtype, n_bytes", [("F8_E4M3", 16), ("F8_E5M2", 16), ("F8_E8M0", 16), ("F6_E2M3", 12), ("F4", 8)]
)
def test_a_small_float_type_is_named(tmp_path, dtype, n_bytes):
    header = {"blocks": tensor_at(0, n_bytes, (16,), dtype)}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, bytes(n_bytes)))
    with pytest.raises(UserError, match=rf"a\.safetensors: blocks is of the type {dtype}, .* save it as F32"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_a_name_with_line_breaks_stays_in_one_line(tmp_path):
    overlapping = {"a\nb": tensor_at(0, 16), "c\r\nd": tensor_at(8, 32, (6,))}
    files = {"a.safetensors": safetensors_bytes(overlapping, bytes(32))}
    files["record.pth"] = rewritten(torch_bytes({}), renamed=("version", "x\ny.npy"))
    files["nested.pth"] = torch_bytes({"student": {"e\nf": torch.zeros(1)}, "g\x1b\nh": 1})
    index = {"weight_map": {"i\nj": "k\nl.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            read_checkpoint(tmp_path / name)
        told = str(error.value)
        assert told.isprintable() and told.startswith("weights: ") and str(tmp_path) in told


def shuffled(path, order):
    """The file as safetensors' library may have written it: its metadata in another order."""
    data = path.read_bytes()
    n_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n_bytes])
    told = header.pop("__metadata__")
    text = json.dumps(
        {"__metadata__": {key: told[key] for key in order}} | header, separators=(",", ":")
    ).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n_bytes :])


def test_file_hash_knows_no_order_of_metadata(tmp_path):
    file, state = tmp_path / "a.safetensors", {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    keys = ["format", "format_version", "backbone", "flags", "provenance"]
    written = set()
    for _ in range(20):
        save_backbone(file, state, name="ü\n", model_kwargs={"depth": 1}, provenance={"method": "é"})
        written.add(file.read_bytes())
    assert len(written) == 1  # files of one state are equal to the byte
    own, old = file_hash(file), set()
    assert own == hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    for order in (keys, keys[::-1], keys[2:] + keys[:2]):
        shuffled(file, order)
        old.add(as_it_is := hashlib.sha256(file.read_bytes()).hexdigest()[:12])
        assert file_hash(file) == own != as_it_is
        assert file_hash(file, as_it_is) == as_it_is and file_hash(file, "another") == own
        (tmp_path / "result.json").write_text(json.dumps({"weights_hash": as_it_is}))
        assert file_hash(file) == as_it_is  # of an earlier version: its results still join
        (tmp_path / "result.json").unlink()
    assert len(old) == 3
    save_file(state, file, metadata={"format": "pt"})  # of another library: the bytes, as ever
    assert file_hash(file) == hashlib.sha256(file.read_bytes()).hexdigest()[:12] != own
    save_file({**state, "b": torch.zeros(2, 2)}, file, metadata={"z": "1", "a": "2"})
    assert file_hash(file) not in (own, *old)


if __name__ == "__main__":
    read_all(sys.argv[1])


def test_a_file_that_says_an_unknown_backbone_is_named(tmp_path):
    vit = build_backbone(NAME, depth=1)
    told = dict(name="vit\nof nobody", model_kwargs=vit.model_kwargs, provenance={})
    path = save_backbone(tmp_path / "b.safetensors", vit.state_dict(), **told)
    with pytest.raises(
        UserError, match=r"b\.safetensors says that it is a 'vit\\nof nobody', which is not reg"
    ):
        build_backbone(None, weights=path)
