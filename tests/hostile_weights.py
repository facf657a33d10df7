"""Hostile files of weights, by kind: (name, content, what should come of it)."""

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import msgpack
import numpy as np
import torch
from safetensors.torch import save

from pretrain.build import build_backbone
from pretrain.weights.limits import MAX_HEADER_BYTES, MAX_JSON_BYTES, MAX_PICKLE_BYTES

NAME = "vit_tiny_patch16"
READ, REFUSED, EITHER = "read", "refused", "either"


def state_dict():
    """Of timm's layout."""
    return build_backbone(NAME, depth=1, pos_encoding="standard", pos_grid=2).state_dict()


def torch_bytes(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


class Pickled:
    """Any call in a pickle."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


# Zips


def rewritten(
    data, edit=lambda name, content: content, compression=zipfile.ZIP_STORED, absent=(), renamed=("", "")
):
    """A torch file with its records edited, compressed, or without some."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            if name not in absent:
                new.writestr(name.replace(*renamed), edit(name, old.read(name)))
    return file.getvalue()


def directory_edited(data, edit):
    """The same records under another directory."""
    file = io.BytesIO(data)
    with zipfile.ZipFile(file, "a") as archive:
        edit(archive.filelist)
        archive._didModify = True
    return file.getvalue()


def lying_directory(records):
    largest = max(records, key=lambda record: record.file_size)
    largest.file_size = largest.compress_size = 1 << 40


def overlapping(records):
    for record in records:
        if "/data/" in record.filename:
            record.header_offset = records[0].header_offset


def twice(records):
    records.append(records[-1])


def numel_edited(name, content):
    """12345 elements become 2^30 in the structure; the record stays."""
    return (
        content.replace(struct.pack("<BH", 0x4D, 12345), struct.pack("<Bi", 0x4A, 1 << 30))
        if name.endswith(".pkl")
        else content
    )


def zips():
    good = torch_bytes(state_dict())
    yield "good.pth", good, READ
    yield "compressed.pth", rewritten(good, compression=zipfile.ZIP_DEFLATED), REFUSED
    zeros = torch_bytes({"cls_token": torch.zeros(16 << 20)})
    yield "bomb.pth", rewritten(zeros, compression=zipfile.ZIP_DEFLATED), REFUSED
    for edit in (lying_directory, overlapping, twice):
        yield f"{edit.__name__}.pth", directory_edited(good, edit), REFUSED
    yield "numel.pth", rewritten(torch_bytes({"cls_token": torch.zeros(12345)}), numel_edited), REFUSED
    yield "structure.pth", torch_bytes({"x" * (MAX_PICKLE_BYTES + 1): 1}), REFUSED
    yield (
        "no_structure.pth",
        rewritten(good, lambda name, content: b"" if name.endswith(".pkl") else content),
        REFUSED,
    )
    arrays = io.BytesIO()
    np.savez(arrays, cls_token=np.zeros(3))
    yield "arrays.npz", arrays.getvalue(), REFUSED
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    yield "program.pt", program.getvalue(), REFUSED


def shorter(name, content):
    """The records of 192 numbers lose one; torch would map the bytes of the next record."""
    return content[:-4] if "/data/" in name and len(content) == 192 * 4 else content


def odd_storages():
    """Zips whose structure and records disagree on lengths."""
    good = torch_bytes(state_dict())
    yield "short.pth", rewritten(good, shorter), REFUSED
    doubles = rewritten(good, lambda name, content: content.replace(b"FloatStorage", b"DoubleStorage"))
    yield "doubles.pth", doubles, REFUSED
    yield "no_record.pth", rewritten(good, absent=("archive/data/3",)), REFUSED
    supplement = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(supplement, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        record = new.getinfo("archive/data/0")  # its header says that a supplement of 60,000 bytes follows
    data = bytearray(supplement.getvalue())
    data[record.header_offset + 28 : record.header_offset + 30] = struct.pack("<H", 60_000)
    yield "supplement.pth", bytes(data), REFUSED
    yield "renamed.pth", structured(good_pickle(good).replace(b"storage", b"STORAGE")), REFUSED


def good_pickle(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read("archive/data.pkl")


# Pickles


def hexed(times):
    """b'0' encoded as hex again and again: 2^times bytes."""
    call = Pickled(__import__("_codecs").encode, b"0" * 16, "hex")
    for _ in range(times):
        call = Pickled(__import__("_codecs").encode, call, "hex")
    return call


def structured(pickled):
    """A zip whose structure is this pickle."""
    return rewritten(torch_bytes({}), lambda name, old: pickled if name.endswith("data.pkl") else old)


def doubled(levels):
    """Pairs of the same pair, again and again, as a key: 4 bytes a level, and 2^levels steps to hash."""
    pairs = b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(levels))
    return b"\x80\x02})q\x00" + pairs + b"K\x01s."


def numpy_scalar(dtype):
    """Of no content: NumPy makes room for what the type declares."""
    name = dtype.encode()
    made = b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX%s%s\x89\x88\x87R\x85R" % (
        struct.pack("<I", len(name)),
        name,
    )
    return b"\x80\x02}X\x01\0\0\0a" + made + b"s."


def pickles():
    yield "doubled.pth", structured(doubled(100)), REFUSED
    for dtype in ("V2000000000", "(1000000,1000)f8"):
        yield f"numpy_{dtype[0]}.pth", structured(numpy_scalar(dtype)), REFUSED
    for protocol in (2, 4):
        yield f"plain{protocol}.pkl", pickle.dumps({"cls_token": [1.0]}, protocol=protocol), REFUSED
    for name, content in {
        "system": Pickled(os.system, "echo ran"),
        "bytearray": Pickled(bytearray, 1 << 35),
        "hex": hexed(34),
        "numpy": np.zeros(3),
        "sparse": torch.sparse_coo_tensor([[0], [0]], [1.0], (1 << 20, 1 << 20)),
        "quantized": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
        "meta": torch.zeros(1 << 40, device="meta"),
        "expanded": torch.zeros(1).expand(1 << 40),
        "strided": torch.zeros(10).as_strided((1 << 20, 1 << 20), (0, 0)),
    }.items():
        yield f"{name}.pth", torch_bytes({**state_dict(), "blocks.0.extra": content}), REFUSED
        yield f"{name}.legacy.pth", torch_bytes({"a": content}, _use_new_zipfile_serialization=False), REFUSED
    shared = torch.zeros(1 << 18)
    yield (
        "shared.pth",
        torch_bytes({f"blocks.{i}.attn.qkv.weight": shared.view(512, 512) for i in range(1000)}),
        REFUSED,
    )
    views = torch.zeros(1 << 16)
    yield "views.pth", torch_bytes({f"tensor{i}": views[i:] for i in range(1000)}), REFUSED
    pickled = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    yield "deep.pth", structured(pickled), REFUSED
    nested = b"\x80\x02}X\x01\0\0\0a" + b"]" * 20_000 + b"a" * 19_999 + b"s."
    yield "nested.pth", structured(nested), REFUSED
    lists = b"\x80\x02" + b"]" * (MAX_PICKLE_BYTES - 100) + b"."
    yield "lists.pth", structured(lists), REFUSED
    yield "list.pth", torch_bytes([torch.zeros(3)]), REFUSED
    yield "tensor.pth", torch_bytes(torch.zeros(3)), REFUSED
    full = {
        "model": state_dict(),
        "args": argparse.Namespace(
            lr=0.1, out=Path("runs"), dtype=torch.uint8, device=torch.device("cuda:0")
        ),
        "best": np.float64(3.5),
        "n": np.int64(3),
        "epoch": 3,
    }
    yield "full.pth", torch_bytes(full), READ
    older = rewritten(
        torch_bytes(full),
        lambda _, content: content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"),
    )
    yield "older_numpy.pth", older, READ
    yield "full.legacy.pth", torch_bytes(full, _use_new_zipfile_serialization=False), READ


# Numbers and names


def named_states():
    for name, value, outcome in [
        ("nan", torch.full((192,), float("nan")), REFUSED),
        ("infinite", torch.cat([torch.zeros(191), torch.tensor([-float("inf")])]), REFUSED),
        ("integer", torch.zeros(192, dtype=torch.int64), REFUSED),
        ("bool", torch.zeros(192, dtype=torch.bool), REFUSED),
        ("half", torch.ones(192, dtype=torch.float16), READ),
        ("bfloat", torch.ones(192, dtype=torch.bfloat16), READ),
        ("double", torch.ones(192, dtype=torch.float64), READ),
    ]:
        yield f"{name}.pth", torch_bytes({**state_dict(), "norm.weight": value}), outcome
        yield f"{name}.safetensors", save({**state_dict(), "norm.weight": value}), outcome
    yield (
        "complex.pth",
        torch_bytes({**state_dict(), "norm.weight": torch.ones(192, dtype=torch.complex64)}),
        REFUSED,
    )
    for number in ("99999", "9" * 5000, "-1", "²", "1e9"):
        yield (
            f"blocks{number[:6]}.pth",
            torch_bytes({**state_dict(), f"blocks.{number}.norm1.weight": torch.zeros(192)}),
            EITHER,
        )
    yield "newline.pth", torch_bytes({"a\nb": torch.zeros(1), "c\r\n": torch.zeros(1)}), REFUSED
    yield "numbers.pth", torch_bytes({0: torch.zeros(1), (1, 2): torch.zeros(1)}), REFUSED


def our_metadata(**changes):
    vit = build_backbone(NAME, depth=1)
    model_kwargs = {**vit.model_kwargs, **changes}
    told = {
        "format": "posfield-backbone",
        "format_version": "1",
        "backbone": NAME,
        "provenance": "{}",
        "flags": json.dumps(model_kwargs),
    }
    return save(vit.state_dict(), metadata=told)


def ours():
    yield "ours.safetensors", our_metadata(), READ
    for name, changes in {
        "wide": dict(embed_dim=1 << 19),
        "deep": dict(depth=1 << 19),
        "grid": dict(pos_grid=1 << 19),
        "patches": dict(patch_size=1 << 19),
        "registers": dict(n_registers=1 << 20),
        "ratio": dict(mlp_ratio=1e6),
        "infinite": dict(mlp_ratio=float("inf")),
        "negative": dict(embed_dim=-192),
        "no_heads": dict(num_heads=0),
        "text": dict(embed_dim="192"),
        "none": dict(depth=None),
        "true": dict(depth=True),
        "eps": dict(ln_eps=-1.0),
        "eps_text": dict(ln_eps="small"),
        "two_lines": dict(drop_path="a"),
        "gated": dict(swiglu="yes"),
        "bias": dict(qkv_bias=3),
        "no_bias": dict(qkv_bias="none"),
        "rotary": dict(pos_encoding="rotary", pos_grid=0, pos_interpolation="none"),
        "unknown": dict(surprise=1),
    }.items():
        yield f"ours_{name}.safetensors", our_metadata(**changes), REFUSED
    for name, model_kwargs in {"list": "[1]", "deep_json": "[" * 100_000, "number": "3"}.items():
        told = {
            "format": "posfield-backbone",
            "format_version": "1",
            "backbone": NAME,
            "provenance": "{}",
            "flags": model_kwargs,
        }
        yield f"ours_{name}.safetensors", save({"a": torch.zeros(1)}, metadata=told), REFUSED
        told |= {"flags": "{}", "provenance": model_kwargs}
        yield f"ours_provenance_{name}.safetensors", save({"a": torch.zeros(1)}, metadata=told), REFUSED


# safetensors


def safetensors_bytes(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor_at(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def headers():
    body = bytes(32)
    for name, header in {
        "outside": {"a": tensor_at(0, 16), "b": tensor_at(16, 4000, (996,))},
        "overlap": {"a": tensor_at(0, 16), "b": tensor_at(8, 32, (6,))},
        "hole": {"a": tensor_at(0, 16), "b": tensor_at(20, 32, (3,))},
        "backwards": {"a": tensor_at(32, 0, (8,))},
        "shape": {"a": tensor_at(0, 32, (1 << 40,))},
        "huge_shape": {"a": tensor_at(0, 32, (1 << 62, 1 << 62))},
        "negative": {"a": tensor_at(0, 32, (-8,))},
        "dtype": {"a": tensor_at(0, 32, (8,), "OBJECT")},
        "list": [1, 2],
        "text": b"{not json" + b" " * 40,
        "deep": b'{"a":' + b"[" * 50_000,
    }.items():
        yield f"header_{name}.safetensors", safetensors_bytes(header, body), REFUSED
    yield "header_long.safetensors", struct.pack("<Q", 1 << 62) + b"{" + bytes(99), REFUSED
    yield "header_large.safetensors", safetensors_bytes(b"{" + b" " * MAX_HEADER_BYTES + b"}"), REFUSED
    yield "header_short.safetensors", b"{}", REFUSED
    yield "header_only.safetensors", safetensors_bytes({}), REFUSED
    good = save(state_dict())
    yield "good_without_suffix", good, READ
    yield "cut.safetensors", good[:-1], REFUSED
    yield "longer.safetensors", good + b"\0", REFUSED


# Flax


def array_bytes(shape, dtype="float32", content=bytes(16)):
    return msgpack.packb(
        {"teacher_weights": {"a": msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))}}
    )


def flax():
    key = b"\x81\xafteacher_weights"
    for name, content in {
        "array": key + b"\xdd\xff\xff\xff\xff",
        "arrays": key + b"\xdd\x00\x10\x00\x00" * 900,
        "map": key + b"\xdf\xff\xff\xff\xff",
        "maps": key + b"\x81\xa1a" * 5000 + b"\x01",
        "deep": key + b"\x81\xa1a" * 500 + b"\x01",
        "deeper": key + b"\x91" * 5000 + b"\x01",
        "bytes": key + b"\xc6\xff\xff\xff\xff",
        "text": key + b"\xdb\xff\xff\xff\xff",
        "extension": key + b"\xc9\xff\xff\xff\xff\x01",
        "top": b"\xdf\xff\xff\xff\xff" + b"\xa1a\x01" * 10,
        "shape": array_bytes((1 << 40,)),
        "shapes": array_bytes((1 << 40, 0), content=b""),
        "negative": array_bytes((-2, -2)),
        "text_shape": array_bytes(("4",)),
        "object": array_bytes((2,), "object"),
        "void": array_bytes((2,), "V8"),
        "nothing": array_bytes((), content=b""),
        "chunks": msgpack.packb(
            {
                "teacher_weights": {
                    "__msgpack_chunked_array__": True,
                    "shape": {"0": 1 << 40},
                    "chunks": {"0": 3},
                }
            }
        ),
        "negative_chunks": msgpack.packb(
            {
                "teacher_weights": {
                    "__msgpack_chunked_array__": True,
                    "shape": {"0": -1},
                    "chunks": {"0": msgpack.ExtType(1, msgpack.packb(((4,), "float32", bytes(16))))},
                }
            }
        ),
        "no_chunks": msgpack.packb({"teacher_weights": {"__msgpack_chunked_array__": True}}),
        "items": key + b"\xdc\x03\xe8" + (b"\xdc\x03\xe8" + b"\x80" * 1000) * 1000,
        "items_of_items": key + b"\xdc\x03\xe8" + (b"\xdc\x03\xe8" + (b"\x9a" + b"\x80" * 10) * 1000) * 1000,
        "not_utf8": b"\x81\xa2\xff\xfe\x01",
        "unhashable": b"\x81\x91\x01\x01",
    }.items():
        yield f"flax_{name}", content, REFUSED


# What is no regular file, and what no file of weights


def others():
    yield "empty.pth", b"", REFUSED
    yield "empty.safetensors", b"", REFUSED
    yield "page.pth", b"<!DOCTYPE html><html>404</html>", REFUSED
    yield (
        "pointer.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        REFUSED,
    )
    yield "one", b"P", REFUSED
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    yield "legacy.tar", archive.getvalue(), REFUSED
    rng = np.random.default_rng(0)
    for k, start in enumerate(
        [
            b"PK\x03\x04",
            b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
            b"\x82",
            b"\x10" + bytes(7) + b"{",
            b"",
        ]
    ):
        yield f"noise{k}", start + rng.bytes(3000), REFUSED


def write_special(folder):
    """What is more than bytes: (name, outcome)."""
    (folder / "loop.pth").symlink_to(folder / "loop.pth")
    (folder / "dangling.pth").symlink_to(folder / "nothing.pth")
    (folder / "endless.pth").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.pth")
    (folder / "folder.pth").mkdir()
    with open(
        folder / "hole.pth", "wb"
    ) as file:  # 3 GB that are not there, all of them a directory by its own account
        size = 3 << 30
        file.write(b"PK\x03\x04")
        file.truncate(size)
        file.seek(size)
        file.write(b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 60_000, 60_000, size - 100, 100, 0))
    good = save(state_dict())
    for name, config in {
        "large": b" " * MAX_JSON_BYTES + b"{}",
        "deep": b"[" * 100_000,
        "text": b"{",
        "binary": b"\xff\xfe",
    }.items():
        (folder / f"config_{name}").mkdir()
        (folder / f"config_{name}" / "model.safetensors").write_bytes(good)
        (folder / f"config_{name}" / "config.json").write_bytes(config)
    (folder / "config_pipe").mkdir()
    (folder / "config_pipe" / "model.safetensors").write_bytes(good)
    os.mkfifo(folder / "config_pipe" / "config.json")
    for name, index in {
        "list": [],
        "deep": {"weight_map": 3},
        "self": {"weight_map": {"a": "model.safetensors.index.json"}},
        "outside": {"weight_map": {"a": "../good.pth"}},
        "unnamed": {"weight_map": {"a": ""}},
        "parent": {"weight_map": {"a": ".."}},
    }.items():
        (folder / f"index_{name}").mkdir()
        (folder / f"index_{name}" / "model.safetensors.index.json").write_text(json.dumps(index))
    return dict.fromkeys([*os.listdir(folder), "gone.pth", "null\x00.pth", "good.pth/x.pth"], REFUSED)


def damaged():
    """Good files cut off and with bytes changed: read or refused, never a crash."""
    rng = np.random.default_rng(1)
    small = {key: value for key, value in state_dict().items() if value.numel() < 1000} | {
        "a": torch.zeros(3)
    }
    for kind, data in {
        "pth": torch_bytes({"model": small, "args": argparse.Namespace(a=1)}),
        "legacy.pth": torch_bytes(small, _use_new_zipfile_serialization=False),
        "safetensors": save(small),
        "msgpack": array_bytes((4,)),
    }.items():
        for k in range(40):
            changed = bytearray(data)
            if k % 4 == 0:
                changed = changed[: int(rng.integers(1, len(changed)))]
            else:
                for at in rng.integers(
                    0, len(changed) if k % 2 else min(len(changed), 800), int(rng.integers(1, 12))
                ):
                    changed[at] = int(rng.integers(256))
            yield f"damaged{k:02}.{kind}", bytes(changed), EITHER


def write_hostile_files(folder):
    folder.mkdir()
    outcomes = write_special(folder)
    for make in (zips, odd_storages, pickles, named_states, ours, headers, flax, others, damaged):
        for name, content, outcome in make():
            assert name not in outcomes, name
            (folder / name).write_bytes(content)
            outcomes[name] = outcome
    return outcomes
