"""`aegpo serve-reward`: any registered reward behind HTTP, for reward `remote` or anything that speaks its bodies."""

from __future__ import annotations

import asyncio
import os
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from aegpo.commands.listening import address, listen
from aegpo.config.marks import refuse
from aegpo.config.parsing import parse
from aegpo.config.validation import validate
from aegpo.core import contracts, first_edition
from aegpo.core.foreign import of_user
from aegpo.core.interfaces import Reward
from aegpo.core.parts import RewardSpec
from aegpo.core.registry import Registry
from aegpo.core.signatures import built
from aegpo.errors import AegpoError
from aegpo.prompts.lists import lacking, quoted
from aegpo.rewards import tokens, wire

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from torch import Tensor

    from aegpo.core.records import Prompt

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_AT_A_TIME = 4  # requests that are unpacked while one is scored; as many as a run sends at first


@dataclass(frozen=True)
class ServeRequest:
    """What the command line asked for."""

    kind: str
    settings: tuple[str, ...] = ()  # field=value
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    device: str = "auto"
    token_env: str | None = None
    max_bytes: int = wire.MOST_OF_REQUESTS


def serve(request: ServeRequest, registry: Registry[RewardSpec]) -> None:
    """Serves a reward until it is told to stop.

    Raises:
        AegpoError: for a mistake in the request, an address that is taken, or a library that is missing.
    """
    spec, token = reward_spec(request, registry), _token(request)
    try:
        import fastapi  # noqa: F401 - asked for before the reward is loaded
        import uvicorn
    except ImportError as error:
        raise AegpoError(f'serve-reward needs {error.name}; run  pip install "aegpo[serve]"') from error
    listening = listen(request.host, request.port)
    reward = built("reward", spec.label, partial(spec.build, _device(request.device)), Reward, kind=spec.kind)
    print(f"serving reward {spec.label!r} at {address(listening)}", flush=True)
    app = make_app(Scoring(spec, reward), token, request.max_bytes)
    # Whatever else is installed: h11 has a limit for headers, and nothing here talks over web sockets.
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])


def reward_spec(request: ServeRequest, registry: Registry[RewardSpec]) -> RewardSpec:
    """The reward a request names, with its settings.

    Raises:
        AegpoError: for an unknown kind or setting, with all that is wrong.
    """
    cls, data = registry.get(request.kind), dict[str, Any](kind=request.kind)
    for setting in request.settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise AegpoError(f"--set {setting}: there is no value; write  --set FIELD=VALUE")
        value, mistakes = parse(text, "--set", lines=False, indent=f"{name}=")
        refuse(mistakes)
        data[name] = None if value is None else value.plain
    spec, findings = validate(cls, data)
    if spec is None:
        raise AegpoError("\n".join(f"--set {'.'.join(map(str, each.location))}: {each.message}" for each in findings))
    if spec.frames is not None:
        raise AegpoError(
            f"--set frames={spec.frames}: a server scores what it is sent; name 'frames' in the experiment, at its "
            "reward 'remote', which then sends frames one by one"
        )
    if spec.group_wise:
        raise AegpoError(
            f"reward {spec.kind!r} compares all images of a prompt, but a server sees them in batches; "
            "name it under 'rewards' of the experiment instead"
        )
    return spec


class Scoring:
    """A reward that is asked once at a time, and what it answers in words of HTTP."""

    def __init__(self, spec: RewardSpec, reward: Reward) -> None:
        self.spec, self._reward, self._turn = spec, reward, threading.Lock()

    def answer(
        self, body: bytes, content_type: str, max_bytes: int = wire.MOST_OF_REQUESTS
    ) -> tuple[int, dict[str, Any]]:
        """A status and the JSON that goes with it: 200 with scores, 4xx for a wrong request, 500 for a failure.

        What is in the body may take `max_bytes` as well. Images of prompts are files while the reward scores, and no
        longer.
        """
        with TemporaryDirectory(prefix="aegpo-") as folder:
            try:
                images, prompts = wire.unpack(body, content_type, Path(folder), max_bytes)
            except wire.TooLargeError as error:
                return 413, {"detail": str(error)}
            except AegpoError as error:
                return 400, {"detail": str(error)}
            return self._answer(images, prompts)

    def _answer(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[int, dict[str, Any]]:
        import torch

        for message in (*_unread(self.spec, images), *lacking([self.spec], quoted(prompts))):
            return 422, {"detail": message}
        try:
            with self._turn, torch.no_grad():
                scores: Tensor = self._reward.score(images, prompts)
            contracts.check_scores(self.spec.label, scores, prompts)
        except AegpoError as error:  # of these images; the same question has the same answer
            return 422, {"detail": str(error)}
        except BaseException as error:  # a reward that exits does not end the server
            if of_user(error):
                raise
            traceback.print_exc()
            return 500, {"detail": f"reward {self.spec.label!r} failed with {first_edition.told(error, 'reward')}"}
        return 200, {"scores": scores.tolist()}


def _unread(spec: RewardSpec, images: Tensor) -> Iterator[str]:
    """Why a reward cannot score what it is sent, if it cannot."""
    if images.ndim == 5 and spec.media == "image":
        yield (
            f"reward {spec.label!r} reads images, but was sent videos; name 'frames: mean', 'first' or 'min' in the "
            "experiment, at its reward 'remote', which then sends frames one by one"
        )
    if images.ndim == 4 and spec.media == "video":
        yield f"reward {spec.label!r} reads videos, but was sent images; leave 'frames' out, or serve another reward"


def make_app(scoring: Scoring, token: str | None, max_bytes: int) -> FastAPI:
    """POST /score and GET /health; with a token, only for who knows it."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect

    turns = asyncio.Semaphore(_AT_A_TIME)
    app = FastAPI(title=f"aegpo reward {scoring.spec.label}", docs_url=None, redoc_url=None, openapi_url=None)

    def refused(request: Request) -> JSONResponse | None:
        if token is None or tokens.is_bearer(request.headers.get("authorization", ""), token):
            return None
        return JSONResponse({"detail": "the header 'Authorization: Bearer TOKEN' is missing or wrong"}, 401)

    async def health(request: Request) -> JSONResponse:
        return refused(request) or JSONResponse(
            {"status": "ok", "protocol": wire.PROTOCOL, "reward": scoring.spec.model_dump(mode="json")}
        )

    async def score(request: Request) -> JSONResponse:
        answer = refused(request)
        if answer is not None:
            return answer
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            return JSONResponse({"detail": f"content encoding {encoding!r:.40}; 'identity' was expected"}, 400)
        try:
            body = await _read(request, max_bytes)
        except ClientDisconnect:
            return JSONResponse({"detail": "the body broke off"}, 400)  # nobody hears it
        if body is None:
            return JSONResponse({"detail": f"the body is larger than {max_bytes} bytes; send fewer images"}, 413)
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        async with turns:
            status, content = await run_in_threadpool(scoring.answer, body, content_type, max_bytes)
        return JSONResponse(content, status)

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/score", score, methods=["POST"])
    return app


async def _read(request: Request, max_bytes: int) -> bytes | None:
    """The body, or None as soon as it is known to be too large."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):  # else counted as it comes
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            return None
    return bytes(body)


def _token(request: ServeRequest, environment: Mapping[str, str] = os.environ) -> str | None:
    if request.token_env is None:
        if request.host not in LOOPBACK:
            raise AegpoError(
                f"--host {request.host} can be reached from other machines; name a variable with a token by "
                "--token-env, or serve on 127.0.0.1"
            )
        return None
    return tokens.read_token(request.token_env, "--token-env", environment)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise AegpoError(f"--device {name} was asked for, but torch sees no CUDA device; use 'auto' or 'cpu'")
    return torch.device(name)
