"""One study of every kind of arm, and its report."""

from __future__ import annotations

import pytest
from studies import ARMS, report, write_experiment


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ablation"
    folder.mkdir()
    return write_experiment(folder, ARMS)


@pytest.fixture(scope="session")
def reported(written):
    return report(written)
