"""Addresses in specs, which manifests and reports record: none may carry a user or a password."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import unquote, urlsplit

_USER = re.compile(r"//[^/?#]*@")  # whoever is named before a host, with a password or without, or nobody at all
_IGNORED = re.compile(r"[\t\r\n]")  # by programs that read addresses


def has_user(text: str) -> bool:
    """True if an address anywhere in the text names a user, however that is written."""
    return _USER.search(_plain(text)) is not None


def check_server(url: str) -> None:
    """Refuses what is no plain address of a server.

    Raises:
        ValueError: if it has an "@" or is none; a password is not repeated in the message.
    """
    if "@" in _plain(url):
        raise ValueError(
            "an address with an '@' is refused, since a user or password before it would be recorded in the manifest; "
            "put the server's token into an environment variable and name that in 'token_env'"
        )
    if not _is_server(url):
        raise ValueError(f"{url!r} is no address of a server, such as 'http://127.0.0.1:8000'")


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket without its other half, a port that is no number
        return False
    return named and parts.scheme in ("http", "https") and re.search(r"[\s?#\\]", url) is None


def _plain(text: str) -> str:
    """The text as the boldest reader takes it: no ignored characters, no escapes, no look-alikes."""
    return unicodedata.normalize("NFKC", unquote(unquote(_IGNORED.sub("", text))))
