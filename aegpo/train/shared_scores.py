"""Scores of held-out prompts that do not depend on training: of the base, and of a policy that has learned nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aegpo.core import contracts
from aegpo.core.digests import digest_of_told
from aegpo.core.interfaces import Stateful
from aegpo.core.records import Prompt
from aegpo.core.sharing import Arrays, Identified, Store
from aegpo.prompts.images import identity
from aegpo.train.policy import Policy
from aegpo.train.scoring import Scorer
from aegpo.train.untrained import of_start

_TOGETHER = 16  # prompts whose encodings are in memory at once
_IMAGES = "images/"


class SharedScores:
    """A store of them, and what they depend on, as it is before anything is learned."""

    def __init__(
        self, store: Store, policy: Policy, common: Mapping[str, Any], prompts: Sequence[Sequence[Prompt]]
    ) -> None:
        """`prompts`: of each of this process's shards."""
        self._store, self._policy, self._common, self._prompts = store, policy, common, prompts
        self._start, self._told = of_start(policy), list[Any]()

    @classmethod
    def of(
        cls, store: Store, policy: Policy, scorers: Sequence[Scorer], prompts: Sequence[Sequence[Prompt]]
    ) -> SharedScores | None:
        """None: scores must not be shared.

        That is where a reward does not say what its scores follow from, as one that remembers, draws by chance, has
        weights of its own or asks a server, or compares the policy's images with the base's, all of which it needs.
        """
        said = list[Mapping[str, Any]]()
        for scorer in scorers:
            reward, compares = scorer.reward, scorer.group_wise and scorer.compared_with == "base"
            if compares or isinstance(reward, Stateful) or not isinstance(reward, Identified):
                return None
            with contracts.blaming("reward", scorer.label, kind=scorer.kind):
                said.append(json.loads(json.dumps(reward.identity())))
        spec = policy.experiment
        sizes = {"micro_batch": spec.rollouts.latents_at_once, "denoising_steps": spec.rollouts.denoising_steps}
        rewards = [reward.model_dump(mode="json") for reward in spec.rewards]
        painted = spec.evaluation.model_dump(mode="json", exclude={"every"})
        return cls(store, policy, {"evaluation": painted, "rewards": rewards, "identities": said, **sizes}, prompts)

    def of_base(self, measure: Callable[[], Arrays]) -> Arrays:
        """What the base's images score."""
        return self._store.known("evaluation", lambda: {"whose": "base", **self._depends_on()}, measure)

    def of_start(self, measure: Callable[[], Arrays]) -> Arrays:
        """What those of the untrained policy score."""
        return self._store.known("evaluation", lambda: {"whose": self._start, **self._depends_on()}, measure)

    def _depends_on(self) -> dict[str, Any]:
        """Settings, and what network and rewards are told, in all processes."""
        if not self._told:
            own = [[self._told_of(prompts), [*map(_plain, prompts)]] for prompts in self._prompts]
            self._told = [shard for each in self._policy.team.told("what evaluations ask", own) for shard in each]
        return {**self._common, "told": self._told}

    def _told_of(self, prompts: Sequence[Prompt]) -> list[str]:
        """Digests of what the network is told."""
        firsts = range(0, len(prompts), _TOGETHER)
        return [digest_of_told(self._policy.told(prompts[first : first + _TOGETHER])) for first in firsts]


def _plain(prompt: Prompt) -> str:
    """What rewards are told; metadata of a dataset may be more than JSON has."""
    return json.dumps([prompt.index, prompt.occurrence, identity(prompt), dict(prompt.metadata)], default=repr)


def as_bytes(images: Tensor) -> Arrays:
    """Images of whatever type as an array that a store keeps, by a name that says which type."""
    return {_IMAGES + str(images.dtype).removeprefix("torch."): images.contiguous().view(torch.uint8).numpy()}


def of_bytes(arrays: Arrays) -> Tensor:
    """The images that `as_bytes` was given."""
    name = next(name for name in arrays if name.startswith(_IMAGES))
    images: Tensor = torch.from_numpy(arrays[name]).view(getattr(torch, name.removeprefix(_IMAGES)))
    return images
