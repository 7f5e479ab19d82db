"""Small experiments of the command tests: the `SPEC` of a module, with weights that are made in the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch


@pytest.fixture(scope="module")
def experiment(request, tmp_path_factory, tiny_weights) -> Path:
    """The file."""
    path = tmp_path_factory.mktemp("experiment") / "small.yaml"
    path.write_text(request.module.SPEC.format(weights=tiny_weights))
    return path


@pytest.fixture(scope="module")
def arm(experiment) -> Path:
    """The folder of its one arm after a run under both seeds."""
    for seed in (0, 1):  # one at a time, which is in this process
        assert launch(LaunchRequest(experiment, seeds=(seed,), out=experiment.parent, report=False)) == 0
    return experiment.parent / "small" / "main"
