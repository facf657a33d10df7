"""Pixels of every kind of file, against PIL's or against numbers; what is broken."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from torch.nn import functional
from torchvision.transforms.v2.functional import to_image

import pretrain.data.decode as decoding
from pretrain.data.decode import BrokenImage, decode
from pretrain.data.images import pixels_of
from pretrain.errors import UserError


def picture(width=97, height=61, seed=0):
    """A smooth random RGB image, bright and dark, without a gray corner."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pil(data):
    """PIL's own pixels, upright."""
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def png(width, height, rows=b"", color=2, depth=8, chunks=()):
    """A PNG of these raw rows (each begins with its filter byte), whatever its header declares."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.fixture(params=["absent", "installed"][: 1 if decoding.simplejpeg is None else 2])
def either_decoder(request, monkeypatch):
    """The outcome is the same whether simplejpeg is installed or not."""
    if request.param == "absent":
        monkeypatch.setattr(decoding, "simplejpeg", None)


@pytest.mark.parametrize("size", [(97, 61), (16, 16), (1, 1), (3000, 1), (1, 3000)])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}]
)
def test_jpeg_pixels_are_pils(either_decoder, size, options):
    for image in (picture(*size), picture(*size).convert("L")):
        data = encoded(image, quality=90, **options)
        pixels = decode(data)
        assert pixels.dtype == np.uint8 and pixels.shape == (size[1], size[0], 3)
        assert pixels.flags.c_contiguous and pixels.flags.writeable
        assert np.array_equal(pixels, by_pil(data))


MODES = {
    "BMP": "RGB L P RGBA 1",
    "GIF": "RGB L P RGBA LA 1",
    "PNG": "RGB L P RGBA LA 1",
    "WEBP": "RGB L P RGBA LA",
}


@pytest.mark.parametrize("kind, mode", [(kind, mode) for kind in MODES for mode in MODES[kind].split()])
def test_other_formats_are_pils(kind, mode):
    source = picture()
    if mode in ("RGBA", "LA"):
        source.putalpha(picture(seed=1).convert("L"))
    data = encoded(source.convert(mode), kind)
    assert np.array_equal(decode(data), by_pil(data))


def test_transparency_is_dropped_and_the_colors_below_it_stay():
    rgba = np.full((4, 5, 4), [10, 20, 30, 0], np.uint8)
    assert (decode(encoded(Image.fromarray(rgba), "PNG")) == [10, 20, 30]).all()
    palette = picture().convert("P")
    assert np.array_equal(
        decode(encoded(palette, "PNG", transparency=bytes(range(256)))), np.array(palette.convert("RGB"))
    )


def test_cmyk_jpeg_with_adobes_inverted_values():
    ink = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    data = encoded(ink, quality=100)
    assert b"Adobe" in data and np.abs(decode(data).astype(int) - [255, 0, 0]).max() <= 2
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    at = data.index(b"Adobe") + 11
    assert data[at] == 0  # no transform; 2: YCCK, whose red is another
    ycck = data[:at] + b"\2" + data[at + 1 :]
    assert (
        np.array_equal(decode(ycck), by_pil(ycck))
        and np.abs(decode(ycck).astype(int) - [255, 0, 0]).max() > 50
    )


def test_16_bits_are_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 300, 1000], [32768, 65278, 65406, 65407, 65500, 65535]], np.uint16)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    pixels = decode(encoded(Image.fromarray(values), "PNG"))
    assert pixels.shape == (2, 6, 3) and (pixels == expected[..., None]).all()
    rgb = np.stack([values, values[::-1], values[:, ::-1]], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    assert np.array_equal(decode(png(6, 2, rows, depth=16)), (rgb >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation, kind):
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = orientation
    data = encoded(picture(), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    pixels = decode(data)
    assert pixels.shape[:2] == ((61, 97) if orientation <= 4 else (97, 61)) and pixels.flags.c_contiguous
    assert np.array_equal(pixels, by_pil(data))
    assert max(decode(data, max_side_px=40).shape) == 40


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_unknown_orientations_and_damaged_exif_ask_for_nothing(value):
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = value
    plain = decode(encoded(picture()))
    data = encoded(picture(), exif=exif)
    assert np.array_equal(decode(data), plain)
    at = data.index(b"Exif\0\0") + 6
    assert np.array_equal(decode(data[:at] + b"MM\0\x2a\xff\xff\xff\xff" + data[at + 8 :]), plain)
    assert np.array_equal(decode(data[: at + 8] + b"\xff" * 8 + data[at + 16 :]), plain)


def test_color_profiles_are_ignored():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for kind in ("JPEG", "PNG", "WEBP"):
        assert np.array_equal(
            decode(encoded(picture(), kind, icc_profile=profile)), decode(encoded(picture(), kind))
        )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_of_several_frames(kind):
    frames = [picture(seed=i).quantize(16) if kind == "GIF" else picture(seed=i) for i in range(3)]
    data = encoded(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(decode(data), np.array(frames[0].convert("RGB")))


def test_content_tells_the_format_and_others_are_refused():
    for kind in ("PPM", "EPS", "ICO", "PCX", "TGA"):
        with pytest.raises(BrokenImage, match="no JPEG, PNG"):
            decode(encoded(picture(), kind))
    with pytest.raises(BrokenImage, match="no JPEG, PNG"):
        decode(b"a text")
    with pytest.raises(BrokenImage, match="empty"):
        decode(b"")


def test_the_size_is_bounded(either_decoder):
    data = encoded(picture(640, 480), quality=95)
    full = to_image(by_pil(data))[None]
    expected = functional.interpolate(full, size=(384, 512), mode="bicubic", antialias=True)[0].permute(
        1, 2, 0
    )
    bounded = decode(data, max_side_px=512)
    assert (
        bounded.shape == (384, 512, 3)
        and bounded.flags.c_contiguous
        and np.array_equal(bounded, expected.numpy())
    )
    assert np.array_equal(decode(data, max_side_px=640), decode(data))
    reduced = np.array(_drafted(data, 320))
    assert reduced.shape == (240, 320, 3)
    assert np.array_equal(decode(data, max_side_px=320), reduced)  # DCT scaling alone
    assert decode(data, max_side_px=319).shape == (239, 319, 3)
    standing = decode(encoded(picture(480, 640)), max_side_px=100)
    assert standing.shape == (100, 75, 3)
    assert (
        np.abs(
            standing.astype(float) - np.array(picture(480, 640).resize((75, 100), Image.Resampling.BICUBIC))
        ).mean()
        < 2
    )


def _drafted(data, side):
    image = Image.open(io.BytesIO(data))
    image.draft(None, (side, side * image.height // image.width))
    return image


@pytest.mark.parametrize("size", [(30000, 1), (1, 30000), (30000, 3), (1, 1)])
def test_extreme_shapes(size):
    for kind in ("PNG", "JPEG", "BMP"):
        data = encoded(Image.new("RGB", size, (200, 100, 50)), kind)
        for max_side_px, side in ((0, max(size)), (512, min(max(size), 512))):
            pixels = decode(data, max_side_px=max_side_px)
            assert max(pixels.shape[:2]) == side and min(pixels.shape) >= 1
            assert np.abs(pixels.astype(int) - [200, 100, 50]).max() <= 3


def test_the_header_tells_the_size_before_a_pixel_is_decoded():
    bombs = {
        "100000 x 100000": png(100_000, 100_000),
        "65500 x 65500": encoded(picture()).replace(
            struct.pack(">HH", 61, 97), struct.pack(">HH", 65500, 65500), 1
        ),
        "60000 x 60000": b"GIF89a"
        + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0)
        + encoded(picture().convert("P"), "GIF")[13:],
    }
    for size, data in bombs.items():
        with pytest.raises(BrokenImage, match=f"declares {size} pixels, more than max_mpx=200 million"):
            decode(data)
    with pytest.raises(BrokenImage, match="declares 16383 x 10000 pixels, more than max_mpx=100 million"):
        decode(_webp_canvas(16383, 10000), max_mpx=100)
    with pytest.raises(
        BrokenImage, match="decompression bomb"
    ):  # PIL's own bound, 179 million, comes first for WebP
        decode(_webp_canvas(16383, 16383), max_mpx=100)
    with pytest.raises(BrokenImage, match="declares 97 x 61 pixels, more than max_mpx=0.005 million"):
        decode(encoded(picture()), max_mpx=0.005)
    assert decode(encoded(picture()), max_mpx=97 * 61 / 1e6).shape == (61, 97, 3)
    large = Image.new("L", (14000, 13000))  # beyond the size from which PIL itself refuses, and within ours
    assert decode(encoded(large, quality=50), max_side_px=512).shape == (475, 512, 3)


def _webp_canvas(width, height):
    extended = struct.pack("<I", 2) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frames = encoded(picture(), "WEBP", save_all=True, append_images=[picture(seed=1)])
    assert frames[12:16] == b"VP8X"
    return frames[:20] + extended + frames[30:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_a_machine_short_of_memory_is_no_broken_image(monkeypatch, kind):
    """Nothing is wrong with the file: whoever reads it must not count it as broken. What declares too much
    is never loaded."""

    def short(*_):
        raise MemoryError

    monkeypatch.setattr(decoding, "simplejpeg", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", short)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", short)
    data = encoded(picture(), kind)
    with pytest.raises(MemoryError):
        decode(data)
    with pytest.raises(BrokenImage, match="more than max_mpx"):
        decode(data, max_mpx=0.005)


def test_a_side_that_pil_cannot_hold_is_broken_not_short_of_memory():
    for width in (50_000_000, 2**24 + 1):
        with pytest.raises(BrokenImage, match=f"declares {width} x 1 pixels, a side of more than 16777216"):
            decode(png(width, 1, color=6, depth=16))
    with pytest.raises(BrokenImage, match="truncated"):  # read as far as it goes
        decode(png(2**24, 1, color=6, depth=16))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_every_truncation_is_broken(either_decoder, kind):
    data = encoded(picture().convert("P") if kind == "GIF" else picture(), kind)
    ends = {"GIF": 3, "BMP": 2}.get(
        kind, 1
    )  # the last bytes but these close the file or fill a row, after the pixels
    for cut in [*range(0, len(data) - ends, max(1, len(data) // 60)), len(data) - ends]:
        with pytest.raises(BrokenImage):
            decode(data[:cut])


def test_a_jpeg_whose_data_ends_with_a_marker_is_not_filled_with_gray(either_decoder):
    for options in ({}, {"restart_marker_rows": 1}, {"subsampling": 0}):
        data = encoded(picture(), quality=90, **options)
        start = data.index(b"\xff\xda") + 14
        for cut in range(start + 20, len(data) - 32, max(1, len(data) // 40)):
            if data[cut - 1] == 0xFF:
                continue  # the marker would be another
            with pytest.raises(BrokenImage, match="ends before the picture"):
                decode(data[:cut] + b"\xff\xd9")
    gray = Image.new("RGB", (64, 48), (128, 128, 128))
    for options in ({}, {"restart_marker_rows": 1}, {"progressive": True}):
        assert (decode(encoded(gray, **options)) == 128).all()  # a gray image is none of these
        assert (decode(encoded(gray.convert("L"), **options)) == 128).all()
    data = encoded(gray, progressive=True)
    second_scan = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    with pytest.raises(BrokenImage, match="fewer than 2"):
        decode(data[: data.rindex(b"\xff\xc4", 0, second_scan)] + b"\xff\xd9")


def test_damage_that_can_be_seen_is_broken_and_does_not_depend_on_the_decoder(monkeypatch):
    for kind in ("PNG", "JPEG"):
        data, random, outcomes = encoded(picture(), kind), np.random.default_rng(0), []
        for _ in range(60):
            damaged = bytearray(data)
            for at in random.integers(2, len(data), 3):
                damaged[at] ^= int(random.integers(1, 256))
            results = []
            for name in ("installed", "absent"):
                with monkeypatch.context() as patch:
                    if name == "absent":
                        patch.setattr(decoding, "simplejpeg", None)
                    try:
                        results.append(decode(bytes(damaged)).tobytes())
                    except BrokenImage as error:
                        assert "\n" not in str(error)
                        results.append(None)
            assert results[0] == results[1]
            outcomes.append(results[0] is None)
        assert (
            all(outcomes) if kind == "PNG" else 0 < sum(outcomes) < 60
        )  # PNG: checksums tell; JPEG has none


def test_costly_files_are_refused():
    progressive = encoded(picture(), progressive=True)
    last = progressive.rindex(b"\xff\xda")
    with pytest.raises(BrokenImage, match="more than 200 scans"):
        decode(progressive[:last] + progressive[last:-2] * 300 + b"\xff\xd9")
    run_length = bytearray(encoded(picture().convert("P"), "BMP"))
    run_length[30:34] = struct.pack("<I", 1)
    with pytest.raises(BrokenImage, match="run-length"):
        decode(bytes(run_length))
    text = zlib.compress(bytes(50_000_000))
    with pytest.raises(BrokenImage, match="too large"):
        decode(png(4, 4, b"\0" * 13 * 4, chunks=[(b"zTXt", b"comment\0\0" + text)]))


def as_tiff(values, **tags):
    """A TIFF of an array [H, W], as PIL writes it."""
    return encoded(Image.fromarray(values), "TIFF", tiffinfo={int(key[1:]): tags[key] for key in tags})


def test_tiff_pixels_are_those_of_the_same_png(capfd):
    for image in (picture(), picture().convert("L"), picture().quantize(16), picture().convert("RGBA")):
        for options in ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}):
            data = encoded(image, "TIFF", **options)
            assert np.array_equal(decode(data), decode(encoded(image, "PNG"))), (image.mode, options)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[decoding.ORIENTATION] = orientation
        turned = decode(encoded(picture(), "TIFF", tiffinfo={decoding.ORIENTATION: orientation}))
        assert np.array_equal(turned, decode(encoded(picture(), "PNG", exif=exif))), orientation
    with pytest.raises(BrokenImage):
        decode(encoded(picture(), "TIFF", compression="tiff_lzw")[:-900])
    assert capfd.readouterr() == ("", "")  # libtiff is silent


def test_more_than_eight_bits_by_one_rule(tmp_path):
    """16 bits are divided by 257, rounded, floats in [0, 1] multiplied by 255, in a file and in a PIL image."""
    values = np.array([[0, 128, 129, 257], [385, 386, 65406, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1], [1, 2, 254, 255]], np.uint8)
    floats = expected.astype(np.float32) / 255
    inverse = as_tiff(65535 - values, t262=0)
    for data in (as_tiff(values), encoded(Image.fromarray(values), "PNG"), as_tiff(floats), inverse):
        assert np.array_equal(decode(data), np.repeat(expected[..., None], 3, 2))
        assert np.array_equal(pixels_of(Image.open(io.BytesIO(data))), decode(data))
        (tmp_path / "a.tif").write_bytes(data)
        assert np.array_equal(pixels_of(tmp_path / "a.tif"), decode(data))
    unknown = (floats * 255, floats - 1, floats * np.nan, values.astype(np.int32))
    for bad in unknown:
        with pytest.raises(BrokenImage, match="store 0 to 1|store 8 or 16"):
            decode(as_tiff(bad))
        with pytest.raises(UserError, match="store 0 to 1|store 8 or 16"):
            pixels_of(Image.fromarray(bad))
