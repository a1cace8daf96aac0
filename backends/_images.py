"""Pictures as the bytes that are uploaded: the pixels that we would see ourselves, and no metadata.

A JPEG that lies upright is sent as it is, less its metadata segments; everything else, augmented
views too, as PNG, which changes no pixel. Where `max_side` is given, larger pictures are reduced.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import OrderedDict

import PIL.Image
from PIL.JpegImagePlugin import JpegImageFile

from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image, quote, read_file

CACHE_BYTES = 64 * 2**20
_JPEG = b"\xff\xd8\xff"
_EXIF_ORIENTATION = 0x0112
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)  # those others are of the pixels
_END, _COMMENT = 0xD9, 0xFE
_STANDALONE = {0x01, 0xD8}  # markers without a length
_KEPT_APP = {0xE0, 0xEE}  # JFIF and Adobe: they say how to read the colours


class Uploads:
    """Encodes pictures for the wire; the last ones are kept, up to `CACHE_BYTES`.

    Args:
        max_side: pixels of the longer side, at most; None sends pictures as large as they are.
    """

    def __init__(self, max_side: int | None = None) -> None:
        self._max_side = max_side
        self._kept: OrderedDict[str, str] = OrderedDict()
        self._size = 0

    def base64(self, image: Image) -> str:
        """The picture's bytes in base64.

        Raises:
            InputError: the file is gone, or is no longer the picture that was hashed.
        """
        text = self._kept.get(image.sha256)
        if text is None:
            text = base64.b64encode(encode(image, self._max_side)).decode("ascii")
            self._keep(image.sha256, text)
        else:
            self._kept.move_to_end(image.sha256)
        return text

    def data_uri(self, image: Image) -> str:
        """The picture as `data:image/...;base64,...`."""
        text = self.base64(image)
        kind = "jpeg" if text.startswith("/9j/") else "png"
        return f"data:image/{kind};base64,{text}"

    def _keep(self, sha256: str, text: str) -> None:
        self._kept[sha256] = text
        self._size += len(text)
        while self._size > CACHE_BYTES and len(self._kept) > 1:
            self._size -= len(self._kept.popitem(last=False)[1])


def encode(image: Image, max_side: int | None = None) -> bytes:
    """A JPEG or PNG with the picture's pixels and nothing else."""
    if image.is_file:
        data = read_file(image.path)
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise InputError(
                f"{quote(image.path)} has changed since it was read; load the data again"
            )
        if data.startswith(_JPEG) and _goes_as_it_is(data, max_side):
            return strip_jpeg(data)
    return _png(image.load(), max_side)


def _png(picture: PIL.Image.Image, max_side: int | None) -> bytes:
    if max_side is not None and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), PIL.Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _goes_as_it_is(data: bytes, max_side: int | None) -> bool:
    try:
        header = JpegImageFile(io.BytesIO(data))
        upright = header.getexif().get(_EXIF_ORIENTATION, 1) == 1
    except Exception:  # on hostile bytes a reader raises almost anything; pixels are then asked for
        return False
    fits = max_side is None or max(header.size) <= max_side
    return upright and fits and header.mode in ("RGB", "L")


def strip_jpeg(data: bytes) -> bytes:
    """A JPEG without metadata segments (EXIF, colour profile, comments) or what follows its end."""
    kept, at = bytearray(), 0
    while (found := _MARKER.search(data, at)) is not None:
        kept += data[at : found.start()]  # the pixels after the header of a scan
        marker, after = found[1][0], found.end()
        if marker == _END:
            return bytes(kept + b"\xff\xd9")
        at = after
        if marker not in _STANDALONE:
            at += int.from_bytes(data[after : after + 2], "big")
        if marker in _KEPT_APP or not (0xE0 <= marker <= 0xEF or marker == _COMMENT):
            kept += data[after - 2 : at]
    return bytes(kept + data[at:])
