"""Sharded tensors in files: each process writes its parts, while it goes on; any number of processes reads them.

    shards/shard-00001-model-00001-of-00003.safetensors     parts of process 1, of one prefix of the tensors' names

torch.distributed.checkpoint writes them in safetensors: each file says where in the whole tensors its parts belong, and
nothing is pickled. Of parts that several processes hold, as replicas do, one writes them.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.tensor import DTensor

SHARDS = "shards"  # the folder
Then = Callable[[Mapping[str, str]], None]


class Writing:
    """A process's shards on their way to disk; threads of their own write them, and do what comes then."""

    def __init__(self, folder: Path, upload: Future[Any], group: dist.ProcessGroup, then: Then) -> None:
        """`upload`: is done when every process has written."""
        self._folder, self._upload, self._group, self._then = folder, upload, group, then
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        self._all = thread.submit(self._do_all)
        thread.shutdown(wait=False)

    def done(self) -> bool:
        """True if `wait` returns at once."""
        return self._all.done()

    def wait(self) -> None:
        """Returns when all processes have written, and `then` has in this one.

        Raises:
            OSError: if one of them could not write, as on a full disk; SafetensorError likewise; what `then` raises.
        """
        self._all.result()

    def _do_all(self) -> None:
        import torch.distributed as dist

        with _without_traces():
            self._upload.result()
        everybody: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everybody, self._own_sums(), group=self._group)
        sums: dict[str, str] = {}
        for each in everybody:
            if isinstance(each, OSError):
                raise each
            sums |= each
        self._then(sums)

    def _own_sums(self) -> dict[str, str] | OSError:
        """Those of the files that this process wrote, or why it cannot read them."""
        import torch.distributed as dist

        number = dist.get_rank(self._group) + 1
        try:
            files = sorted(self._folder.glob(f"shard-{number:05d}-*.safetensors"))
            return {f"{SHARDS}/{file.name}": checksum(file) for file in files}
        except OSError as error:
            return error


def write(folder: Path, tensors: Mapping[str, DTensor], group: dist.ProcessGroup, then: Then) -> Writing:
    """Begins to write this process's parts of tensors; what becomes of the tensors meanwhile does not matter.

    Args:
        folder: there is none yet, or it is empty; the same for all processes, which all call this.
        tensors: by name with a prefix such as "policy/", the same names for all processes.
        group: in which nothing else is sent meanwhile; one that the CPU can send in.
        then: is called in each process, in a thread, when all have written, with the SHA-256 of all files by their
            names in the checkpoint.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import async_save

    prefixes = sorted({_prefix(name) for name in tensors})
    places = {name: prefixes.index(_prefix(name)) + 1 for name in tensors}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=places, save_distributed=True)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    stager = DefaultStager(StagingOptions(False, False, False, False))  # copies before `async_save` returns
    parts = {name: _compact(tensor) for name, tensor in tensors.items()}
    upload = async_save(parts, storage_writer=writer, planner=planner, process_group=group, async_stager=stager)
    stager.close()
    assert isinstance(upload, Future), "the tensors were copied before it returned"
    return Writing(folder, upload, group, then)


def described(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and types of the whole tensors in a folder of shards, by name.

    Raises:
        CheckpointError: if its files cannot be read, or do not hold all of a tensor.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{SHARDS} cannot be read: {error}") from error
    shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for name, stored in found.items():
        assert isinstance(stored, TensorStorageMetadata), "safetensors holds nothing else"
        _check_whole(name, stored)
        shapes[name] = (stored.size, stored.properties.dtype)
    return shapes


def read_whole(
    folder: Path, prefixes: Collection[str] | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The whole tensors in a folder of shards, by name; no other process has to be there.

    Args:
        folder: what `write` got.
        prefixes: of the tensors that are read, such as "policy"; None: all of them.
        device: where they go.

    Raises:
        CheckpointError: if its files cannot be read, or do not hold all of a tensor.
    """
    import torch

    shapes = {name: each for name, each in described(folder).items() if prefixes is None or _prefix(name) in prefixes}
    found = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    read_into(folder, found)
    return found


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads into tensors, in place: of a sharded one this process's part, and no more. No message is sent.

    Args:
        folder: what `write` got.
        tensors: by names that are there, and of their whole shapes; cut in any way, also into other parts than those
            that were written.

    Raises:
        CheckpointError: if its files cannot be read.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each reads for itself
        try:
            with _without_traces():
                load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), planner=planner, no_dist=True)
        except Exception as error:
            raise CheckpointError(f"{SHARDS} cannot be read: {error}") from error


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compact(tensor: DTensor) -> DTensor:
    """The same, in memory of its own: torch cannot copy what begins amid that of another tensor."""
    import torch

    from aegpo.parallel.dtensors import of_own

    part = tensor.to_local()
    if part.is_contiguous() and part.storage_offset() == 0:
        return tensor
    return of_own(part.clone(memory_format=torch.contiguous_format), tensor)


def _prefix(name: str) -> str:
    return name.split("/", 1)[0]


def _check_whole(name: str, stored: TensorStorageMetadata) -> None:
    """Refuses a tensor of which a part is missing, or there twice."""
    parts = {tuple(part.offsets): math.prod(part.sizes) for part in stored.chunks}
    there, twice = sum(parts.values()), len(stored.chunks) - len(parts)
    if twice or there != math.prod(stored.size):
        raise CheckpointError(
            f"{SHARDS} holds {there} of the {math.prod(stored.size)} numbers of {name!r}, and {twice} parts twice"
        )


@contextmanager
def _without_traces() -> Iterator[None]:
    """Raises what went wrong in one of the processes; torch puts it into an exception that is no `Exception`."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reasons = [error.failures[rank][0] for rank in sorted(error.failures)]
        raise reasons[0] from error
