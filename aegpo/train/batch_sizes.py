"""Micro-batches that are left to the machine: the fewest states at once that are nearly as fast as any number.

What a device needs to be busy, and what its memory holds, nobody knows beforehand. So where a file says `auto`, the
network is timed on noise: 1, 2, 4, ... states at once, until more of them are no faster or memory may not hold them.
Nothing is drawn from global generators and nothing is learned. Another number moves results by rounding only, so the
one that was found belongs to the run, which notes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aegpo.core.experiment import Experiment
from aegpo.core.memory import free_bytes, is_shortage
from aegpo.core.records import Prompt
from aegpo.train.policy import Policy
from aegpo.train.retained import saved_bytes

_NEARLY = 0.95  # of the best rate, which is fast enough
_PATIENCE = 2  # doublings in a row that are no faster, after which no more are tried
_SHARE = 0.25  # of free memory, for the graph of one batch: sampling may keep graphs in half of it
_REPEATS = 2  # timings of a size, after one that is not timed; the faster counts
_MOST = 1024

Rate = Callable[[int], float | None]  # states a second of so many at once; None: no memory for them


def settled(policy: Policy, experiment: Experiment, prompt: Prompt) -> Experiment:
    """The experiment with a number wherever it leaves a micro-batch to the machine, the same in all its processes.

    Args:
        policy: of the experiment; its weights have no gradients before or after.
        experiment: whose `rollouts.micro_batch` and `optimizer.micro_batch` may be `auto`.
        prompt: what the network is told while it is timed.
    """
    auto = {name for name in ("rollouts", "optimizer") if getattr(experiment, name).micro_batch == "auto"}
    if not auto:
        return experiment
    trial = Trial.of(policy, experiment, prompt)
    most = min(_MOST, -(-experiment.rollouts.rollouts_per_step // policy.team.shards))
    rates = {"rollouts": trial.sampled, "optimizer": trial.learned}
    own = {name: fewest(_together(policy, rates[name]), most) for name in sorted(auto)}
    said = policy.team.told("micro-batches that fit", own)
    found = {name: min(int(each[name]) for each in said) for name in own}
    sections = {name: getattr(experiment, name).model_copy(update={"micro_batch": n}) for name, n in found.items()}
    return experiment.model_copy(update=sections)


def _together(policy: Policy, rate: Rate) -> Rate:
    """The least rate of all processes, where they have to try the same sizes: each has only a part of the weights."""
    if policy.sharding is None:
        return rate

    def least(size: int) -> float | None:
        with policy.in_lockstep():
            own = rate(size)
        said = policy.team.told("a micro-batch was timed", own)
        return None if None in said else min(said)

    return least


def fewest(rate: Rate, most: int) -> int:
    """The smallest of 1, 2, 4, ... and `most` whose rate is at least `_NEARLY` of the best one found."""
    rates, size, slower = dict[int, float](), 1, 0
    while slower < _PATIENCE:
        found = rate(size)
        if found is None:
            break
        slower = slower + 1 if rates and found * _NEARLY < max(rates.values()) else 0
        rates[size] = found
        if size >= most:
            break
        size = min(2 * size, most)
    return next((each for each, found in rates.items() if found >= _NEARLY * max(rates.values())), 1)


@dataclass(frozen=True)
class Trial:
    """A network that is timed on noise."""

    policy: Policy
    prompt: Prompt
    room: float  # bytes that the graph of one batch may take
    each: float  # bytes of a state's graph

    @classmethod
    def of(cls, policy: Policy, experiment: Experiment, prompt: Prompt) -> Trial:
        """For an experiment, before its optimizer has gradients or moments of the trained weights."""
        trained = sum(weight.numel() for weight in policy.weights.trained.values())
        booked = trained * 4 * (1 + experiment.optimizer.num_moments)
        sharing = policy.team.place.local_size if policy.device.type == "cpu" else 1
        room = _SHARE * max(0, free_bytes(policy.device) - booked) / sharing
        trial = cls(policy, prompt, room, 0.0)
        ask = trial._asked(1)
        with torch.enable_grad(), policy.in_lockstep():
            _, each = saved_bytes(policy.model.policy, ask)
        return cls(policy, prompt, room, each)

    def sampled(self, size: int) -> float | None:
        """States a second without a graph."""
        with torch.no_grad():
            return self._rate(size, self._asked)

    def learned(self, size: int) -> float | None:
        """States a second with a graph and its backward pass."""

        def prepared(count: int) -> Callable[[], Tensor]:
            ask = self._asked(count)

            def learn() -> Tensor:
                loss = ask().square().mean()
                torch.autograd.backward(loss)
                return loss

            return learn

        with torch.enable_grad():
            return self._rate(size, prepared)

    def _asked(self, size: int) -> Callable[[], Tensor]:
        """What the network says of so many states of noise, at the schedule's middle level."""
        policy = self.policy
        cond = policy.encode([self.prompt]).select(torch.zeros(size, dtype=torch.int64, device=policy.device))
        noise = torch.randn((size, *policy.latent_shape), generator=torch.Generator().manual_seed(0)).to(policy.device)
        sigma = policy.sigmas[len(policy.sigmas) // 2].expand(size)
        return lambda: policy.velocity(noise, sigma, cond)

    def _rate(self, size: int, prepared: Callable[[int], Callable[[], Tensor]]) -> float | None:
        if size > 1 and size * self.each > self.room:
            return None
        try:
            work = prepared(size)
            return size / min([self._seconds(work) for _ in range(1 + _REPEATS)][1:])
        except Exception as error:
            if not is_shortage(error):
                raise
            return None
        finally:
            self._forget()

    def _seconds(self, work: Callable[[], Tensor]) -> float:
        begin = time.perf_counter()
        work()
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
        return time.perf_counter() - begin

    def _forget(self) -> None:
        """No gradient is left."""
        for weight in self.policy.weights.trained.values():
            weight.grad = None
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()
