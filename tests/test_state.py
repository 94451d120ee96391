"""Wherever a call is interrupted the model is as it was, and results are nobody else's.

Over every public function that takes a model, with the arguments that the fuzz run starts from.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asked import state
from fuzz_calls import calls
from hand_built import one_of_each
from public import FUNCTIONS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tl_contextmix as cm
from tl_contextmix.results import Result
from tl_contextmix.results.base import same

pytestmark = pytest.mark.once
PLACES = 4  # where a call is interrupted: at these parts of its operations
# These load or start something, and take no model.
NAMES = [
    name
    for name, function in FUNCTIONS.items()
    # The fuzz run's arguments name no components that it can read.
    if name != "component_readouts"
    and next(iter(inspect.signature(function).parameters), "") == "model"
]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found = calls(tmp_path_factory.mktemp("calls"))
    # A bridge stores an attribute in its first padded pass; the call after it looks for changes.
    cm.scan(**found["scan"])
    return found


class Interrupt(TorchDispatchMode):
    """Raises KeyboardInterrupt at one of PyTorch's operations; counts them."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def tensors(found: Any) -> Iterator[Tensor]:
    """Every tensor of a result."""
    if isinstance(found, Tensor):
        yield found
    elif dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            yield from tensors(getattr(found, field.name))
    elif isinstance(found, dict):
        for value in found.values():
            yield from tensors(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from tensors(value)


def test_there_are_many() -> None:
    assert len(NAMES) > 20
    assert {"decoder_lens", "mine_triggers", "integrated_gradients", "check"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_left_as_it_was_wherever_a_call_is_interrupted(
    name: str, table: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    function, model = FUNCTIONS[name], table[name]["model"]
    folders = (tmp_path / str(number) for number in itertools.count())

    def call() -> Any:
        # What is mined already would not be mined again.
        other = {"out": next(folders)} if "out" in table[name] else {}
        return function(**{**table[name], **other})

    call()
    before = state(model)
    with Interrupt() as counted:
        call()
    assert state(model) == before
    assert counted.count > PLACES
    for place in range(PLACES):
        at = 1 + (counted.count - 1) * place // (PLACES - 1)
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            call()
        assert state(model) == before, (place, counted.count)
    if "out" in table[name] or name == "compare":
        return  # what they return names a folder, or how long it took
    found = call()
    kept = copy.deepcopy(found)
    # What a caller writes on a result is seen neither by the model nor by the next call.
    for tensor in tensors(found):
        storage: Any = tensor.untyped_storage()
        storage.fill_(0)
    assert state(model) == before
    assert same(call(), kept)


RESULTS = [pytest.param(result, id=type(result).__name__) for result in one_of_each()]


@pytest.mark.parametrize("result", RESULTS)
def test_what_a_result_is_asked_leaves_it_as_it_was(result: Result) -> None:
    kept, asked = copy.deepcopy(result), 0
    for field in dataclasses.fields(result):  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, field.name, None)
    for ask in questions(result):
        with contextlib.suppress(cm.InvalidInput):
            ask()
            asked += 1
    assert asked >= 2
    assert result.equals(kept)


def questions(result: Result) -> Iterator[Callable[[], Any]]:
    """What can be asked of a result without saying more, and without writing or drawing."""
    for name, method in inspect.getmembers(result, inspect.ismethod):
        if name.startswith("_") or name in ("figure", "load", "save"):
            continue
        parameters = inspect.signature(method).parameters.values()
        if all(parameter.default is not parameter.empty for parameter in parameters):
            yield method
