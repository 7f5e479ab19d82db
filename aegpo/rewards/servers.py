"""Asking a server: retries that wait longer each time, a token that is never written down, errors in words.

A server is a stranger: what it answers is read so far and no further (`exchanges`), and shown as plain words.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from aegpo.core import bounded_json
from aegpo.core.addresses import check_server
from aegpo.core.parts import RewardSpec
from aegpo.core.registry import Where
from aegpo.core.sections import Positive
from aegpo.errors import AegpoError
from aegpo.rewards.tokens import read_token, without_secrets

if TYPE_CHECKING:
    from requests import Response
    from urllib3.util.retry import Retry

T = TypeVar("T")
R = TypeVar("R")

_DAY = 86_400  # seconds; no clock waits for any number of them
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses that may pass; others are the request's own fault
_LONGEST_WAIT = 30.0  # seconds
_LONGEST_HISTORY = 64  # attempts that pauses grow by: 2 to the power of some thousands is no float
_SHOWN = 300  # characters of an answer in an error
_BEGINNING = 2**16  # bytes that are read of a refusal
_MOST_BYTES = 4 * 2**20  # of an answer, unpacked; scores of a request have some hundreds
_HOPELESS = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")  # of TLS, however often it is tried


class ServerRewardSpec(RewardSpec):
    """A reward that a server computes."""

    read_where: ClassVar[Mapping[str, Where]] = {"backoff": Where("retries", (0,), other=True)}
    url: str = Field(description="where the server is, e.g. http://127.0.0.1:8000")
    timeout: float = Field(60.0, gt=0, le=_DAY, description="seconds a whole answer may take")
    retries: int = Field(5, ge=0, le=10**6, description="further attempts when the server is away, late or overloaded")
    backoff: float = Field(
        1.0,
        ge=0,
        le=_DAY,
        description="seconds before the first further attempt, unless the server names a time; doubled each time, 30 "
        "at most",
    )
    concurrency: Positive = Field(4, le=1024, description="requests at a time")
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


def asked(rewards: Iterable[RewardSpec]) -> Iterator[str]:
    """A line for each of the rewards that a server computes: who is sent what, and with whose token."""
    for spec in rewards:
        if isinstance(spec, ServerRewardSpec):
            token = "no token" if spec.token_env is None else f"the token in {spec.token_env}"
            yield f"reward {spec.label!r} sends images and prompts to {spec.url} with {token}"


@dataclass(frozen=True)
class Answer:
    """What came back: a status, the body as far as it was read, and what `urllib3` read it from, for its headers."""

    status_code: int
    body: bytes
    raw: Any

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8", "replace")


class Server:
    """One server as a reward sees it; may be asked from several threads."""

    def __init__(self, spec: ServerRewardSpec) -> None:
        """Nothing is asked yet.

        Raises:
            AegpoError: if the environment variable with the token is not set.
        """
        from http.cookiejar import DefaultCookiePolicy

        import requests

        from aegpo.rewards import exchanges

        self.who, self.url = f"reward {spec.label!r}", spec.url
        self._spec = spec
        self._retry = _retries(spec)
        self._turns = threading.BoundedSemaphore(spec.concurrency)  # of requests, whoever sends them
        self._token = None if spec.token_env is None else read_token(spec.token_env, f"{self.who}: 'token_env'")
        self._watch = exchanges.Watch()
        self._session = requests.Session()
        self._session.auth = exchanges.Bearer(self._token)
        self._session.headers["Accept-Encoding"] = "identity"
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))  # none is kept or sent
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, exchanges.Adapter(self._watch, spec.concurrency))

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

    def shown(self, value: object) -> str:
        """The beginning of what the server said, in one line without its token."""
        text = without_secrets(str(value), self._token)[:_BEGINNING]
        return " ".join(_visible(text).split())[:_SHOWN]

    def _ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Any:
        from urllib3.exceptions import MaxRetryError

        url, retry = self._spec.url + path, self._retry
        while True:
            answer, fault = self._exchange(method, url, body, headers)
            if answer is not None and not retry.is_retry(method, answer.status_code):
                return self._read(url, answer)
            if answer is not None:
                fault = self._described(answer)
            try:
                retry = retry.increment(method, url)
            except MaxRetryError:
                raise AegpoError(
                    f"{self.who}: {url} could not be asked in {self._spec.retries + 1} attempts{self._way(url)}: "
                    f"{fault}; see to the server, or raise 'retries' or 'timeout'"
                ) from None
            retry = retry.new(history=retry.history[-_LONGEST_HISTORY:])
            self._pause(url, retry, answer, fault)

    def _exchange(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[Answer | None, str]:
        """An answer, or what kept it from coming, which may pass.

        Raises:
            AegpoError: for what will not pass, such as a certificate that is not known.
        """
        import requests
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        from aegpo.rewards.exchanges import LateError, UnreadableError

        settings: dict[str, Any] = {"timeout": self._spec.timeout, "allow_redirects": False, "stream": True}
        if is_loopback(url):
            settings["proxies"] = {"no_proxy": urlsplit(url).hostname}
        try:
            with self._turns, self._watch.over(self._spec.timeout):
                answer = self._session.request(method, url, data=body, headers=headers, **settings)
                with answer:
                    return _taken(answer), ""
        except UnreadableError as error:
            raise AegpoError(f"{self.who}: {url}: {error}; scores alone were expected") from None
        except (LateError, requests.ReadTimeout, ReadTimeoutError):
            return None, f"ReadTimeout: the answer was not whole after {self._spec.timeout:g} s"
        except (requests.RequestException, HTTPError) as error:
            words = f"{type(error).__name__}: {self.shown(error)}"
            passing = isinstance(error, (*_may_pass(), HTTPError)) and not any(each in words for each in _HOPELESS)
            if passing:
                return None, words
            raise AegpoError(f"{self.who}: {url} cannot be asked{self._way(url)}: {words}") from None

    def _way(self, url: str) -> str:
        """Through which proxy the server is asked, if through one; its user is not shown."""
        from requests.utils import get_environ_proxies, select_proxy

        proxy = None if is_loopback(url) else select_proxy(url, get_environ_proxies(url))
        return f" through the proxy {self.shown(proxy)!r}, which the environment names" if proxy else ""

    def _pause(self, url: str, retry: Retry, answer: Answer | None, fault: str) -> None:
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

    def _read(self, url: str, answer: Answer) -> Any:
        if answer.status_code != 200:
            moved = "; redirects are not followed, put the address itself into 'url'"
            hint = moved if 300 <= answer.status_code < 400 else ""
            raise AegpoError(f"{self.who}: {url} refused{self._way(url)}: {self._described(answer)}{hint}")
        try:
            return bounded_json.loads(answer.body, bounded_json.most_values(_MOST_BYTES))
        except ValueError as error:
            raise AegpoError(
                f"{self.who}: {url} did not answer with JSON: {self.shown(answer.text)!r}: {error!s:.100}"
            ) from None

    def _described(self, answer: Answer) -> str:
        try:
            content = bounded_json.loads(answer.body, bounded_json.most_values(_BEGINNING))
            reason = content["detail"] if isinstance(content, dict) and "detail" in content else content
        except ValueError:
            reason = answer.text
        return f"status {answer.status_code}: {self.shown(reason)}"


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


def _taken(answer: Response) -> Answer:
    """A whole answer, or the beginning of a refusal, whose status says enough.

    Raises:
        UnreadableError: for an answer that cannot be taken.
    """
    from aegpo.rewards.exchanges import UnreadableError, beginning, read

    if answer.status_code == 200:
        return Answer(200, read(answer, _MOST_BYTES), answer.raw)
    try:
        body = beginning(answer, _BEGINNING)
    except UnreadableError:
        body = b""
    return Answer(answer.status_code, body, answer.raw)


def _may_pass() -> tuple[type[Exception], ...]:
    import requests

    return requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError


def is_loopback(url: str) -> bool:
    """Whether the server is on this machine, where no proxy is between."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


def _visible(text: str) -> str:
    """The text without what a terminal obeys."""
    return "".join(letter if letter.isprintable() or letter.isspace() else "?" for letter in text)
