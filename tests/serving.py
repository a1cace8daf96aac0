"""Our server in tests: asked in-process, with pictures made for it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import PIL.Image
from blackbox_vlm.backends.server import ServerSettings, create_app
from doubles import LinearWorld, declare

from blackbox_vlm.backend import Access, Backend
from blackbox_vlm.running import run_sync

URL = "http://127.0.0.1:8000"


def picture(seed: int = 0, side: int = 8) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def encoded(data: bytes | None = None) -> str:
    """Base64 of a picture."""
    return base64.b64encode(picture() if data is None else data).decode("ascii")


def asked(texts: Sequence[str] = ("cat", "dog"), **more: Any) -> dict[str, Any]:
    """The content of a request for scores in our own protocol."""
    return {"images": [encoded()], "texts": list(texts), **more}


def world(access: Access = Access.SCORES, **changes: Any) -> LinearWorld:
    """A backend without a model."""
    return LinearWorld(declare(access, **changes))


def app_of(backend: Backend | None = None, **settings: Any) -> Any:
    """The application; a token stays out unless it is given."""
    return create_app(world() if backend is None else backend, ServerSettings(**settings))


def call(app: Any, method: str, path: str, **content: Any) -> httpx.Response:
    """One request, in-process."""

    async def send() -> httpx.Response:
        inner = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=inner, base_url=URL) as client:
            return await client.request(method, path, **content)

    return run_sync(send())


def post(app: Any, path: str, content: Any, **headers: str) -> httpx.Response:
    """One POST of JSON, in-process; `_` in a header's name stands for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return call(app, "POST", path, json=content, headers=named)


def usage(app: Any, **headers: str) -> dict[str, Any]:
    """The server's own books."""
    found: dict[str, Any] = call(app, "GET", "/usage", headers=headers).json()
    return found
