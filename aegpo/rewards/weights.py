"""Weights of rewards: found on disk or on the hub, read without running code, and checked key by key."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.core.weights import brief, reading_errors
from aegpo.errors import AegpoError
from aegpo.prompts.hub import refusal

if TYPE_CHECKING:
    from torch import Tensor, nn

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHOWN = 5  # keys named in an error
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*_config.json", "*_map.json")


def find_file(who: str, source: str, filename: str, field: str = "path") -> Path:
    """The file that `source` names: itself, `filename` in it if it is a folder, or of a repository on the hub.

    Raises:
        AegpoError: if there is none; the message says the command that gets it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / filename
    if path.is_file():
        return path
    if not _HUB_ID.fullmatch(source) or path.parent.is_dir():
        raise AegpoError(f"{who}: there is no file {str(path)!r}; give {field!r} a file, or a repository of the hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, filename))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise unreachable(who, source, filename, field, error) from error


def find_folder(who: str, source: str, patterns: Sequence[str], field: str) -> Path:
    """A folder with files of these names: `source` itself, or those files of a repository on the hub.

    The first three names are what is looked for; a folder with none of them is an error.

    Raises:
        AegpoError: if there is none; the message says the command that gets it.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if not _HUB_ID.fullmatch(source) or path.parent.is_dir():
            raise AegpoError(f"{who}: there is no folder {source!r}; give {field!r} one, or a repository of the hub")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(source, allow_patterns=list(patterns)))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise unreachable(who, source, "", field, error) from error
    if not any((path / name).is_file() for name in patterns[:3]):
        raise AegpoError(f"{who}: {field} {source!r} has none of the files {', '.join(patterns[:3])}")
    return path


def load_pretrained(who: str, load: Callable[[str], Any], source: str, field: str = "path") -> Any:
    """What a `from_pretrained` makes of a folder or a repository on the hub.

    Raises:
        AegpoError: if it cannot be had; the message says the command that gets it.
    """
    path = Path(source).expanduser()
    if not path.is_dir() and (not _HUB_ID.fullmatch(source) or path.parent.is_dir()):
        raise AegpoError(f"{who}: there is no folder {source!r}; give {field!r} one, or a repository of the hub")
    try:
        return load(str(path) if path.is_dir() else source)
    except reading_errors() as error:
        if path.is_dir():
            raise AegpoError(f"{who}: {field} {source!r} cannot be loaded: {brief(error)}") from error
        raise unreachable(who, source, "", field, error) from error


def unreachable(who: str, source: str, filename: str, field: str, error: Exception, options: str = "") -> AegpoError:
    """What to say when the hub does not give a file; `options` go into the command that gets it."""
    what = f"{filename!r} of {source!r}" if filename else repr(source)
    command = " ".join(word for word in ("hf download", source, options, filename) if word)
    told = refusal(error, source, dataset="dataset" in options)
    reason = brief(error) if told is None else f"{source!r} {told}"
    return AegpoError(
        f"{who}: cannot get {what} from the hub: {reason}; with a network, run '{command}' once, "
        f"or give {field!r} a local copy"
    )


def read_tensors(who: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a torch checkpoint, `state_dict` unwrapped; reading it runs no code.

    Raises:
        AegpoError: if the file is not one of these, or holds anything but tensors by name.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    except reading_errors() as error:
        raise AegpoError(
            f"{who}: {str(path)!r} cannot be read as weights: {brief(error)}; it should be a safetensors file "
            "or a torch checkpoint of tensors alone"
        ) from error
    named = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(named, Mapping) or not all(isinstance(value, torch.Tensor) for value in named.values()):
        raise AegpoError(f"{who}: {str(path)!r} holds no tensors by name; it should be a state dict")
    return {str(name): tensor for name, tensor in named.items()}


def load_strictly(who: str, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a network its weights, every one of them and no other.

    Raises:
        AegpoError: if a key is missing or unknown, or a shape is another; the message names the first few.
    """
    expected = network.state_dict()
    faults = [
        _named("is missing", [name for name in expected if name not in tensors]),
        _named("is unknown", [name for name in tensors if name not in expected]),
        _named(
            "has another shape",
            [
                f"{name} {tuple(tensors[name].shape)} for {tuple(weight.shape)}"
                for name, weight in expected.items()
                if name in tensors and tensors[name].shape != weight.shape
            ],
        ),
    ]
    if any(faults):
        raise AegpoError(f"{who}: the checkpoint does not fit: {'; '.join(fault for fault in faults if fault)}")
    network.load_state_dict(dict(tensors), assign=True)


def _named(fault: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{fault}: {', '.join(names[:_SHOWN])}{more}"
