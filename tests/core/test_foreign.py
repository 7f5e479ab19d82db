"""Foreign code at work: whatever it raises is told with its name, and what others rely on stays as it was."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from aegpo.core.contracts import blaming
from aegpo.core.foreign import watching_for_the_user
from aegpo.errors import ContractError, RewardError, UserInterrupt


class Evil(BaseException):
    pass


@pytest.fixture
def ctrl_c_is_heard():
    """As in a terminal: what a script starts in the background is deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def failing(error):
    with pytest.raises(ContractError) as caught, watching_for_the_user(), blaming("reward", "mine", kind="bad"):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SystemExit(0), "SystemExit: 0"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (Evil("oops"), "Evil: oops"),
        (ValueError("two\nlines"), "ValueError: two lines"),
    ],
)
def test_whatever_a_part_raises_is_its_failure_in_one_line(error, told):
    blamed = failing(error)
    assert str(blamed) == f"reward 'mine' failed with {told}"
    assert blamed.__cause__ is error
    assert (blamed.location, blamed.part) == (("reward",), ("reward", "bad"))


def test_words_of_its_own_pass_with_the_part():
    blamed = failing(RewardError("give it another prompt"))
    assert (str(blamed), blamed.part) == ("give it another prompt", ("reward", "bad"))


def test_ctrl_c_of_the_user_is_no_parts_failure(ctrl_c_is_heard):
    with pytest.raises(UserInterrupt), watching_for_the_user(), blaming("reward", "mine"):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), blaming("reward", "mine"):  # of a library's user: nobody watches
        raise KeyboardInterrupt


def close_stdout():
    sys.stdout.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: torch.set_default_dtype(torch.float64), "left torch's default dtype at torch.float64"),
        (lambda: torch.set_grad_enabled(False), "left gradients off for others"),
        (lambda: os.chdir("/"), "left the working directory at /"),
        (close_stdout, "closed stdout, which the run still writes to"),
    ],
)
def test_what_others_rely_on_is_set_back_and_who_changed_it_is_blamed(monkeypatch, tmp_path, change, message):
    monkeypatch.chdir(tmp_path)
    with Path(os.devnull).open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(ContractError, match="reward 'mine'") as caught, blaming("reward", "mine"):
            change()
        sys.stdout.write("still there")
    assert message in str(caught.value)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert Path.cwd() == tmp_path


def change_and_fail():
    torch.set_default_dtype(torch.float64)
    raise KeyError("oops")


def test_a_failure_goes_before_what_was_changed_and_that_is_set_back_too():
    with pytest.raises(ContractError, match="failed with KeyError"), blaming("reward", "mine"):
        change_and_fail()
    assert torch.get_default_dtype() == torch.float32


def draws():
    """The next numbers of the global generators, which stay where they are."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = random.random(), np.random.random(), torch.rand(1).item()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return drawn


@pytest.mark.parametrize("seed", [random.seed, np.random.seed, torch.manual_seed])
def test_seeds_of_the_global_generators_are_set_back_and_told(seed):
    expected = draws()
    with pytest.warns(UserWarning, match="reward 'mine' seeds the global generators"), blaming("reward", "mine", True):
        seed(1)
    assert draws() == expected


@pytest.mark.parametrize("count", [1, 1000])
def test_who_draws_from_the_global_generators_seeds_none(count):
    before = draws()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with blaming("reward", "mine", once=True):
            for _ in range(count):
                random.random()
            np.random.random(count)
            torch.rand(count)
    assert not set(before) & set(draws())
