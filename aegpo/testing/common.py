"""What the conformance checks share: the spec every part must have, inputs, and equality of equal calls."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
from pydantic import ValidationError

from aegpo.core.as_json import dumps, loads
from aegpo.core.interfaces import Stateful
from aegpo.core.records import BoolArray, IntArray
from aegpo.core.registry import KEBAB_CASE, Spec, kind_of
from aegpo.errors import ContractError

SIZES = tuple(product((1, 2, 3, 8), (2, 5, 10)))  # prompts and denoising steps
ROUNDING = 1e-4  # relative: what another batch size may change
_IMPORT = """
import importlib, json, operator, sys
sys.path[:] = json.loads(sys.argv[1])
operator.attrgetter(sys.argv[3])(importlib.import_module(sys.argv[2])).model_validate_json(sys.argv[4])
sys.exit(3 if "torch" in sys.modules else 0)
"""


def check_spec(spec: Spec) -> None:
    """What every part's spec must have; the checks below begin with it.

    A kebab-case kind, a docstring, a description of every field, no tolerance for unknown keys, a JSON form that reads
    back equal, and a module that can be imported without torch.
    """
    cls, kind = type(spec), kind_of(type(spec))
    who = f"spec {cls.__name__!r}"
    if kind is None or not KEBAB_CASE.fullmatch(kind):
        raise ContractError(f"{who} has no kind; give it  kind: Literal['my-name'] = 'my-name'  (kebab-case)")
    if not (cls.__dict__.get("__doc__") or "").strip():
        raise ContractError(f"{who} has no docstring; its first line is what 'aegpo plugins' shows")
    for name, field in cls.model_fields.items():
        if name != "kind" and not field.description:
            raise ContractError(f"{who} has a field {name!r} without a description; use Field(description=...)")
    data = spec.model_dump(mode="json")
    if cls.model_validate(loads(dumps(data))) != spec:
        raise ContractError(f"{who} does not read back equal from its JSON {data}")
    try:
        cls.model_validate({**data, "no_such_key": 1})
    except ValidationError:
        pass
    else:
        raise ContractError(f"{who} accepts unknown keys; keep extra='forbid'")
    if "<locals>" not in cls.__qualname__:
        _check_import(who, cls, json.dumps(data))


def _check_import(who: str, cls: type[Spec], data: str) -> None:
    arguments = [json.dumps(sys.path), cls.__module__, cls.__qualname__, data]
    done = subprocess.run([sys.executable, "-c", _IMPORT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        raise ContractError(f"{who} imports torch with its module {cls.__module__!r}; import it inside functions")
    if done.returncode:
        raise ContractError(f"{who} cannot be imported and validated on its own: {done.stderr.strip()}")


def decision_rng() -> np.random.Generator:
    """A generator that is the same in every call."""
    return np.random.default_rng(0)


def tree_inputs() -> Iterator[tuple[IntArray, BoolArray]]:
    """Equal and unequal counts, with all, some and single chosen steps."""
    rng = decision_rng()
    for prompts, num_steps in SIZES:
        chosen = [np.ones((prompts, num_steps), dtype=np.bool_), rng.random((prompts, num_steps)) < 0.4]
        chosen += [np.tile(np.eye(num_steps, dtype=np.bool_)[step], (prompts, 1)) for step in (0, num_steps - 1)]
        for steps, counts in product(chosen, (np.full(prompts, 8), rng.integers(2, 17, prompts))):
            steps[~steps.any(axis=1), 0] = True
            yield counts.astype(np.int64), steps


def check_equal(who: str, one: Any, other: Any) -> None:
    """Refuses two results of equal calls that differ."""
    if not bool((one == other).all()):
        raise ContractError(f"{who} decides differently in two equal calls; draw only from what it is given")


def check_memory(who: str, used: Any, fresh: Any, call: Callable[[Any], Any]) -> None:
    """A part with state must go on from `state_dict` as if it had never stopped."""
    if isinstance(used, Stateful):
        fresh.load_state_dict(copy.deepcopy(used.state_dict()))
        if not bool((call(used) == call(fresh)).all()):
            raise ContractError(
                f"{who} goes on differently after load_state_dict(state_dict()); store all it remembers"
            )
