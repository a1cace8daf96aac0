"""Serves any backend as an HTTP endpoint: `blackbox-vlm serve-blackbox`.

    from blackbox_vlm.backend import open_backend
    from blackbox_vlm.backends.server import running_server

    with running_server(open_backend("local", access="scores")) as url:
        ...

One server speaks four protocols: our own (`/blackbox/v1`, described by `/openapi.json`), the
Hugging Face shape (`/hf`), the OpenAI embeddings shape (`/v1/embeddings`) and KServe V2 (`/v2`). It
keeps its own books (`/usage`), so that what a client believes to have spent can be compared.
"""

from .app import create_app
from .declaration import PATHS as PROTOCOLS
from .declaration import declaration
from .listening import bind, running_server, serve, url_of
from .settings import LOOPBACK_NAMES, Rate, ServerSettings

__all__ = [
    "LOOPBACK_NAMES",
    "PROTOCOLS",
    "Rate",
    "ServerSettings",
    "bind",
    "create_app",
    "declaration",
    "running_server",
    "serve",
    "url_of",
]
