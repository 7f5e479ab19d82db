"""Networks whose weights are spread over the processes of a run by torch's `fully_shard`.

Where gradients are asked for (`in_lockstep`), every process evaluates as often as any other, and weights come and go
block by block. Anywhere else processes evaluate as often as they like: who needs a network says so in a round, and the
others take part where they are, at their own next round. Then, with `gather: sampling`, it has all weights of that
network until others take their place or they change; with `gather: never` it has those of a block at a time, and the
others make an evaluation along with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map

from aegpo.core.memory import brief, is_shortage
from aegpo.errors import AegpoError, ProcessLostError
from aegpo.parallel.team import Team

Gather = Literal["sampling", "never"]
_OWN_UNIT = 0.05  # of all weights, from which on a part of the network that is no block is gathered apart


class Sharding:
    """The sharded networks of a run, as one of its processes has them."""

    def __init__(self, team: Team, mesh: DeviceMesh, gather: Gather) -> None:
        """`mesh`: of all processes, see `mesh_of`."""
        self._team, self._mesh, self._gather = team, mesh, gather
        self._networks: dict[str, _Network] = {}
        self._example: tuple[Any, Any] | None = None  # what a network was evaluated on first
        self._in_lockstep = self._helping = False
        team.help_with(self._help)

    def spread(
        self, name: str, network: nn.Module, computes_in: torch.dtype, read: Callable[[nn.Module], None] | None = None
    ) -> None:
        """Leaves each process a part of a network's weights, in place.

        Args:
            name: of the network; the same in all processes, which call this in the same order.
            network: on the device on which it computes, or of weights without values.
            computes_in: the dtype of gathered weights; those that train stay what they are.
            read: gives such a network the values of this process's part.
        """
        spread_over(network, self._mesh, computes_in)
        if read is not None:
            read(network)
        self._networks[name] = _Network(network)
        network.register_forward_pre_hook(partial(self._evaluated, name), with_kwargs=True, prepend=True)

    def changing(self, said: bool = True) -> None:
        """Weights are about to change: none keeps what it has gathered of them.

        `said`: every process comes here, and goes on when all have; else this one does it for itself, after an error.
        """
        if said:
            self._team.told("weights change")
        self._give_up()

    @contextmanager
    def in_lockstep(self, batches: int, for_nothing: Callable[[], None]) -> Iterator[None]:
        """Inside, gradients are found, of which each process gets its part of the mean over processes.

        Args:
            batches: how many this process evaluates and differentiates inside, one after another.
            for_nothing: does so once without effect; processes with fewer batches make up for them.

        Raises:
            ProcessLostError: for any error inside: the others wait amid a batch, where nobody can tell them, and end
                once this process is gone.
        """
        most = max(self._team.told("batches in lockstep", batches))
        self._give_up()
        self._in_lockstep = True
        try:
            yield
            for _ in range(most - batches):
                for_nothing()
        except ProcessLostError:
            raise
        except Exception as error:
            raise ProcessLostError(self._ended_amid(error)) from error
        finally:
            self._in_lockstep = False

    def _ended_amid(self, error: Exception) -> str:
        """What is told of an error amid an update."""
        rank, size = self._team.place.rank, self._team.size
        goes_on = "the same command goes on from the newest checkpoint"
        if isinstance(error, dist.DistError) or "gloo/" in str(error):
            return f"process {rank} of {size} lost another one amid an update of sharded weights; {goes_on}"
        told = str(error) if isinstance(error, AegpoError) else brief(error)
        told += "; lower 'optimizer.micro_batch'" if is_shortage(error) else ""
        return f"process {rank} of {size} failed amid an update of sharded weights, so that all end: {told}; {goes_on}"

    def _give_up(self) -> None:
        for network in self._networks.values():
            network.release()

    def _evaluated(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a network is evaluated: its weights are needed."""
        network = self._networks[name]
        if self._in_lockstep or self._helping:
            return
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in module.parameters()):
            raise AegpoError("gradients of sharded weights were asked for outside of an update; compute them whole")
        if self._example is None:
            self._example = tree_map(_detached, (args, kwargs))
        if not network.gathered:
            self._team.need(name)

    def _help(self, name: str, own: bool) -> None:
        """Takes part when a process needs a network; `own`: this one is such a process."""
        network = self._networks[name]
        if self._gather == "never":
            if not own:
                self._evaluate_example(network)
        elif own:
            self._give_up()
            network.gather()
        else:
            network.pass_on()

    @torch.no_grad()
    def _evaluate_example(self, network: _Network) -> None:
        """An evaluation that is for nothing but to take part."""
        assert self._example is not None, "every process has tried the model"
        args, kwargs = self._example
        self._helping = True
        try:
            network.module(*args, **kwargs)
        finally:
            self._helping = False


class _Network:
    """A sharded network."""

    def __init__(self, network: nn.Module) -> None:
        self.module, self.gathered = network, False
        self._units = [part for part in network.modules() if isinstance(part, FSDPModule)]

    def gather(self) -> None:
        """Gets all weights and keeps them; each process gathers, or passes on."""
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        self.gathered = True

    def pass_on(self) -> None:
        """Takes part while others gather; has as much of it afterwards as before."""
        for unit in self._units:
            unit.reshard()
            unit.unshard()
            if not self.gathered:
                unit.reshard()

    def release(self) -> None:
        """Keeps its own part only."""
        if self.gathered:
            for unit in self._units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()
            self.gathered = False


def spread_over(network: nn.Module, mesh: DeviceMesh, computes_in: torch.dtype) -> None:
    """`fully_shard` of every block of a network, of its other large parts and of what is left, in place.

    Gathered weights are given back after every evaluation, the root's too: weights that were swapped meanwhile would
    not be seen otherwise.

    Args:
        network: on the mesh's devices.
        mesh: (processes,), or (replicas, processes of each).
        computes_in: the dtype of gathered weights; what is trained is kept, and its gradients are summed, in float32.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=None if computes_in == torch.float32 else computes_in,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for part in (*units_of(network), network):
        fully_shard(part, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def units_of(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that are gathered one after another: its blocks, and other large parts of it."""
    everything = sum(weight.numel() for weight in network.parameters())
    units = list[nn.Module]()
    for part in network.children():
        if isinstance(part, nn.ModuleList):
            units += [block for block in part if any(True for _ in block.parameters())]
        elif any(True for _ in part.children()):
            size = sum(weight.numel() for weight in part.parameters())
            units += [part] if size > _OWN_UNIT * everything else []
    return units


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
