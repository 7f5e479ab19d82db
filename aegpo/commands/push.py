"""`aegpo push`: an exported policy and its card onto the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.commands.export import EXPORTED, ExportRequest, export
from aegpo.errors import AegpoError
from aegpo.prompts.hub import LOG_IN

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_TOKEN = re.compile(r"hf_\w+")  # of the hub, wherever an answer repeats one


@dataclass(frozen=True)
class PushRequest:
    """What the command line asked for."""

    export: ExportRequest  # its `run` may be a folder that was exported; its `to` is not read
    repository: str  # NAME or OWNER/NAME
    private: bool = False
    revision: str | None = None  # a branch, made if need be; None: the main one


def push(request: PushRequest) -> str:
    """Uploads a folder as one model repository, which is made if need be; of a run, after exporting it with its card.

    Returns:
        The address of what was uploaded.

    Raises:
        AegpoError: for a folder that cannot be pushed, or if the hub refuses it or cannot be reached.
    """
    api = _api()
    with _folder(request) as folder, _telling(request.repository):
        made = api.create_repo(request.repository, private=request.private or None, exist_ok=True)
        if request.private and not api.model_info(made.repo_id).private:
            raise AegpoError(
                f"{made.repo_id} is there already and public, so --private would not hide what is pushed; make it "
                "private in its settings, or choose another name"
            )
        if request.revision is not None:
            api.create_branch(made.repo_id, branch=request.revision, exist_ok=True)
        message = "Upload a policy and its card with aegpo"
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, revision=request.revision, commit_message=message)
    return str(made) if request.revision is None else f"{made}/tree/{request.revision}"


def _api() -> HfApi:
    """The hub, for somebody who is logged in.

    Raises:
        AegpoError: if nobody is, or the hub may not be asked.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise AegpoError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if get_token() is None:
        raise AegpoError(f"nobody is logged in to {constants.ENDPOINT}: {LOG_IN}; the token has to allow writing")
    return HfApi(library_name="aegpo")


@contextmanager
def _folder(request: PushRequest) -> Iterator[Path]:
    """The folder that is uploaded: the one that was named, or one for the time being."""
    subject = request.export.run
    if (subject / EXPORTED).is_file():
        given = replace(request.export, plugins=()) != ExportRequest(subject, request.export.to)
        if given:
            raise AegpoError(
                f"{subject} is exported already, so --checkpoint, --full and --layout do nothing; leave them out, or "
                "name the run"
            )
        if not (subject / CARD).is_file():
            raise AegpoError(
                f"{subject} has no model card ({CARD}); write one, export with --card, or name the run, whose card is "
                "written then"
            )
        yield subject
        return
    with tempfile.TemporaryDirectory(prefix=".aegpo-push-", dir=Path.cwd()) as made:
        to = Path(made) / "exported"
        export(replace(request.export, to=to, card=True))
        yield to


# --- what the hub says no to -----------------------------------------------------------------------------------------


@contextmanager
def _telling(repository: str) -> Iterator[None]:
    """Inside, what the hub refuses is one line with the way out, and without any token.

    Raises:
        AegpoError: with that line.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]  # of the HTTP library

    try:
        yield
    except HFValidationError as error:
        raise AegpoError(
            f"{repository!r} is no name of a repository; give NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'"
        ) from error
    except HfHubHTTPError as error:
        raise AegpoError(f"{repository}: {_refused(error)}") from error
    except (NetworkError, ConnectionError, TimeoutError) as error:
        raise AegpoError(
            f"{repository}: {constants.ENDPOINT} cannot be reached ({_line(error)}); check the network, then give the "
            "same command again"
        ) from error
    except (OSError, ValueError) as error:  # of a file here, of the card's metadata, or of an answer that is no hub's
        raise AegpoError(f"{repository}: cannot be pushed: {_line(error)}") from error


def _line(said: object) -> str:
    """What was said, on one line and without tokens."""
    return _TOKEN.sub("hf_...", " ".join(str(said).split()))


def _refused(error: Any) -> str:
    """What the hub's answer means for who pushes."""
    status = error.response.status_code
    said = _line(error.server_message or "")
    if status == 401:
        return f"the hub does not accept your token: {LOG_IN} again"
    if status == 403:
        why = f" ({said})" if said else ""
        return f"your token may not write there{why}: {LOG_IN} with one that may, or choose an OWNER that is you"
    if status == 404:
        return "it is not there for you; is the name right, and the branch?"
    if status == 429 or status >= 500:
        return f"the hub answers {status}{f': {said}' if said else ''}; give the same command again later"
    return f"the hub refuses it with {status}{f': {said}' if said else ''}"
