"""A stand-in for a model, whose cost is extrapolated from a few short inputs.

The bytes alive at each instant of a forward pass, and its FLOPs, are quadratic polynomials of the
number of tokens, so a few short inputs determine them for every length. The stand-in returns
fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.counters import Memory, Operations
from tl_contextmix.core.model_view import Hooks, ModelView
from tl_contextmix.evaluation.cost.fake_tensors import DryRun

_SHORT = (4, 8, 12)
Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of a function for every input length.

    Attributes:
        lengths: Lengths of the measured inputs.
        operations: FLOPs for each.
        bytes: Bytes alive at each instant, for each.
        shapes: Shapes of the returned tensors, for each.
        like: The tensors returned for the longest input.
    """

    lengths: list[Lengths]
    operations: Tensor
    bytes: Tensor
    shapes: dict[str, Tensor]
    like: dict[str, Tensor]

    def at(self, lengths: Lengths) -> tuple[int, int]:
        """Returns FLOPs and peak bytes."""
        operations, alive = (self._fit(x, lengths) for x in (self.operations, self.bytes))
        return round(float(operations)), round(float(alive.max()))

    def shape(self, name: str, lengths: Lengths) -> tuple[int, ...]:
        """Returns the shape of a returned tensor."""
        return tuple(self._fit(self.shapes[name], lengths).round().long().tolist())

    def _fit(self, values: Tensor, lengths: Lengths) -> Tensor:
        """Evaluates the polynomial through the measured values [input ...]."""
        powers = torch.tensor([_powers(one) for one in self.lengths], dtype=torch.float64)
        weights = torch.linalg.solve(
            powers.T, torch.tensor(_powers(lengths), dtype=torch.float64)[:, None]
        )
        return (weights.T @ values.double().reshape(len(values), -1)).reshape(values.shape[1:])


def _powers(lengths: Lengths) -> list[float]:
    """Returns all monomials of the lengths up to degree two."""
    found = [1.0, *map(float, lengths)]
    for index, one in enumerate(lengths):
        found += [float(one * other) for other in lengths[index:]]
    return found


def short_lengths(sides: int, longest: int | None) -> list[Lengths]:
    """Returns the lengths of short inputs that determine a quadratic polynomial."""
    a, b, c = (min(one, (longest or 12) - 2 + index) for index, one in enumerate(_SHORT))
    if sides == 1:
        return [(a,), (b,), (c,)]
    return [(a, a), (b, a), (c, a), (a, b), (a, c), (b, b)]


def measure(work: Callable[[Lengths], dict[str, Tensor]], lengths: list[Lengths]) -> Cost:
    """Returns the cost of a function of the input length.

    Args:
        work: Runs on an input of given lengths; returns tensors by name.
        lengths: The lengths to measure.
    """
    operations, alive, found = [], [], []
    with _disable_current_modes():
        work(lengths[0])  # one-time work, such as a table of positions, does not count
        for one in lengths:
            with Operations() as counter, _Timeline() as memory:
                found.append(work(one))
            operations.append(counter.total)
            alive.append(memory.timeline)
    if len({*map(len, alive)}) > 1:  # steps depend on the length: only peaks are comparable
        alive = [[max(one)] for one in alive]
    return Cost(
        lengths=lengths,
        operations=torch.tensor(operations, dtype=torch.float64),
        bytes=torch.tensor(alive, dtype=torch.float64),
        shapes={name: torch.tensor([[*one[name].shape] for one in found]) for name in found[0]},
        like=found[lengths.index(max(lengths))],
    )


class _Timeline(Memory):
    """Records the bytes alive after every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.timeline: list[int] = [0]

    @no_type_check
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.timeline.append(self.live)
        return out


class StandIn:
    """Replaces a model and sums the cost of its forward passes.

    Attributes:
        view: A view that runs the stand-in instead of the model.
        passes: Number of forward passes.
        operations: Their FLOPs.
        kept: Bytes of the tensors that they return.
    """

    def __init__(self, view: ModelView, dry: DryRun, memory: Memory) -> None:
        self.passes = self.operations = self.kept = 0
        self._view, self._dry, self._memory = view, dry, memory
        self._costs: dict[Any, Cost] = {}
        self._patterns = {a.pattern for _, b in view.every_block() for a in b.attentions}
        stacks = {
            # Products of weights cached here must not reach later calls.
            name: tuple(
                replace(block, folds=None if block.folds is None else dict(block.folds))
                for block in blocks
            )
            for name, blocks in view.stacks.items()
        }
        self.view = replace(
            view,
            runner=self._run,
            hooked=lambda backward=False: (),
            stacks=stacks,
            tables=dict(view.tables),
            facts=dict(view.facts),
            notice=lambda method, options: None,
        )

    def _run(self, batch: Batch, hooks: Hooks, grad: bool) -> tuple[Tensor, dict[str, Tensor]]:
        sides = [side for side in (batch.main, batch.decoder) if side is not None]
        lengths = tuple(side.ids.shape[1] for side in sides)
        names, edited = [n for n, _ in hooks], frozenset(n for n, edit in hooks if edit is not None)
        key = (len(batch.main.ids), tuple(names), edited, grad)
        if key not in self._costs:
            self._costs[key] = self._measured(batch, names, edited, grad)
        cost = self._costs[key]
        operations, peak = cost.at(lengths)
        self.passes += 1
        self.operations += operations
        self._memory.peak = max(self._memory.peak, self._memory.live + peak)
        values = {name: self._left(cost, name, lengths) for name in ("", *names)}
        logits = values.pop("")
        for name, edit in hooks:
            values[name] = values[name] if edit is None else edit(values[name])
            if grad and edit is not None:
                logits = logits + values[name].sum() * 0
        return logits, values

    def _measured(
        self, batch: Batch, names: Sequence[str], edited: frozenset[str], grad: bool
    ) -> Cost:
        rows, sides = len(batch.main.ids), 1 if batch.decoder is None else 2
        device = batch.main.ids.device

        def keep(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_() if grad else tensor

        def work(lengths: Lengths) -> dict[str, Tensor]:
            given = Batch(*(_words(rows, length, self._view.d_vocab, device) for length in lengths))
            hooks = [(name, keep if name in edited else None) for name in names]
            logits, values = self._view.runner(given, hooks, grad)
            if grad:
                # Of one row, as in methods: the gradient of all logits is a tensor of their size.
                torch.autograd.grad(logits[:, -1].sum(), [values[name] for name in edited])
            return {"": logits.detach(), **{name: x.detach() for name, x in values.items()}}

        return measure(work, short_lengths(sides, self._view.n_ctx))

    def _left(self, cost: Cost, name: str, lengths: Lengths) -> Tensor:
        shape, like = cost.shape(name, lengths), cost.like[name]
        if name not in self._patterns:
            left = self._dry.without_numbers(shape, like)
            self.kept += left.numel() * left.element_size()
            return left
        # Zeros of the pattern decide which tiles are computed, so patterns stay real.
        self._memory.beside += (size := like.element_size() * torch.Size(shape).numel())
        self.kept += size
        with _disable_current_modes():
            return _reading(like, shape)


def _words(rows: int, length: int, d_vocab: int, device: torch.device) -> Side:
    ids = torch.arange(rows * length, device=device).view(rows, length) % (d_vocab - 1) + 1
    return Side(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))


def _reading(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a pattern that attends as far back and ahead as a short one, in little memory.

    Windows longer than the short input go undetected.
    """
    seen = (like != 0).flatten(0, 1).any(dim=0)
    targets, sources = shape[2:]
    near = torch.arange(seen.shape[1])[None] - torch.arange(seen.shape[0])[:, None]
    offsets = near[seen.cpu()]
    whole = torch.ones(targets, sources, dtype=like.dtype)
    if targets == sources and seen.shape[0] == seen.shape[1] and len(offsets):
        low, high = int(offsets.min()), int(offsets.max())
        if low > 1 - len(seen):
            whole.triu_(low)
        if high < len(seen) - 1:
            whole.tril_(high)
    return whole.to(like.device).expand(shape)
