"""500 hostile image files: no crash, no hang, memory bounded, every file is an image or a BrokenImage,
nothing is said aside.

``python tests/test_hostile.py LIST`` reads the images of a list in a process of its own and prints what came
of each.
"""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from photos import TINY, last, write_photos
from PIL import Image, PngImagePlugin

from pretrain.data.broken import BrokenFiles

N_FILES = 500
MAX_MPX = 24.0
MAX_RESIDENT_MB = 450  # above the imported libraries: 14 bytes a pixel of MAX_MPX, and the file itself
MAX_ADDRESSED_MB = 1024  # likewise, by RLIMIT_AS
HANG_S = 240  # a guard, not a speed: it takes about 10 s
KINDS = {"jpg": {"format": "JPEG"}, "png": {"format": "PNG"}, "webp": {"format": "WEBP"}, "gif": {"format": "GIF"},
         "bmp": {"format": "BMP"}, "prog.jpg": {"format": "JPEG", "progressive": True},
         "lossless.webp": {"format": "WEBP", "lossless": True}}  # fmt: skip
READ, BROKEN, EITHER = "read", "broken", "either"


def picture(width=120, height=90, seed=0, mode="RGB"):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(kind, image=None, **options):
    file = io.BytesIO()
    (image or picture()).save(file, **KINDS[kind], **options)
    return file.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *, extra=b"", data=b"\0" * 100, depth=8, color=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")
    )


def with_size(kind, width, height):
    """A small file whose header declares this size."""
    if kind == "png":
        return png(width, height)
    data, formats = bytearray(encoded(kind)), {"jpg": ">HH", "prog.jpg": ">HH", "gif": "<HH", "bmp": "<ii"}
    sizes, layout = [120, 90], formats[kind]
    old, new = (
        struct.pack(layout, *(pair[::-1] if layout[0] == ">" else pair)) for pair in (sizes, [width, height])
    )
    return bytes(data).replace(old, new, 1)


def truncated():
    rng = np.random.default_rng(1)
    for kind, n, tail in [("jpg", 55, 1), ("prog.jpg", 30, 1), ("png", 40, 1), ("webp", 30, 2), ("lossless.webp", 10, 2),
                          ("gif", 15, 4), ("bmp", 10, 4)]:  # fmt: skip
        data = encoded(kind)
        for k in range(n):
            yield f"truncated{k:02}.{kind}", data[: int(rng.integers(1, len(data) - tail))], BROKEN


def corrupted():
    rng = np.random.default_rng(2)
    for kind in KINDS:
        data = encoded(kind)
        for k in range(16):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data) if k % 4 else 64, int(rng.integers(1, 30))):
                damaged[at] = int(rng.integers(256))
            yield f"corrupted{k:02}.{kind}", bytes(damaged), EITHER
        for k in range(2):  # the right start, and noise
            yield (
                f"noise{k:02}.{kind}",
                data[:32] + rng.bytes(3000),
                EITHER if kind in ("bmp", "webp") else BROKEN,
            )


def declared_sizes():
    for kind in ("jpg", "prog.jpg", "png", "gif", "bmp"):
        for width, height in [(60000, 60000), (65535, 1000), (5000, 4801), (0, 90), (120, 0)]:
            outcome = (
                READ if kind == "gif" and not width * height else BROKEN
            )  # its frame tells the size then
            yield f"declared{width}x{height}.{kind}", with_size(kind, width, height), outcome
        outcome = (
            EITHER if kind in ("gif", "prog.jpg") else BROKEN
        )  # an allowed size, and the data ends early
        yield f"declared4900x4890.{kind}", with_size(kind, 4900, 4890), outcome
    yield "negative.bmp", with_size("bmp", -120, 90), BROKEN
    yield "huge.png", png(2**31 - 1, 2**31 - 1), BROKEN
    yield "bits.png", png(100_000, 100_000, data=bytes(10_000_000), depth=1, color=0), BROKEN


def expanding():
    bomb = zlib.compress(bytes(300_000_000), 9)
    for name, extra in [("text", chunk(b"zTXt", b"comment\0\0" + bomb)), ("profile", chunk(b"iCCP", b"icc\0\0" + bomb)),
                        ("unicode", chunk(b"iTXt", b"comment\0\1\0\0\0" + bomb))]:  # fmt: skip
        yield f"{name}_bomb.png", png(4, 4, extra=extra, data=b"\0" * 13 * 4), EITHER
    many = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1_000_000), 9)) for i in range(80))
    yield "many_texts.png", png(4, 4, extra=many, data=b"\0" * 13 * 4), EITHER
    yield "more_rows.png", png(4, 4, data=bytes(300_000_000)), READ
    progressive = encoded("prog.jpg")
    last = progressive.rindex(b"\xff\xda")
    yield "scans.jpg", progressive[:last] + progressive[last:-2] * 5000 + b"\xff\xd9", BROKEN
    run_length = bytearray(encoded("bmp", picture(mode="P")))
    run_length[30:34] = struct.pack("<I", 1)
    yield "run_length.bmp", bytes(run_length), BROKEN
    for kind in ("jpg", "prog.jpg", "png", "bmp"):
        yield f"large.{kind}", encoded(kind, Image.new("RGB", (5000, 4700), (9, 99, 199))), READ


def odd_but_whole():
    for kind in KINDS:
        for width, height in [(1, 1), (2, 1), (1, 3)]:
            yield f"small{width}x{height}.{kind}", encoded(kind, picture(width, height)), READ
        long = 16383 if "webp" in kind else 30000
        yield f"long.{kind}", encoded(kind, picture(long, 1)), READ
        yield f"high.{kind}", encoded(kind, picture(2, long)), READ
    others = [kind for kind in KINDS for _ in range(3)]
    for k, (kind, suffix) in enumerate(zip(others, ["jpg", "png", "jpeg", "webp", "JPG", "bmp", "PNG"] * 4)):
        yield f"mismatch{k:02}.{suffix}", encoded(kind), READ
    frames = [picture(seed=i) for i in range(1, 5)]
    for kind in ("gif", "webp", "png"):
        yield f"animated.{kind}", encoded(kind, save_all=True, append_images=frames), READ
    for mode in ("CMYK", "L", "1"):
        yield f"{mode}.jpg", encoded("jpg", picture(mode=mode)), READ
    for mode in ("P", "LA", "RGBA", "1", "I;16"):
        yield f"mode_{mode.replace(';', '')}.png", encoded("png", picture(mode=mode)), READ
    for mode in ("F", "RGB"):
        file = io.BytesIO()
        picture(mode=mode).save(file, "TIFF")
        yield f"tiff_{mode}.jpg", file.getvalue(), BROKEN if mode == "F" else READ  # F: 0 to 255
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 100_000)
    yield "text.png", encoded("png", pnginfo=info), READ
    for k, exif in enumerate([b"", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0" + b"\xff" * 60, b"\0" * 60_000]):
        yield f"exif{k}.jpg", encoded("jpg", exif=b"Exif\0\0" + exif), READ


def no_images():
    texts = ["not a picture", "<html><body>404</body></html>", "<svg xmlns='http://www.w3.org/2000/svg'/>", "{}", "\0" * 5000,
             "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "%PDF-1.4", "PK\x03\x04", "II*\0", "BM",
             "GIF89a", "RIFF\0\0\0\0WEBP", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "P6 9 9 255\n"]  # fmt: skip
    for k, text in enumerate(texts):
        yield f"text{k:02}.jpg", text.encode("latin-1"), BROKEN
    yield "utf16.jpg", "a text".encode("utf-16"), BROKEN
    yield "start.jpg", b"\xff\xd8\xff", BROKEN
    yield "start.png", b"\x89PNG\r\n\x1a\n", BROKEN
    for k in range(8):
        yield f"empty{k}.{['jpg', 'png', 'webp', 'bmp'][k % 4]}", b"", BROKEN


def write_special(folder):
    """What is no regular file: (name, outcome)."""
    for k in range(3):
        (folder / f"folder{k}.jpg").mkdir()
        (folder / f"dangling{k}.jpg").symlink_to(folder / "nothing.jpg")
        (folder / f"loop{k}.jpg").symlink_to(folder / f"loop{k}.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    (folder / "secret.jpg").write_bytes(encoded("jpg"))
    (folder / "secret.jpg").chmod(0)
    (folder / "link.jpg").symlink_to("odd.jpg")
    (folder / "odd.jpg").write_bytes(encoded("jpg"))
    kinds = [(f"{kind}{k}.jpg", BROKEN) for kind in ("folder", "dangling", "loop") for k in range(3)]
    secret = READ if os.geteuid() == 0 else BROKEN  # root may read all
    return [
        *kinds,
        ("pipe.jpg", BROKEN),
        ("endless.jpg", BROKEN),
        ("secret.jpg", secret),
        ("link.jpg", READ),
        ("gone.jpg", BROKEN),
    ]


def write_hostile_files(folder, n=N_FILES):
    """``n`` files, always the same; returns {name: outcome}."""
    folder.mkdir(parents=True)
    outcomes = dict(write_special(folder))
    for make in (truncated, corrupted, declared_sizes, expanding, odd_but_whole, no_images):
        for name, content, outcome in make():
            assert name not in outcomes, name
            (folder / name).write_bytes(content)
            outcomes[name] = outcome
    rng = np.random.default_rng(3)
    for k in range(n - len(outcomes)):
        (folder / f"random{k:03}.jpg").write_bytes(b"\xff\xd8\xff" + rng.bytes(int(rng.integers(2000))))
        outcomes[f"random{k:03}.jpg"] = BROKEN
    return outcomes


def read_all(path):
    """In a process of its own: the outcome of every image of a list, and the memory that it took, as JSON
    on stdout."""
    from pretrain.data.decode import BrokenImage, decode
    from pretrain.data.sources import list_source

    source, outcomes = list_source(path), {}
    for kind in KINDS:
        decode(encoded(kind), max_side_px=64)  # what is loaded at the first use does not count
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "linux":
        addressed = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (addressed + (MAX_ADDRESSED_MB << 20),) * 2)
    for i in range(len(source)):
        try:
            data = source.read(i)
            for max_side_px in (0, 512):
                pixels = decode(data, max_side_px, MAX_MPX)
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size
                assert pixels.flags.c_contiguous and (not max_side_px or max(pixels.shape) <= max_side_px)
            outcomes[source.name(i)] = READ
        except BrokenImage as error:
            outcomes[source.name(i)] = f"{BROKEN}: {error}"
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    print(json.dumps({"outcomes": outcomes, "peak_mb": peak_mb}))


def test_500_hostile_files(tmp_path):
    expected = write_hostile_files(tmp_path / "files")
    assert len(expected) == N_FILES
    (tmp_path / "list.txt").write_text("".join(f"files/{name}\n" for name in expected))
    command = [sys.executable, __file__, str(tmp_path / "list.txt")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    told = json.loads(done.stdout)
    outcomes = {name.removeprefix("files/"): outcome for name, outcome in told["outcomes"].items()}
    assert outcomes.keys() == expected.keys()
    wrong = {
        name: (outcomes[name], e)
        for name, e in expected.items()
        if e != EITHER and not outcomes[name].startswith(e)
    }
    assert not wrong
    counts = Counter(outcome.split(":")[0] for outcome in outcomes.values())
    assert set(counts) == {READ, BROKEN} and sum(counts.values()) == N_FILES
    assert counts[READ] > 100 and counts[BROKEN] > 250
    assert not any(
        "MemoryError" in outcome or "AssertionError" in outcome or "\n" in outcome
        for outcome in outcomes.values()
    )
    if sys.platform == "linux":
        assert told["peak_mb"] < MAX_RESIDENT_MB


def test_a_run_among_hostile_files(tmp_path, capsys):
    """Pre-training over good photographs and a share of these files ends, and every broken file was met,
    named and listed."""
    from pretrain.config import load_config
    from pretrain.train import train

    outcomes = write_hostile_files(tmp_path / "files")
    photos = write_photos(tmp_path / "photos", n=20)
    broken = [
        name
        for name, outcome in outcomes.items()
        if outcome == BROKEN and (tmp_path / "files" / name).is_file()
    ][::30]
    readable = [
        name
        for name, outcome in outcomes.items()
        if outcome == READ and "large" not in name and "more" not in name
    ][::30]
    for k, name in enumerate([*broken, *readable]):
        (tmp_path / "files" / name).rename(photos / f"{k:03}_{name}.png")  # sorted among the photographs
    n, batch = len(list(photos.iterdir())), 3
    settings = [
        f"data.root={photos}",
        f"run.output={tmp_path / 'run'}",
        "data.workers=1",
        f"data.max_mpx={MAX_MPX}",
    ]
    settings += [
        f"optim.batch_size={batch}",
        f"optim.epoch_iters={-(-n // batch)}",
        "optim.epochs=2",
        "data.broken_share=1.0",
    ]
    folder = train(load_config(None, last([*TINY, *settings])))
    assert (folder / "backbone.safetensors").is_file()
    expected = [f"{k:03}_{name}.png" for k, name in enumerate(broken)]
    assert len(expected) >= 10 and len(readable) >= 3
    lines = capsys.readouterr().err.splitlines()
    said = [
        line.split(": ", 1)[1].split(" (")[0]
        for line in lines
        if line.startswith("skipped, cannot be read: ")
    ]
    listed = [line.split(" (")[0] for line in (folder / "broken_images.txt").read_text().splitlines()]
    assert sorted(said) == listed == expected


def test_broken_files_are_counted_over_ranks_and_resume(tmp_path):
    ranks = [BrokenFiles(), BrokenFiles()]
    ranks[0].record(8, ["b.jpg (cut off)", "b.jpg (cut off)"])
    ranks[1].record(8, ["a.jpg (empty)", "b.jpg (cut off)"])
    run = BrokenFiles()
    assert run.add(rank.state() for rank in ranks) == ["a.jpg (empty)", "b.jpg (cut off)"]
    assert (run.n_read, run.n_failed, run.share()) == (16, 4, 0.2)
    later = BrokenFiles()
    later.record(0, ["b.jpg (cut off)", "c.jpg (text)"])
    resumed = BrokenFiles(**json.loads(json.dumps(run.state())))
    assert resumed.add([later.state()]) == ["c.jpg (text)"] and resumed.n_failed == 6
    resumed.write(tmp_path)
    assert (tmp_path / "broken_images.txt").read_text() == "a.jpg (empty)\nb.jpg (cut off)\nc.jpg (text)\n"
    assert resumed.told(2) == ["3 broken images; 6 of 22 reads failed (27.27%)", "  a.jpg (empty)", "  b.jpg (cut off)",
                               "  and 1 more: see broken_images.txt"]  # fmt: skip
    assert len(resumed.told()) == 4


def test_too_many_broken_files_are_told_once_there_is_enough_to_judge(tmp_path):
    run = BrokenFiles()
    assert run.share() == 0 and not run.over(0.0, at_least=0) and run.told() == []
    run.write(tmp_path)
    assert not list(tmp_path.iterdir())
    run.record(9, ["a"])
    assert run.over(0.09, at_least=10) and not run.over(0.1, at_least=10) and not run.over(0.09, at_least=11)


if __name__ == "__main__":
    read_all(sys.argv[1])
