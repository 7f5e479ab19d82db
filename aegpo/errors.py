"""What goes wrong because of the user's input or a plugin: a message, exit code 2, no traceback."""

from __future__ import annotations


class AegpoError(Exception):
    """A mistake in the user's input, in a plugin or in a run folder; the message says what would be right."""

    location: tuple[str | int, ...] = ()  # the keys of the experiment it is about, where that is known
    part: tuple[str, str] | None = None  # whose fault it is: such as "reward", and its kind there
    told_elsewhere: bool = False  # another process of the run tells it

    @property
    def message(self) -> str:
        """What is wrong, without the place."""
        return str(self.args[0])


class UserInterrupt(KeyboardInterrupt):
    """The user's Ctrl-C, where the command line watches for it: any other KeyboardInterrupt was raised by a part."""


class SettingError(AegpoError):
    """A setting of the experiment that cannot be had; shown after its keys: ``prompts: cannot read ...``."""

    def __init__(self, message: str, *location: str | int) -> None:
        super().__init__(message)
        self.location = location

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.location))}: {self.message}"


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


class ObserverError(AegpoError):
    """A tracker, plugin or part that failed when it was told of the run; the state of the run is saved."""

    recorded: bool = True  # the run's record has what the observers were told


class MemoryShortageError(AegpoError):
    """Not enough memory for a stage of a run; the message says which setting to lower."""


class CheckpointError(AegpoError):
    """A checkpoint or run folder that cannot be used, and what to do about it."""


class DiskError(CheckpointError):
    """A disk that takes no more, or a folder that may not be written to; the message says what to do about it."""


class ProcessLostError(AegpoError):
    """Another process of the run is gone, hangs or went another way; nothing of the step it was in can be kept."""
