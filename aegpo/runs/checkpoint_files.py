"""The files of one checkpoint, read: every byte is checked before anything is made of it.

Whole tensors are in PREFIX.safetensors, sharded ones in `shards/`; to those who read there is no difference.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.core.as_json import loads
from aegpo.errors import CheckpointError
from aegpo.runs.sharded_files import SHARDS, checksum, described, read_into

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.tensor import DTensor

FORMAT = 1
STATE = "state.json"
CHECKSUMS = "checksums.json"
NAME = re.compile(r"(?P<hidden>\.replaced-)?step-(?P<step>\d{6,})")
_SUFFIX = ".safetensors"


class Stored:
    """The tensors of a checkpoint, in files that were checked."""

    def __init__(self, folder: Path, files: Collection[str]) -> None:
        """`files`: their names in the folder, as `checked` gives them."""
        self.folder = folder
        self.files = tuple(name for name in files if name.endswith(_SUFFIX))

    def read(
        self,
        prefixes: Collection[str] | None = None,
        device: torch.device | str = "cpu",
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The tensors by name; no other process has to be there.

        Args:
            prefixes: of those that are read, such as "policy"; None: all of them.
            device: where whole ones go.
            weights: what is trained, by name; of tensors that belong to sharded ones, such as their average, only this
                process's part is read, and they are sharded alike. None: all are whole.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        from safetensors import SafetensorError

        wanted = [name for name in self.files if prefixes is None or name.removesuffix(_SUFFIX) in prefixes]
        tensors: dict[str, Tensor] = {}
        for name in wanted:
            if not name.startswith(f"{SHARDS}/"):
                try:
                    tensors |= _read_file(self.folder / name, device, weights or {})
                except SafetensorError as error:
                    raise CheckpointError(f"{name} cannot be read: {error}") from error
        if any(name.startswith(f"{SHARDS}/") for name in self.files):
            tensors |= _read_shards(self.folder / SHARDS, prefixes, device, weights or {})
        return tensors

    def copy_to(self, target: Path) -> None:
        """Puts copies of the files into another folder."""
        for name in self.files:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / name, target / name)


def checked(path: Path, only: Collection[str] | None = None) -> list[str]:
    """The names of a checkpoint's files, all of which, or `only` some, were found to have their checksums.

    Raises:
        CheckpointError: if one is missing or was changed, or there are shards that are not of it.
    """
    sums = _read_json(path / CHECKSUMS).get("sha256")
    if not isinstance(sums, dict) or STATE not in sums:
        raise CheckpointError(f"{CHECKSUMS} lists no checksums")
    for name, expected in sums.items():
        file = path / name
        if Path(name).name != name.removeprefix(f"{SHARDS}/"):
            raise CheckpointError(f"{CHECKSUMS} lists {name!r}, which is no file of it")
        if only is not None and name not in only:
            continue
        if not file.is_file():
            raise CheckpointError(f"{name} is missing")
        if checksum(file) != expected:
            raise CheckpointError(
                f"{name} has a wrong checksum ({file.stat().st_size} bytes); it was changed or cut short"
            )
    if only is None:
        _check_shards(path, sums)
    return list(sums)


def _check_shards(path: Path, names: Collection[str]) -> None:
    """Refuses shards that are not of the checkpoint: whoever reads shards reads all that are there."""
    if any(name.startswith(f"{SHARDS}/") for name in names):
        for file in sorted((path / SHARDS).iterdir()):
            if f"{SHARDS}/{file.name}" not in names:
                raise CheckpointError(f"{SHARDS}/{file.name} is no file of it; move it away")


def read_state(path: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """What `state.json` of a checkpoint says; `names`: the files that are there, which must be all it counts.

    Raises:
        CheckpointError: if it cannot be read, is of another step, or counts other files.
    """
    content, match = _read_json(path / STATE), NAME.fullmatch(path.name)
    if type(content.get("step")) is not int or not isinstance(content.get("state"), dict):
        raise CheckpointError(f"{STATE} has no 'step' and 'state'")
    if match is not None and content["step"] != int(match["step"]):
        raise CheckpointError(f"{STATE} is of step {content['step']}")
    for name in content.get("files", ()):
        if names is not None and name not in names:
            raise CheckpointError(f"{name} is missing")
    return content


def check_run(whose: object, run: Mapping[str, Any] | None) -> None:
    """Refuses the checkpoint of another run; what does not say whose it is may be of any.

    Raises:
        CheckpointError: if it is.
    """
    if run is not None and whose not in (None, dict(run)):
        raise CheckpointError(f"{STATE} is of another run, {_told(whose)}; this one is {_told(run)}")


def _told(run: object) -> str:
    """How messages call a run."""
    if not isinstance(run, Mapping):
        return repr(run)
    digest = str(run.get("experiment", ""))[:8]
    return f"arm {run.get('arm')!r}, seed {run.get('seed')}" + (f", experiment {digest}" if digest else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path.name} is not of format {FORMAT}, the only one this version of aegpo reads")
    return content


# --- tensors ---------------------------------------------------------------------------------------------------------


def _read_file(path: Path, device: torch.device | str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from safetensors import safe_open

    if not weights:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    from aegpo.parallel.dtensors import of_own, own_slices

    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        likes = _likes(shapes, weights)
        for name in shapes:
            if (like := likes.get(name)) is None:
                tensors[name] = file.get_tensor(name)
            else:
                tensors[name] = of_own(file.get_slice(name)[own_slices(like)], like)
    return tensors


def _read_shards(
    folder: Path, prefixes: Collection[str] | None, device: torch.device | str, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    import torch

    found = {name: each for name, each in described(folder).items() if prefixes is None or _prefix(name) in prefixes}
    likes = _likes({name: tuple(shape) for name, (shape, _) in found.items()}, weights)
    tensors = {
        name: torch.empty_like(likes[name], dtype=dtype, requires_grad=False)
        if name in likes
        else torch.empty(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in found.items()
    }
    read_into(folder, tensors)
    return tensors


def _likes(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> dict[str, DTensor]:
    """The sharded weights by the stored tensors that are cut as they are: `policy/NAME`, `optimizer/NAME/exp_avg`."""
    if not weights:
        return {}
    from aegpo.parallel.dtensors import sharded

    likes: dict[str, DTensor] = {}
    known = sharded(weights)
    for name, shape in shapes.items():
        own = name.split("/", 1)[-1]
        weight = known.get(own, known.get(own.rsplit("/", 1)[0]))
        if weight is not None and tuple(weight.shape) == shape:
            likes[name] = weight
    return likes


def _prefix(name: str) -> str:
    return name.split("/", 1)[0]
