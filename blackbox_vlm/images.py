"""Images as files that are not trusted: found, hashed, checked and decoded under limits.

An image is its bytes: two files with the same sha256 are the same picture to every method, cache
and ledger. No pixels are kept; `Image.load` decodes again when they are wanted.

Limits, checked in this order: a regular file, at most `MAX_BYTES`, first bytes of one of our
six formats, a header that declares at most `MAX_PIXELS`, then a full decode. The format's
reader is called directly, not through `PIL.Image.open`: that function guards against bombs with a
module global and a warning, which belong to the user's program and not to us.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from blackbox_vlm.errors import InputError

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
MAX_ASPECT = 100  # a 60,000 x 1 picture is 12 GB once its short side is resized to 224
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

_LARGE_PIXELS = 8_000_000  # pictures above this are decoded one at a time: memory stays bounded
_BATCH = 64
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what turns the picture upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_READERS: tuple[tuple[bytes, Callable[[io.BytesIO], ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
)


@dataclass(frozen=True, slots=True)
class Image:
    """A file with a picture, identified by the sha256 (hex) of its bytes; holds no pixels."""

    path: Path
    sha256: str

    @property
    def is_file(self) -> bool:
        """Whether the file at `path` is the picture, and not what it was made from."""
        return True

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Image:
        """Read and hash the file. The picture itself is checked by `load` or `check_images`.

        Raises InputError: no such file, not a regular file, empty, or above `MAX_BYTES`.
        """
        where = Path(path).absolute()
        return cls(where, hashlib.sha256(read_file(where)).hexdigest())

    def load(self) -> PIL.Image.Image:
        """The picture as 8-bit RGB, upright, on white where it is transparent, first frame only.

        The result carries no metadata (EXIF, colour profile). Raises InputError: the file cannot
        be read or decoded, or its bytes are no longer the ones that were hashed.
        """
        data = read_file(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise InputError(
                f"{quote(self.path)} has changed since it was read; restore it, or load the data"
                " again"
            )
        try:
            return _to_rgb(_open(data))
        except _Unusable as error:
            raise InputError(f"{quote(self.path)}: {error}; replace or remove it") from None


@dataclass(frozen=True, slots=True)
class BrokenFile:
    """A file that cannot be used, and why in a few words that are safe to print."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{quote(self.path)} ({self.reason})"


class _Unusable(Exception):
    """The bytes are not a picture that we take; the text says why."""


def quote(value: object) -> str:
    """Untrusted text for a message: quoted, on one line, control and bidi characters escaped."""
    text = str(value)
    return repr(text if len(text) <= 200 else text[:197] + "...")


def find_images(folder: Path) -> list[Path]:
    """Files with an image's suffix below `folder`, sorted; hidden names are left out.

    Links to folders are listed, not followed, so that `check_images` reports them. Raises
    InputError when a folder cannot be read: what it holds would be lost in silence.
    """
    found, todo = [], [folder]
    while todo:
        for entry in list_folder(todo.pop()):
            if entry.is_dir(follow_symlinks=False):
                todo.append(Path(entry.path))
            elif leads_to_folder(entry) or os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                found.append(Path(entry.path))
    return sorted(found)


def leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """Whether the entry is a folder or a link to one; False for a link that leads nowhere."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """Entries that are not hidden, sorted by name. Raises InputError: it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except (OSError, ValueError) as error:
        where, cause = quote(folder), _cause(error)
        raise InputError(f"cannot list {where}: {cause}; wanted a readable folder") from None
    return sorted(shown, key=lambda entry: entry.name)


def read_file(path: Path) -> bytes:
    """Bytes of a regular file. Raises InputError: unreadable, special, empty, above `MAX_BYTES`."""
    try:
        return _read(path)
    except _Unusable as error:
        raise InputError(
            f"{quote(path)}: {error}; wanted a readable file of 1 byte to {MAX_BYTES >> 20} MiB"
        ) from None


def check_images(paths: Iterable[Path], root: Path) -> list[Image | BrokenFile]:
    """Hash and fully decode every file once, before any query is paid for.

    Returns one entry per path, in order: an `Image`, or a `BrokenFile` for what cannot be read or
    decoded and for what leads out of `root`. Runs in a few threads; memory holds a few pictures,
    of which one large one, whatever the number of files.
    """
    files = list(paths)
    batches = [files[i : i + _BATCH] for i in range(0, len(files), _BATCH)]
    home, large = root.resolve(), threading.Lock()

    def check(batch: Sequence[Path]) -> list[Image | BrokenFile]:
        return [_check(path, home, large) for path in batch]

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return [result for batch in pool.map(check, batches) for result in batch]


def _check(path: Path, home: Path, large: threading.Lock) -> Image | BrokenFile:
    try:
        _inside(path, home)
        data = _read(path)
        image = _open(data)
        with large if image.width * image.height > _LARGE_PIXELS else contextlib.nullcontext():
            _to_rgb(image)
    except _Unusable as error:
        return BrokenFile(path, str(error))
    return Image(path, hashlib.sha256(data).hexdigest())


def _inside(path: Path, home: Path) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _Unusable(_cause(error)) from None
    if not target.is_relative_to(home):
        raise _Unusable("leads out of the data folder")


def _read(path: Path) -> bytes:
    try:
        with open(_open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size  # read(n) allocates n bytes, whatever there is
            data = file.read(min(size, MAX_BYTES) + 1)
    except (OSError, ValueError) as error:
        raise _Unusable(_cause(error)) from None
    if not data:
        raise _Unusable("empty file")
    if len(data) > MAX_BYTES:
        raise _Unusable(f"more than {MAX_BYTES >> 20} MiB")
    return data


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file; a FIFO or device is not opened, so nothing can block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise _Unusable("not a regular file")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # swapped since the first look
        os.close(descriptor)
        raise _Unusable("not a regular file")
    return descriptor


def _open(data: bytes) -> ImageFile:
    """The reader of one of our formats after its header, which is inside the limits."""
    reader = next((reader for magic, reader in _READERS if data.startswith(magic)), None)
    if reader is None:
        raise _Unusable("not a JPEG, PNG, WebP, GIF, BMP or TIFF picture")
    try:
        image = reader(io.BytesIO(data))
    except Exception as error:  # on hostile bytes a reader raises almost anything
        raise _Unusable(f"damaged header: {_cause(error)}") from None
    _check_size(*image.size)
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise _Unusable("32-bit pixels, which have no agreed range; convert it to 8 bits")
    return image


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise _Unusable("no pixels")
    if width * height > MAX_PIXELS:
        raise _Unusable(f"{width} x {height} pixels, above {MAX_PIXELS / 1e6:.0f} Mpx")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Unusable(f"{width} x {height} pixels, one side above {MAX_ASPECT} times the other")


def _to_rgb(image: ImageFile) -> PIL.Image.Image:
    try:
        image.load()  # all of it: a truncated file raises here
        picture = _upright(_flatten(_eight_bit(image)), _orientation(image))
    except Exception as error:  # as in _open; MemoryError included
        raise _Unusable(f"truncated or damaged: {_cause(error)}") from None
    picture.info = {}
    return picture


def _eight_bit(image: ImageFile) -> PIL.Image.Image:
    """16-bit grey to 8 bits by the high byte, as Pillow does for 16-bit colour; it clips grey."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return PIL.Image.fromarray(grey)
    return image


def _flatten(image: PIL.Image.Image) -> PIL.Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = PIL.Image.new("RGB", layer.size, "white")
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas


def _upright(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _orientation(image: ImageFile) -> int:
    """EXIF orientation, 1 to 8 (1 is upright); TIFF's reader has already applied its own."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # unreadable metadata does not make the picture unreadable
        return 1


def _cause(error: Exception) -> str:
    """The error in a few printable words: its text can hold bytes of the file."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in str(text))[:100]
