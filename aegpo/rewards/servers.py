"""Asking a server: retries that wait longer each time, a token that is never written down, errors in words."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from aegpo.core.addresses import check_server
from aegpo.core.parts import RewardSpec
from aegpo.core.sections import Positive
from aegpo.errors import AegpoError

if TYPE_CHECKING:
    from requests import Response
    from urllib3.util.retry import Retry

T = TypeVar("T")
R = TypeVar("R")

_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses that may pass; others are the request's own fault
_LONGEST_WAIT = 30.0  # seconds
_LONGEST_HISTORY = 64  # attempts that pauses grow by: 2 to the power of some thousands is no float
_SHOWN = 300  # characters of an answer in an error


class ServerRewardSpec(RewardSpec):
    """A reward that a server computes."""

    url: str = Field(description="where the server is, e.g. http://127.0.0.1:8000")
    timeout: float = Field(60.0, gt=0, description="seconds an answer may take")
    retries: int = Field(5, ge=0, description="further attempts when the server is away, late or overloaded")
    backoff: float = Field(
        1.0,
        ge=0,
        description="seconds before the first further attempt, unless the server names a time; doubled each time, 30 "
        "at most",
    )
    concurrency: Positive = Field(4, description="requests at a time")
    token_env: str | None = Field(
        None, description="environment variable with the server's token; the token itself is never recorded"
    )

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        check_server(url)
        return url.rstrip("/")

    @property
    def lane(self) -> str:
        """Rewards on a server score while others do."""
        return urlsplit(self.url).netloc

    @property
    def early(self) -> int:
        """As many as the server is asked at a time."""
        return self.concurrency


class Server:
    """One server as a reward sees it; may be asked from several threads."""

    def __init__(self, spec: ServerRewardSpec) -> None:
        """Nothing is asked yet.

        Raises:
            AegpoError: if the environment variable with the token is not set.
        """
        import requests
        from requests.adapters import HTTPAdapter

        self.who, self.url = f"reward {spec.label!r}", spec.url
        self._spec = spec
        self._retry = _retries(spec)
        self._session = requests.Session()
        self._turns = threading.BoundedSemaphore(spec.concurrency)  # of requests, whoever sends them
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=spec.concurrency))
        if spec.token_env is not None:
            token = os.environ.get(spec.token_env)
            if not token:
                raise AegpoError(
                    f"{self.who}: 'token_env' names {spec.token_env!r}, which is not set in the environment"
                )
            self._session.headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str) -> Any:
        """The JSON that GET answers with."""
        return self._ask("GET", path, None, {})

    def post(self, path: str, body: bytes, content_type: str) -> Any:
        """The JSON that POST answers with."""
        return self._ask("POST", path, body, {"Content-Type": content_type})

    def each(self, ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`ask` of every item, `concurrency` at a time, in order; the first failure cancels what was not begun."""
        with ThreadPoolExecutor(self._spec.concurrency) as pool:
            answers = [pool.submit(ask, item) for item in items]
            try:
                return [answer.result() for answer in answers]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Any:
        import requests
        from urllib3.exceptions import MaxRetryError

        url, retry = self._spec.url + path, self._retry
        while True:
            answer = None
            try:
                with self._turns:
                    answer = self._session.request(
                        method, url, data=body, headers=headers, timeout=self._spec.timeout, allow_redirects=False
                    )
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                fault = f"{type(error).__name__}: {str(error)[:_SHOWN]}"
            else:
                if not retry.is_retry(method, answer.status_code):
                    return self._read(url, answer)
                fault = _described(answer)
            try:
                retry = retry.increment(method, url)
            except MaxRetryError:
                raise AegpoError(
                    f"{self.who}: {url} could not be asked in {self._spec.retries + 1} attempts: {fault}; see to the "
                    "server, or raise 'retries' or 'timeout'"
                ) from None
            retry = retry.new(history=retry.history[-_LONGEST_HISTORY:])
            self._pause(url, retry, answer, fault)

    def _pause(self, url: str, retry: Retry, answer: Response | None, fault: str) -> None:
        """Waits as long as the server asks in its answer, or else as long as it is the turn for."""
        from urllib3.exceptions import InvalidHeader

        try:
            seconds = None if answer is None else retry.get_retry_after(answer.raw)
        except (InvalidHeader, ValueError, OverflowError):  # neither seconds nor a date
            seconds = None
        if answer is None or seconds is None:
            retry.sleep()
        elif seconds <= self._spec.timeout:
            retry.sleep(answer.raw)
        else:
            raise AegpoError(
                f"{self.who}: {url} wants to be asked again only after {seconds:.0f} s, but 'timeout' is "
                f"{self._spec.timeout:g} s: {fault}; see to the server, or raise 'timeout'"
            )

    def _read(self, url: str, answer: Response) -> Any:
        if answer.status_code != 200:
            raise AegpoError(f"{self.who}: {url} refused: {_described(answer)}")
        try:
            return answer.json()
        except ValueError as error:
            raise AegpoError(f"{self.who}: {url} did not answer with JSON: {answer.text[:_SHOWN]!r}") from error


def _retries(spec: ServerRewardSpec) -> Retry:
    from urllib3.util.retry import RequestHistory, Retry

    # Its first pause would be none and its second twice the factor: so it counts one attempt before the first.
    before = RequestHistory(None, None, None, None, None)
    return Retry(
        total=spec.retries,
        allowed_methods=None,  # a score may be asked for again, whatever the method
        status_forcelist=_AGAIN,
        backoff_factor=spec.backoff / 2,
        backoff_max=_LONGEST_WAIT,
        history=(before,),
    )


def _described(answer: Response) -> str:
    try:
        content = answer.json()
        reason = content["detail"] if isinstance(content, dict) and "detail" in content else content
    except ValueError:
        reason = answer.text
    return f"status {answer.status_code}: {str(reason)[:_SHOWN]}"
