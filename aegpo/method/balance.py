"""How evenly a training step can be shared out among several processes, from plans alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aegpo.core.experiment import Experiment
from aegpo.core.processes import Place
from aegpo.core.records import RolloutPlan
from aegpo.method.partition import Partition
from aegpo.method.planning import made_up_signals, plan_steps
from aegpo.parallel.team import Team
from aegpo.prompts.lists import numbered


@dataclass(frozen=True)
class Share:
    """The least and the most of a ratio among the plans that were made."""

    low: float
    high: float

    def __str__(self) -> str:
        low, high = f"{self.low:.2f}", f"{self.high:.2f}"
        return low if low == high else f"{low}-{high}"


@dataclass(frozen=True)
class Balance:
    """What sampling takes on several processes."""

    dearest: Share  # forwards of the process with most, in those of an even share; 1: N processes take 1/N of the time
    repeated: Share  # forwards that one process would not make, in those that it would


def of_prompts(experiment: Experiment) -> bool:
    """True if a step is cut between prompts only: a reward compares all images of one."""
    return any(spec.group_wise for spec in experiment.rewards)


def balances(experiment: Experiment, wanted: Sequence[tuple[int, int]]) -> list[Balance]:
    """What sampling takes for each (processes, shards) of `wanted`, over the plans that `costs` makes.

    Prompts are taken to ask different things; what a step asks twice stays together where prompts do.

    Raises:
        ContractError: if the allocator, selector or tree returns what its interface forbids.
    """
    plans = list(plan_steps(experiment, made_up_signals(experiment)))
    return [_balance(experiment, plans, processes, shards) for processes, shards in wanted]


def _balance(experiment: Experiment, plans: Sequence[RolloutPlan], processes: int, shards: int) -> Balance:
    team = Team(Place(size=processes), None, shards)
    dearest, repeated = list[float](), list[float]()
    for plan in plans:
        prompts = numbered(map(str, range(int(plan.group.max()) + 1)))
        spent = Partition.of(plan, shards, prompts if of_prompts(experiment) else None).forwards
        dearest.append(max(team.by_process(spent)) * processes / plan.forwards)
        repeated.append(sum(spent) / plan.forwards - 1)
    return Balance(Share(min(dearest), max(dearest)), Share(min(repeated), max(repeated)))
