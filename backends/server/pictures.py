"""Received bytes as the pictures that a backend asks for: files in a folder that nobody else sees.

Only bytes are taken, never a URL. A picture is decoded once here, before the model sees it, so that
what is no picture is refused by its place, and all of a request's pixels are bounded together.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from blackbox_vlm.errors import InputError
from blackbox_vlm.images import Image

from .refusal import Refusal

REMEMBERED = 65536  # pictures that were decoded before


class Pictures:
    """Turns uploads into pictures. Used by one thread at a time."""

    def __init__(self, most_pixels: int) -> None:
        self._most = most_pixels
        self._pixels: OrderedDict[str, int] = OrderedDict()

    @contextmanager
    def received(self, uploads: Sequence[str]) -> Iterator[tuple[Image, ...]]:
        """The pictures of one request, from base64; gone at the end.

        Raises:
            Refusal: one of them is no picture, or all together have too many pixels.
        """
        if not uploads:
            yield ()
            return
        with TemporaryDirectory(prefix="blackbox-vlm-") as folder:  # mode 0700
            left, images = self._most, []
            for place, upload in enumerate(uploads):
                images.append(_stored(upload, place, Path(folder)))
                left -= self._measure(images[-1], place)
                if left < 0:
                    raise Refusal(
                        422,
                        f"the images have more than {self._most} pixels together; send fewer, or "
                        "smaller ones",
                    )
            yield tuple(images)

    def _measure(self, image: Image, place: int) -> int:
        if image.sha256 not in self._pixels:
            self._pixels[image.sha256] = _pixels(image, place)
        self._pixels.move_to_end(image.sha256)
        if len(self._pixels) > REMEMBERED:
            self._pixels.popitem(last=False)
        return self._pixels[image.sha256]


def _stored(upload: str, place: int, folder: Path) -> Image:
    try:
        data = base64.b64decode(upload, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, f"image {place} is not base64") from None
    path = folder / f"{place}"
    path.write_bytes(data)
    return Image(path, hashlib.sha256(data).hexdigest())


def _pixels(image: Image, place: int) -> int:
    try:
        picture = image.load()
    except InputError:
        pass  # its message shows where the file lies
    else:
        return picture.width * picture.height
    raise Refusal(
        422,
        f"image {place} is no picture that is read here; wanted a JPEG, PNG, WebP, GIF, BMP or "
        "TIFF, whole, and of at most 50 megapixels",
    )
