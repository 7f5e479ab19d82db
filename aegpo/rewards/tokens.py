"""Tokens of servers: named by an environment variable, fit for a header, and never written down."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping

from aegpo.errors import AegpoError

_FIT = re.compile(r"[!-~]+")  # what ASCII has that is seen
_USER = re.compile(r"//[^\s/?#]*@")  # of an address, as that of a proxy


def read_token(named: str, who: str, environment: Mapping[str, str] = os.environ) -> str:
    """The token in the variable `named`.

    Raises:
        AegpoError: if it is not set, or no header can hold what it is set to, which is not repeated.
    """
    token = environment.get(named)
    if not token:
        raise AegpoError(f"{who} names {named!r}, which is not set in the environment")
    if _FIT.fullmatch(token):
        return token
    place = next(place for place, letter in enumerate(token, 1) if not _FIT.fullmatch(letter))
    raise AegpoError(
        f"{who} names {named!r}, whose character {place} of {len(token)} no token may have; visible ASCII alone was "
        "expected, without blanks or an end of line"
    )


def is_bearer(given: str, token: str) -> bool:
    """True for the header `Authorization` of who knows the token, whatever bytes it is made of."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), f"Bearer {token}".encode())


def without_secrets(text: str, token: str | None) -> str:
    """A server's or a library's words without the token and without users of addresses."""
    text = text if token is None else text.replace(token, "***")
    return _USER.sub("//", text)
