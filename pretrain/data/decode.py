"""Decode an image to pixels: uint8 RGB, upright, bounded in size; or raise :class:`BrokenImage`.

It is the one decoder: of pre-training, both detection engines, segmentation, prediction and the analyses.

Formats are JPEG, PNG (APNG), WebP, BMP, GIF and TIFF, recognized by their content, never by a name. Only the
first frame is decoded. Grayscale, palette and CMYK become RGB, transparency is dropped (the colors below it
stay) and color profiles are ignored, as PIL converts.

More than 8 bits: grayscale is scaled from the range that its bits can hold, rounded (16 bits: divided by 257;
12 bits: 4095 is white); 16-bit RGB keeps the high byte. Floats in [0, 1] are multiplied by 255 and rounded.
Floats beyond that, and integers that are signed or of 32 bits, count as broken: nothing says what is white, and
a range that is taken from each image would change its brightness with its content.

Memory: a header that declares more than ``max_mpx`` is refused before a pixel is decoded, and the parts of a
file that expand (text, profiles) are bounded by PIL, as is WebP at 179 million pixels. Decoding takes at most
about 14 bytes a pixel.

An image is broken if PIL says so, if it is a PNG with a wrong checksum, or if it is a JPEG of one scan whose
coded data ends before the image (decoders silently fill the rest with gray). Other changed bytes of a JPEG or
WebP cannot be detected. ``simplejpeg``, if it is installed, decodes whole plain JPEGs 1.5 times as fast, to
the same pixels. PIL judges all others, so that what counts as broken does not depend on it.
"""

import ctypes
import io
import logging
import re
import warnings
import zlib
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pretrain.views.pixels import resize

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Opened by class, not by Image.open: these formats alone, and our bound on the size in place of PIL's.
FORMATS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImagePlugin.TiffImageFile),  # +: BigTIFF
)
ORIENTATION = 0x0112  # EXIF's tag
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value
MAX_SCANS = 200  # of a progressive JPEG, each a pass over all pixels; encoders write about 10
MAX_SIDE_PX = 2**24  # from twice this on a row is too long for PIL, which then says that there is no memory
FILLER = bytes(16)  # what a Huffman decoder may look ahead

# PIL warns of bad EXIF and of palettes with transparency, once a text: thousands of lines in a run
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # what it logs, it also raises
try:  # libtiff writes of each unknown tag and each damage to stderr; what matters is PIL's exception
    _libtiff = ctypes.CDLL(Image.core.__file__)  # finds the library that PIL itself is linked with
    _libtiff.TIFFSetErrorHandler(None)
    _libtiff.TIFFSetWarningHandler(None)
except (OSError, AttributeError):
    pass  # built without it, or in a way that hides it


class BrokenImage(Exception):
    """The file is not a readable image; ``args[0]`` says why, in one line."""


def decode(data: bytes, max_side_px: int = 0, max_mpx: float = 200.0) -> np.ndarray:
    """An encoded image as uint8 RGB [H, W, 3], C-contiguous and writable, upright by its EXIF orientation.

    Args:
        data: the content of an image file.
        max_side_px: an image with a longer side is scaled down to it (antialiased bicubic), a JPEG of at
            least twice that size by its DCT first; 0: never.
        max_mpx: million pixels from which an image counts as broken.

    Raises:
        BrokenImage: anything is wrong with the file.
        MemoryError: the machine lacks memory for a file of an allowed size; the file may be fine.
    """
    image = None
    try:
        image = _open(data, max_mpx)
        pixels = _pixels(image, data, max_side_px)
        return np.ascontiguousarray(upright(_bounded(pixels, max_side_px), image))
    # PIL raises many kinds: OSError, SyntaxError, ValueError, MemoryError, struct.error, zlib.error
    except Exception as error:
        if isinstance(error, BrokenImage) or isinstance(error, MemoryError) and image is not None:
            raise
        raise BrokenImage(" ".join(str(error).split()) or type(error).__name__) from error


def _open(data: bytes, max_mpx: float) -> ImageFile.ImageFile:
    """Read the header and check the size; no pixel is decoded."""
    image = next((open_as(io.BytesIO(data)) for magic, open_as in FORMATS if magic.match(data)), None)
    if image is None:
        raise BrokenImage("empty file" if not data else "no JPEG, PNG, WebP, BMP, GIF or TIFF")
    width, height = image.size
    if width < 1 or height < 1:
        raise BrokenImage(f"declares {width} x {height} pixels")
    if max(width, height) > MAX_SIDE_PX:
        raise BrokenImage(f"declares {width} x {height} pixels, a side of more than {MAX_SIDE_PX}")
    if width * height > max_mpx * 1e6:
        raise BrokenImage(f"declares {width} x {height} pixels, more than max_mpx={max_mpx:g} million")
    return image


def _pixels(image: ImageFile.ImageFile, data: bytes, max_side_px: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] as stored; a JPEG much larger than ``max_side_px`` at a reduced size."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        return _jpeg_pixels(image, data, max_side_px)
    if isinstance(image, PngImagePlugin.PngImageFile):
        check_png(data)
    if isinstance(image, BmpImagePlugin.BmpImageFile) and image.tile[0][0] == "bmp_rle":
        # PIL decodes it byte by byte in Python: minutes for a large one
        raise BrokenImage("run-length coded BMP")
    return rgb_of(image)


def rgb_of(image: Image.Image) -> np.ndarray:
    """The pixels of a PIL image as uint8 RGB [H, W, 3], as stored (not turned), by the rule of this module.

    Raises:
        BrokenImage: floats outside [0, 1], or integers of no known range.
    """
    if image.mode == "F":
        floats = np.asarray(image)
        if not (floats.min() >= 0 and floats.max() <= 1):  # nor a NaN
            raise BrokenImage(f"floats from {floats.min():g} to {floats.max():g}; store 0 to 1, or integers")
        return _gray(np.rint(floats * 255))
    if image.mode.startswith("I"):
        tags: Any = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        if image.mode == "I" and not isinstance(image, PngImagePlugin.PngImageFile):
            raise BrokenImage("signed or 32-bit integers have no known range; store 8 or 16 bits")
        most = 2 ** tags.get(BITS, (16,))[0] - 1
        values = np.asarray(image).astype(np.uint32)  # [H, W]
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # PIL inverts 8 bits and less
            values = most - values
        return _gray((values * 255 + most // 2) // most)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


def _jpeg_pixels(image: JpegImagePlugin.JpegImageFile, data: bytes, max_side_px: int) -> np.ndarray:
    # one holds the blocks' means alone
    if "progression" in image.info and not 2 <= data.count(b"\xff\xda") <= MAX_SCANS:
        raise BrokenImage(f"progressive JPEG of fewer than 2 or more than {MAX_SCANS} scans")
    reduce = next((k for k in (8, 4, 2) if max_side_px and max(image.size) >= k * max_side_px), 1)
    if reduce > 1:
        image.draft(None, (max(1, image.width // reduce), max(1, image.height // reduce)))
    elif simplejpeg is not None and image.mode in ("RGB", "L"):
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=True)  # strict: libjpeg had nothing to remark
        except ValueError:
            pass  # PIL judges
    pixels = rgb_of(image)
    # The luma of the last pixel may be the gray of missing data; its color may come from the block before
    if abs(pixels[-1, -1] @ [0.299, 0.587, 0.114] - 128) < 2 and _ends_early(data, image.layers):
        raise BrokenImage("JPEG data ends before the picture")
    return pixels


def _ends_early(data: bytes, n_components: int) -> bool:
    """Whether the coded data of a JPEG of one scan ends (with a marker: the file's end alone is PIL's error)
    before the image: decoded again without what follows, a decoder which needs more reports it."""
    at, marker, restarts = 2, 0, False
    while marker != 0xDA:  # to the start of the scan, segment by segment
        if data[at] != 0xFF:
            return True
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        restarts |= marker == 0xDD and data[at + 4 : at + 6] != b"\0\0"
        at += 2 + length
    # the rest follows in further scans
    if data[at + 2 - length] != n_components or data[at - 3 : at] != b"\0\x3f\0":
        return False
    end = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]" if restarts else rb"\xff[^\x00\xff]").search(data, at)
    try:
        JpegImagePlugin.JpegImageFile(io.BytesIO(data[: end.start() if end else len(data)] + FILLER)).load()
    except OSError:
        return True
    return False


def check_png(data: bytes) -> None:
    """Check the checksums of all chunks up to the end; PIL does not check those of the pixels.

    Raises:
        BrokenImage: says where it is cut off or wrong.
    """
    at = 8
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 8 + int.from_bytes(data[at : at + 4], "big")
        if kind == b"IEND":
            return
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BrokenImage(f"PNG: wrong checksum or cut off at byte {at}")
        at = end + 4
    raise BrokenImage("PNG: cut off, it has no end")


def _bounded(pixels: np.ndarray, max_side_px: int) -> np.ndarray:
    """Scaled down to a longer side of ``max_side_px``."""
    height, width = pixels.shape[:2]
    scale = max_side_px / max(height, width)
    if not max_side_px or scale >= 1:
        return pixels
    return resize(pixels, (max(1, round(height * scale)), max(1, round(width * scale))))


def upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turned and mirrored by EXIF's orientation (PIL itself turns a TIFF); a damaged EXIF block is ignored."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # as in `decode`
        orientation = 1
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
