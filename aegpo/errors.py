"""What goes wrong because of the user's input or a plugin: a message, exit code 2, no traceback."""

from __future__ import annotations


class AegpoError(Exception):
    """A mistake in the user's input, in a plugin or in a run folder; the message says what would be right."""


class SpecError(AegpoError):
    """One or more mistakes in an experiment file, each with its place."""


class PluginError(AegpoError):
    """A plugin that cannot be imported, registers a taken name or misspells a hook."""


class ContractError(AegpoError):
    """A part returned something its interface forbids; the message names the part."""


class PlanError(AegpoError):
    """A tree that cannot have the asked rollouts with the chosen steps; the message says what it could."""


class RewardError(ContractError):
    """A reward that failed or misbehaved; nothing was learned from the step, so the run can go on before it."""


class MemoryShortageError(AegpoError):
    """Not enough memory for a stage of a run; the message says which setting to lower."""


class CheckpointError(AegpoError):
    """A checkpoint or run folder that cannot be used, and what to do about it."""
