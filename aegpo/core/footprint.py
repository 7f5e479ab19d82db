"""What a run needs in memory, as `aegpo check` prints it and as choices that are left to the machine go by."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shares:
    """What several processes may hold a part of each, and what of it they gather, in bytes.

    Weights are gathered in the dtype that the network computes in, block by block: a block is what
    `aegpo.parallel.sharding.units_of` finds.
    """

    unshared: int  # of `weights`: on every process in any case, as the image decoder
    base: int  # of `weights`: the frozen copy of a network that is fine-tuned in full
    gradients: int  # of `optimizer`: not there while images are sampled
    network: int  # the trained network, gathered
    block: int  # of it, the block with the most weights
    outside: int  # of it, what is in no block
    sampling: int  # what one micro-batch of sampling computes at once, without graphs


@dataclass(frozen=True)
class Footprint:
    """What a run needs in memory, in bytes, estimated before anything is loaded."""

    parameters: int  # of the trained network, adapters included; a count
    trainable: int  # a count
    weights: int  # the network, a copy of it where it is fine-tuned in full, and the image decoder
    optimizer: int  # gradients, AdamW's moments, and the running average if one is kept
    activations: int  # of one training micro-batch
    recomputes: bool | None = None  # activations are few and computed again in the backward pass; None: not known
    whole: int | None = None  # activations without that, where it is left to the machine; None: nothing is
    whole_from: int | None = None  # free memory from which on the machine does without
    retained: int | None = 0  # graphs that sampling keeps for an update, at most; None: half of what is free then
    shares: Shares | None = None  # None: the processes of a run hold all of it each, or it is not known

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.weights + self.optimizer + self.activations + (self.retained or 0)

    def on(self, room: int) -> Footprint:
        """That of a device with `room` bytes free, where it is known what the machine decides."""
        if self.whole is None or self.whole_from is None or room < self.whole_from:
            return self
        return replace(self, activations=self.whole, recomputes=False)
