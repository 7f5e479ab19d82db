"""`aegpo watch`: a page at this machine that shows an experiment's runs while they go on. It reads and never writes."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.commands.listening import address, listen
from aegpo.errors import AegpoError
from aegpo.report.watch import page
from aegpo.report.watch.folder import Watched

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"  # nobody else is to read what runs say
# Nothing from elsewhere, and no script but our own: names and prompts in the page are text, whatever they are.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class WatchRequest:
    """What the command line asked for."""

    folder: Path
    port: int = 8001  # 0: any that is free


def watch(request: WatchRequest) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        AegpoError: if the folder is no experiment's, the port is taken, or a library is missing.
    """
    watched = Watched(request.folder)
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise AegpoError(f'watch needs {error.name}; run  pip install "aegpo[serve]"') from error
    listening = listen(HOST, request.port)
    print(f"watching {request.folder} at {address(listening)}  (Ctrl-C ends)", flush=True)
    config = uvicorn.Config(
        make_app(watched), http="h11", ws="none", lifespan="off", log_level="warning", timeout_graceful_shutdown=1
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


class _Pages:
    """The parts of the page, made by one thread at a time; results are made once for each version."""

    def __init__(self, watched: Watched) -> None:
        self._watched, self._turn = watched, threading.Lock()
        self._results: tuple[str, str] | None = None

    def whole(self) -> str:
        """The page."""
        with self._turn:
            version = self._watched.version()
            return page.whole_page(self._watched, version, self._made(version))

    def progress(self) -> dict[str, str]:
        """How runs stand, and the version of the results."""
        with self._turn:
            return {"version": self._watched.version(), "html": page.progress(self._watched)}

    def results(self) -> str:
        """What evaluations have found."""
        with self._turn:
            return self._made(self._watched.version())

    def _made(self, version: str) -> str:
        if self._results is None or self._results[0] != version:
            self._results = version, page.results(self._watched)
        return self._results[1]


def make_app(watched: Watched) -> FastAPI:
    """GET /, /watch.js, /progress, /results and /images/ARM/SEED/STEP; for who asks for this machine by its name."""
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    pages = _Pages(watched)
    app = FastAPI(title="aegpo watch", docs_url=None, redoc_url=None, openapi_url=None)
    # A page elsewhere whose name is made to lead here must not read what is shown.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    async def index(request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(pages.whole), headers=HEADERS)

    async def script(request: Request) -> Response:
        return PlainTextResponse(page.script(), headers=HEADERS, media_type="text/javascript")

    async def progress(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(pages.progress), headers=HEADERS)

    async def results(request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(pages.results), headers=HEADERS)

    async def image(request: Request) -> Response:
        asked = request.path_params
        path = watched.image(asked["arm"], asked["seed"], asked["step"])
        if path is None:
            return PlainTextResponse("there are no such images", 404, headers=HEADERS)
        return FileResponse(path, headers=HEADERS, media_type="image/png")

    app.add_route("/", index, methods=["GET"])
    app.add_route("/watch.js", script, methods=["GET"])
    app.add_route("/progress", progress, methods=["GET"])
    app.add_route("/results", results, methods=["GET"])
    app.add_route("/images/{arm}/{seed:int}/{step:int}", image, methods=["GET"])
    return app
