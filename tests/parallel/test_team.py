"""What the processes of a run tell each other."""

from __future__ import annotations

import json
import os
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port

from aegpo.core.processes import Place
from aegpo.errors import AegpoError, CheckpointError, ContractError, ProcessLostError, SettingError
from aegpo.parallel.faults import Fault, agreed_on, fault_of
from aegpo.parallel.team import Team

SIZE = 2


def in_a_team(rank: int, port: int, folder: str) -> None:
    """Runs every check in one process of a team; what fails is written down."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    team = Team.joined()
    team.use(1, torch.device("cpu"))
    failed: dict[str, str] = {}
    for name, check in CHECKS.items():
        try:
            check(team)
        except Exception:
            failed[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(failed))
    with suppress(ProcessLostError):  # after the last check nobody answers any more
        team.leave()
    os._exit(0)  # as commands end that lost another process: gloo's threads may still wait, and cannot be joined


def fail_or_go_on(team, rank, error):
    if team.place.rank == rank:
        raise error
    team.told("what the other never gets to", 1)


def who_is_who(team):
    assert team.size == 2
    assert team.shards == 2
    assert [list(team.cut(5).of(rank)) for rank in range(2)] == [[0, 1], [2, 3, 4]]
    assert team.cut(4).exact
    assert not team.cut(5).exact
    assert team.cut(5).by_process([1, 2, 3, 4, 5]) == [3, 12]


def everybody_is_heard(team):
    long = "x" * (10_000 * (1 + team.place.rank))
    assert team.told("short", team.place.rank) == [0, 1]
    assert [len(each) for each in team.told("long", long)] == [10_000, 20_000]
    assert team.any("one of two", team.place.rank == 1)
    assert not team.any("none", False)


def floats_are_told_to_the_bit(team):
    values = [0.1 + team.place.rank, 1e-308, 1 / 3]
    assert team.told("floats", values)[team.place.rank] == values


def an_error_of_one_is_raised_by_all(team):
    error = ContractError("reward 'x' failed")
    error.location, error.part = ("rewards", 0), ("reward", "x")
    with pytest.raises(ContractError) as caught, team.agreed("work"):
        fail_or_go_on(team, 1, error)
    assert caught.value.message.startswith("reward 'x' failed")
    assert caught.value.location == ("rewards", 0)
    assert caught.value.part == ("reward", "x")
    assert caught.value.told_elsewhere == (team.place.rank == 1)
    assert ("(process 1 of 2)" in str(caught.value)) == (team.place.rank == 0)
    assert team.told("and all are together again", 3) == [3, 3]


def a_defect_is_told_by_the_one_that_has_it(team):
    kind = KeyError if team.place.rank == 0 else AegpoError
    with pytest.raises(kind) as caught, team.agreed("outer"), team.agreed("inner"):
        fail_or_go_on(team, 0, KeyError("missing"))
    if team.place.rank == 1:
        assert caught.value.told_elsewhere
        assert "process 0 of 2 failed with KeyError" in str(caught.value)
    assert team.told("together", None) == [None, None]


def who_is_elsewhere_is_told_so(team):
    with pytest.raises(ProcessLostError, match=r"went different ways.*process 1 at 'step 2'"):
        team.told(f"step {1 + team.place.rank}")


def rows_come_together_in_the_order_of_shards(team):
    cut = team.cut(3)
    own = [torch.full((shard, 2), float(shard)) for shard in cut.mine]
    assert cut.gathered("rows", own, [0, 1, 2]).tolist() == [[1, 1], [2, 2], [2, 2]]
    nothing = cut.gathered("nothing", [torch.zeros(0, 2) for _ in cut.mine], [0, 0, 0])
    assert nothing.shape == (0, 2)


def what_one_has_nothing_of_still_comes(team):
    own = [torch.arange(6, dtype=torch.bfloat16).view(3, 2)] if team.place.rank == 1 else []
    (found,) = team.spread("of one", own, [0, 3])
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[0, 1], [2, 3], [4, 5]]


def rows_go_to_those_who_ask(team):
    holder, place = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 0, 1, 2])
    tables = [torch.tensor([0.0, 10.0]), torch.tensor([20.0, 30.0, 40.0])]
    own = tables[team.place.rank]
    wanted = [np.array([4, 0, 2]), np.array([1, 3])]
    found, twice = team.moved("rows", [own, own.double() * 2], holder, place, wanted)
    assert found.tolist() == [[40, 0, 20], [10, 30]][team.place.rank]
    assert torch.equal(twice, found.double() * 2)


def sums_have_the_bits_of_one_process(team):
    like = [torch.zeros(5), torch.zeros(3, dtype=torch.float64), torch.zeros(2), torch.zeros(1)]

    def of(shard):
        rng = torch.Generator().manual_seed(shard)
        values = [torch.randn(each.shape, generator=rng, dtype=each.dtype) for each in like]
        return [values[0], values[1], values[2] if shard == 5 else None, None]

    for shards in (2, 8, 12, 3):
        cut = team.cut(shards)
        alone, found = Team.alone(shards).summed("sum", like, of), cut.summed("sum", like, of)
        assert found[3] is None
        for one, other in zip(alone[:3], found[:3], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert torch.equal(one, other) if cut.exact else torch.allclose(one, other)


def a_zero_of_either_sign_is_the_same_sum(team):
    def of(shard):
        return [torch.tensor([-0.0]) if shard == 0 else None]

    alone = Team.alone(2).summed("zero", [torch.zeros(1)], of)[0]
    found = team.summed("zero", [torch.zeros(1)], of)[0]
    assert torch.signbit(alone).equal(torch.signbit(found))


def what_differs_is_named(team):
    team.same("plan", lambda: "digest")
    with pytest.raises(AegpoError, match="process 1 has another plan than process 0"):
        team.same("plan", lambda: f"digest {team.place.rank}")


def the_first_of_a_machine_goes_first(team):
    path = Path(os.environ["TURNS"])
    with team.in_turn("files"):
        if team.place.local_rank == 0:
            path.touch()
        assert path.exists()


def who_does_not_answer_is_named(team):
    """The last check: nothing can be sent afterwards."""
    team.use(0.05, torch.device("cpu"))
    over = Path(os.environ["TURNS"]).with_name("over")
    if team.place.rank == 1:
        begin = time.monotonic()
        while not over.exists() and time.monotonic() - begin < 60:
            time.sleep(0.05)
        return
    with pytest.raises(ProcessLostError, match=r"process 1 of the 2 of this run did not answer for 0.1 minutes"):
        team.told("where the other is not")
    over.touch()


CHECKS = {
    check.__name__: check
    for check in (
        who_is_who,
        everybody_is_heard,
        floats_are_told_to_the_bit,
        an_error_of_one_is_raised_by_all,
        a_defect_is_told_by_the_one_that_has_it,
        rows_come_together_in_the_order_of_shards,
        what_one_has_nothing_of_still_comes,
        rows_go_to_those_who_ask,
        sums_have_the_bits_of_one_process,
        a_zero_of_either_sign_is_the_same_sum,
        what_differs_is_named,
        the_first_of_a_machine_goes_first,
        who_is_elsewhere_is_told_so,
        who_does_not_answer_is_named,
    )
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("team")
    os.environ["TURNS"] = str(folder / "turns")
    mp.spawn(in_a_team, (free_port(), str(folder)), nprocs=SIZE)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize("name", list(CHECKS))
def test_in_a_team_of_two(failures, name):
    told = [failure[name] for failure in failures if name in failure]
    assert not told, "\n".join(told)


def test_a_process_alone_is_a_team():
    team = Team.alone(4)
    assert list(team.mine) == [0, 1, 2, 3]
    assert team.first
    assert team.exact
    assert team.told("anything", 3) == [3]
    with team.agreed("work"), team.in_turn("files"):
        pass
    with pytest.raises(KeyError), team.agreed("work"):
        raise KeyError
    team.use(1, torch.device("cpu"))
    team.same("plan", lambda: pytest.fail("nobody to compare with"))
    assert team.gathered("rows", [torch.ones(1), torch.zeros(2)], [1, 2]).tolist() == [1, 0, 0]
    team.leave()


@pytest.mark.parametrize(
    "error", [SettingError("no such", "model", "path"), CheckpointError("damaged"), ValueError("oh"), AegpoError("x")]
)
def test_an_error_crosses_to_another_process(error):
    there, here = Place(1, 4), Place(0, 4)
    fault = Fault(**json.loads(json.dumps(fault_of(error, there).as_json())))
    found = fault.error(here, None)
    assert agreed_on(found)
    assert found.location == getattr(error, "location", ())
    if isinstance(error, AegpoError):
        assert type(found) is type(error)
        assert str(found) == f"{error} (process 1 of 4)"
        assert not found.told_elsewhere
    else:
        assert str(found) == "process 1 of 4 failed with ValueError: oh"
        assert found.told_elsewhere
    assert fault.error(there, error) is error


def test_a_lost_process_is_told_to_nobody():
    assert agreed_on(ProcessLostError("gone"))
    assert not agreed_on(AegpoError("wrong"))


def test_an_error_that_is_its_own_cause_is_looked_at_once():
    error = OSError("a disk is full")
    error.__cause__ = error
    assert not agreed_on(error)
