"""What the Hugging Face hub refused, and what to do about it; the same words for models, rewards and datasets."""

from __future__ import annotations

from collections.abc import Iterator

LOG_IN = "log in with 'hf auth login' or set HF_TOKEN"


def refusal(error: BaseException, repository: str, revision: str | None = None, dataset: bool = False) -> str | None:
    """What the hub said no to, as the rest of a sentence about the repository; None if it was not the hub's answer.

    Libraries wrap the hub's errors in their own, so causes count too.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{'datasets/' if dataset else ''}{repository}"
    for each in _chain(error):
        if isinstance(each, GatedRepoError):  # a repository that was found, though its class says otherwise
            return f"is gated: accept its terms at {page}, and {LOG_IN}"
        if isinstance(each, RevisionNotFoundError):
            return f"has no revision {revision or 'main'!r}; name one of its branches, tags or commits: {page}"
        if isinstance(each, RepositoryNotFoundError):
            return (
                f"is not there for you to read: is the name right? if {page} is private or gated, {LOG_IN}, and accept "
                "its terms there"
            )
        if isinstance(each, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            way = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
            return f"is not in the cache, and {way}: it has to be downloaded once"
        if isinstance(each, HfHubHTTPError) and each.response.status_code == 401:
            return f"cannot be read with your token, which the hub does not accept: {LOG_IN} again"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, the outermost first."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or now.__context__
