"""Where the host waits for a GPU: each method as often for four layers as for two.

Every ``.item()``, ``.tolist()``, ``bool(tensor)``, ``nonzero()``, index by a mask and copy to the
CPU waits until a GPU has done all that was asked of it. Once or so per call is nothing; once per
layer leaves it idle between layers. Counted on fake_gpu.py, which needs no GPU.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Operators whose results, or the sizes of these, the host needs.
_OPERATORS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount", "tolist"),
}
_BY_MASK = {"index", "index_put", "index_put_"}


class Waits:
    """Counts waits by operator while it is switched on."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def see(self, name: str, there: list[bool], args: Any, to_gpu: bool | None) -> None:
        """Counts an operator if the host waits in it.

        Args:
            name: Of the operator.
            there: Whether each tensor that it is given is on the GPU.
            args: What it is given.
            to_gpu: Whether it is told to make its result there; None if it is told no place.
        """
        waits = name in _OPERATORS and any(there)
        if name == "_to_copy":
            waits = there[0] and to_gpu is False
        elif name == "copy_":
            waits = there == [False, True]
        elif name in _BY_MASK and there[0]:
            waits = any(
                isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
            )
        self.seen[name] += waits

    def during(self, function: Callable[[], object]) -> int:
        """Returns how often the host waits in a call."""
        before = self.seen.total()
        function()
        return self.seen.total() - before


def require_few(waits: Waits, device: torch.device) -> None:
    """Raises AssertionError if a method waits more often where there are more layers.

    Args:
        waits: The counter.
        device: The GPU.
    """
    require_counts(waits, torch.tensor([1.0, -1.0, 2.0]).to(device))
    grown = per_layer(waits, device)
    assert not grown, f"waits that each layer adds: {grown}"


def require_counts(waits: Waits, x: Tensor) -> None:
    """Raises AssertionError unless what waits is counted, once, and nothing else is.

    Args:
        waits: The counter.
        x: Three numbers on the GPU, not all of which are positive.
    """
    positive = x > 0
    each: list[tuple[int, Callable[[], object]]] = [
        (1, lambda: x.sum().item()),
        (1, lambda: float(x[0])),
        (1, lambda: x.tolist()),
        (1, lambda: bool(positive.any())),
        (1, lambda: positive.nonzero()),
        (1, lambda: x[positive]),
        (1, lambda: x.clone().masked_fill_(positive, 0).cpu()),
        (1, lambda: torch.equal(x, x)),
        (0, lambda: torch.where(positive, x, 0) @ x),
        (0, lambda: x.to(torch.float32).to(x.device)),
        (0, lambda: x[torch.tensor([0, 2])]),
        (0, lambda: torch.ones(3).to(x.device)),
    ]
    for place, (expected, call) in enumerate(each):
        found = waits.during(call)
        assert found == expected, f"case {place}: {found} waits counted, {expected} expected"


@contextlib.contextmanager
def layers(count: int) -> Iterator[None]:
    """Inside of it, the zoo's GPT-2 has as many layers."""
    from zoo_configs import FAMILIES

    with unittest.mock.patch.dict(FAMILIES["gpt2"].options, n_layer=count):
        yield


def per_layer(waits: Waits, device: torch.device) -> dict[str, float]:
    """Returns how many waits a layer adds to a call, by method of the contract that has any."""
    import zoo
    from test_conformance import FURTHER
    from test_devices import CASES, methods, numbers

    import tl_contextmix as cm

    case = CASES["gpt2"]
    given = zoo.inputs(case)
    # Of contributions to a prediction one form stands for all, and tokens stand for texts.
    form = ("log_prob_contributions, ", "decompx, ")
    every = [*methods(case), *FURTHER]
    every = [m for m in every if not m.worded and not m.name.startswith(form)]
    found: dict[str, list[int]] = {name: [] for name in (*(m.name for m in every), "mine_triggers")}
    for count in (2, 4):
        with layers(count):
            model = zoo.build(case).to(device)
        cm.check(model)  # what is done once per model is not counted
        cm.value_zeroing(model, given.tokens)
        for method in every:
            call = functools.partial(numbers, method, model, case, given)
            found[method.name].append(waits.during(call))
        corpus = [model.tokenizer.decode(row.tolist()) for row in given.tokens]
        with tempfile.TemporaryDirectory() as place:
            mine = functools.partial(cm.mine_triggers, model, corpus, out=f"{place}/mined", k=2)
            found["mine_triggers"].append(waits.during(mine))
    grown = {name: (many - few) / 2 for name, (few, many) in found.items()}
    return {name: growth for name, growth in grown.items() if growth}
