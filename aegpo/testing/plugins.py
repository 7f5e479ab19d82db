"""What tests of a plugin ask of the installation: is it found, and what does an experiment file choose with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.core.registry import Spec
from aegpo.errors import ContractError
from aegpo.plugin.manager import distributions, load_registries, plugin_manager


def check_installed(spec: type[Spec], distribution: str) -> None:
    """The spec is registered, by the entry point of that distribution."""
    manager = plugin_manager()
    sources = [entry.source for registry in load_registries(manager) for entry in registry if entry.spec is spec]
    if not sources:
        raise ContractError(
            f"spec {spec.__name__!r} is not registered; distribution {distribution!r} needs an entry point in the "
            "group 'aegpo' whose module adds it, and must not be named by AEGPO_BLOCK_PLUGINS"
        )
    if sources != [distribution]:
        raise ContractError(f"spec {spec.__name__!r} is registered by {sources[0]!r}, not by {distribution!r}")
    if (distribution, version(distribution)) not in distributions(manager):
        raise ContractError(f"distribution {distribution!r} is not among those that a run writes down as its plugins")


def load_arms(path: Path, overrides: Sequence[str] = ()) -> Mapping[str, Experiment]:
    """Arm -> what an experiment file resolves to with everything that is installed, as `aegpo check` reads it.

    Args:
        path: of the YAML file.
        overrides: `key.path=value` each, as for `--set`.

    Raises:
        SpecError: with every mistake, its place, the line and a caret.
    """
    return load_experiment_file(path, load_registries(plugin_manager()), overrides).arms
