"""The application: a backend, its protocols, and the guard before them.

Only what the access level gives has a route. Errors are one sentence, `{"error": ...}`, in every
protocol, and repeat nothing of what was sent. There is no page of documentation, only
`/openapi.json`, no CORS and no way to change the server from outside.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from blackbox_vlm._version import __version__
from blackbox_vlm.backend import Backend

from . import blackbox, huggingface, kserve, openai
from .billing import Bill
from .guards import Guard
from .refusal import Refusal, problem
from .service import Service
from .settings import ServerSettings
from .wire import PROBLEMS, new_router

logger = logging.getLogger(__name__)


def create_app(backend: Backend, settings: ServerSettings | None = None) -> FastAPI:
    """The ASGI application that serves a backend; the backend stays the caller's to close.

    Args:
        backend: answers what is asked.
        settings: the owner's demands; none, if left out.
    """
    settings = ServerSettings() if settings is None else settings
    service = Service(backend, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="Blackbox-VLM endpoint",
        version=__version__,
        description="A vision-language model of which only the answers can be seen.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    guarded = [Depends(_bearer)] if settings.token is not None else []
    for protocol in (blackbox, huggingface, openai, kserve):
        app.include_router(protocol.routes(service), dependencies=guarded)
    app.include_router(_usage(service.bill), dependencies=guarded)
    app.include_router(kserve.health())
    _add_errors(app, service)
    app.add_middleware(Guard, settings=settings, bill=service.bill)
    return app


def _usage(bill: Bill) -> APIRouter:
    router = new_router()

    @router.get("/usage", responses=PROBLEMS)
    async def usage() -> Bill:
        """What was asked and billed since the server started; free."""
        return bill

    return router


async def _bearer(
    token: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> None:
    """Describes the token in `/openapi.json`; the guard has checked it before."""


def _add_errors(app: FastAPI, service: Service) -> None:
    async def refused(request: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        return _problem(request, error.status, error.message, error.headers)

    async def no_route(request: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        told = str(error.detail)
        if error.status_code == 404:
            paths = ", ".join(app.openapi()["paths"])
            access = service.offer.access.value
            told = f"no such path here; with {access!r} access there are {paths}"
        return _problem(request, error.status_code, told, dict(error.headers or {}))

    async def invalid(request: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _problem(request, 422, _first(error))

    async def failed(request: HttpRequest, error: Exception) -> JSONResponse:
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("%s\n%s", type(error).__name__, where)  # its text may repeat the request
        return _problem(request, 500, "the server failed; its log says where")

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, failed)


def _problem(
    request: HttpRequest, status: int, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(problem(request.url.path, message), status, headers=headers)


def _first(error: RequestValidationError) -> str:
    """Where the first problem is and what is wanted there; no value, and no name that was sent."""
    problem = error.errors()[0]
    place = problem["loc"][:-1] if problem["type"] == "extra_forbidden" else problem["loc"]
    return f"{'.'.join(map(str, place))}: {problem['msg']}"
