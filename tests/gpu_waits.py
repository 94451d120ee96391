"""Where the host waits for a GPU: each method as often for four layers as for two.

Every ``.item()``, ``.tolist()``, ``bool(tensor)``, ``nonzero()``, index by a mask and copy from one
place to the other waits until a GPU has done all that was asked of it. Once or so per call is
nothing; once per layer leaves it idle between layers. Counted on fake_gpu.py, which needs no GPU,
and on a GPU where there is one.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import unittest.mock
import warnings
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

    def see(
        self,
        name: str,
        there: list[bool],
        args: Any,
        to_gpu: bool | None,
        blocking: bool = True,
    ) -> None:
        """Counts an operator if the host waits in it.

        Args:
            name: Of the operator.
            there: Whether each tensor that it is given is on the GPU.
            args: What it is given.
            to_gpu: Whether it is told to make its result there; None if it is told no place.
            blocking: Whether it is told to wait for a copy.
        """
        waits = name in _OPERATORS and any(there)
        if blocking and name == "_to_copy":
            waits = to_gpu is not None and there[0] != to_gpu and args[0].numel() > 0
        elif blocking and name == "copy_":
            waits = there[0] != there[1]
        elif name in _BY_MASK and there[0]:
            waits = any(
                isinstance(x, Tensor) and (x.dtype == torch.bool or x.device.type == "cpu")
                for x in tree_leaves(args[1])
            )
        self.seen[name] += waits

    def during(self, function: Callable[[], object]) -> int:
        """Returns how often the host waits in a call."""
        before = self.seen.total()
        function()
        return self.seen.total() - before


class CudaWaits(Waits):
    """Counts the waits of which CUDA warns."""

    def during(self, function: Callable[[], object]) -> int:
        """Returns how often the host waits in a call."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always")
                function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(one.message) for one in given)


def require_few(waits: Waits, device: torch.device) -> None:
    """Raises AssertionError if a method waits more often where there are more layers.

    Args:
        waits: The counter.
        device: The GPU.
    """
    require_counts(waits, torch.tensor([1.0, -1.0, 2.0]).to(device))
    for family in ("gpt2", "llama", "bart"):
        grown = per_layer(waits, device, family)
        assert not grown, f"waits that each layer of {family} adds: {grown}"
    # Of the ten that scale.md names, and half of one on the way there.
    mining = per_pass(waits, device)
    assert mining <= 11, f"mining waits {mining} times a pass"


def require_counts(waits: Waits, x: Tensor) -> None:
    """Raises AssertionError unless what waits is counted, and nothing else is.

    Args:
        waits: The counter.
        x: Three numbers on the GPU, not all of which are positive.
    """
    positive = x > 0
    each: list[tuple[bool, Callable[[], object]]] = [
        (True, lambda: x.sum().item()),
        (True, lambda: float(x[0])),
        (True, lambda: x.tolist()),
        (True, lambda: bool(positive.any())),
        (True, lambda: positive.nonzero()),
        (True, lambda: x[positive]),
        (True, lambda: x.clone().masked_fill_(positive, 0).cpu()),
        (True, lambda: torch.equal(x, 2 * x)),
        (False, lambda: torch.where(positive, x, 0) @ x),
        (False, lambda: x.to(torch.float32).to(x.device)),
        (True, lambda: x[torch.tensor([0, 2])]),
        (True, lambda: torch.ones(3).to(x.device)),
        (True, lambda: torch.tensor([0, 2], device=x.device)),
        (False, lambda: torch.ones(3).to(x.device, non_blocking=True)),
        (False, lambda: torch.ones(3, device=x.device)),
    ]
    for place, (waits_for, call) in enumerate(each):
        found = waits.during(call)
        assert (found > 0) == waits_for, f"case {place}: {found} waits counted"


def per_pass(waits: Waits, device: torch.device) -> float:
    """Returns how many waits each pass adds to mining."""
    import zoo
    from test_devices import CASES

    import tl_contextmix as cm

    model = zoo.build(CASES["gpt2"]).to(device)
    cm.check(model)
    ids = torch.randint(5, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    texts = [model.tokenizer.decode(row) for row in ids.tolist()]
    found = []
    for some in (texts[:8], texts):
        with tempfile.TemporaryDirectory() as place:
            mine = functools.partial(
                cm.mine_triggers, model, some, out=f"{place}/mined", k=2, batch_size=1
            )
            found.append(waits.during(mine))
    return (found[1] - found[0]) / 8


@contextlib.contextmanager
def layers(family: str, count: int) -> Iterator[None]:
    """Inside of it, the zoo's models of a family have as many layers."""
    from zoo_configs import FAMILIES

    options = FAMILIES[family].options
    counts = {name: count for name in options if name == "n_layer" or name.endswith("_layers")}
    with unittest.mock.patch.dict(options, counts):
        yield


def per_layer(waits: Waits, device: torch.device, family: str) -> dict[str, float]:
    """Returns how many waits a layer adds to a call, by method of the contract that has any."""
    import zoo
    from test_conformance import FURTHER
    from test_devices import CASES, methods, numbers

    import tl_contextmix as cm
    from tl_contextmix.engine import promoted_tokens

    case = CASES[family]
    given = zoo.inputs(case)
    # Of contributions to a prediction one form stands for all, and tokens stand for texts.
    form = ("log_prob_contributions, ", "decompx, ")
    every = [*methods(case), *FURTHER]
    every = [m for m in every if not m.worded and not m.name.startswith(form)]
    # Values are read in many parts, as those of large models are.
    parts = unittest.mock.patch.object(promoted_tokens, "_HELD", 2**12)
    found: dict[str, list[int]] = {name: [] for name in (*(m.name for m in every), "mine_triggers")}
    for count in (2, 4):
        with layers(family, count):
            model = zoo.build(case).to(device)
        cm.check(model)  # what is done once per model is not counted
        cm.value_zeroing(model, given.tokens)
        for method in every:
            call = functools.partial(numbers, method, model, case, given)
            with parts:
                found[method.name].append(waits.during(call))
        corpus = [model.tokenizer.decode(row.tolist()) for row in given.tokens]
        with tempfile.TemporaryDirectory() as place:
            mine = functools.partial(cm.mine_triggers, model, corpus, out=f"{place}/mined", k=2)
            found["mine_triggers"].append(waits.during(mine))
    grown = {name: (many - few) / 2 for name, (few, many) in found.items()}
    return {name: growth for name, growth in grown.items() if growth}
