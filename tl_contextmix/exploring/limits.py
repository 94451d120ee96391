"""What a question may take, by its estimate: a long text must not hold the machine for hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from tl_contextmix.adapters.inputs.tokens import Given, make_batch
from tl_contextmix.core.model_view import ModelView, StackName
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import ContextMixError, InvalidInput
from tl_contextmix.evaluation.cost.estimate import estimate
from tl_contextmix.exploring.typed_questions import SAID, TypedQuestion
from tl_contextmix.methods.alti import alti
from tl_contextmix.methods.decoder_lens.lens import decoder_lens
from tl_contextmix.methods.decompx import decompx
from tl_contextmix.methods.flow import flow
from tl_contextmix.methods.log_prob.contributions import log_prob_contributions
from tl_contextmix.methods.memories.ff_memories import ff_memories
from tl_contextmix.methods.norms import attention_norms, mixing_ratio
from tl_contextmix.methods.value_zeroing import value_zeroing
from tl_contextmix.reporting.story import OUTPUT

MAX_GIB = 4.0
# Some minutes of the processor, and less than that of a GPU.
_FLOPS, _FLOPS_ELSEWHERE = 1e13, 1e15

ALWAYS_ESTIMATED = (
    *("memories", "ff_memories"),  # they read values as tokens, however short the text
    *("integrated_gradients", "attention_knockout"),  # many runs at once
)
"""What `Limits.surely` does not know."""

_GIB = 2**30
_Cost = tuple[float, float]


class _Work(NamedTuple):
    """One part of a question: the method behind it, and how often it is called."""

    name: str
    function: Callable[..., Any]
    times: int = 1


class Limits:
    """The most that a question may take.

    Args:
        model: The model that is asked.
        flops: Operations in products of matrices; None: what takes a few minutes where it is.
        gib: Bytes of tensors alive at once, weights not counted, in 2^30.
    """

    def __init__(
        self, model: torch.nn.Module, flops: float | None = None, gib: float = MAX_GIB
    ) -> None:
        weights = [*model.parameters()]
        on_processor = all(weight.device.type == "cpu" for weight in weights)
        usual = _FLOPS if on_processor else _FLOPS_ELSEWHERE
        self.model, self.gib = model, gib
        self.flops = usual if flops is None else flops
        self._weights = sum(weight.numel() for weight in weights)
        self._known: dict[tuple[str, int], tuple[float, float]] = {}

    def require(
        self, view: ModelView, question: TypedQuestion, begin: Callable[[str], object]
    ) -> None:
        """Checks what a question would take; ``begin`` is called before anything is estimated."""
        length = make_batch(view, Given(question.text)).main.ids.shape[1]
        if "answer" in question.sections:  # it is read, too
            length += _answer_length(view, question)
        works = [*_works(view, question)]
        if all(self.surely(work.name, length) for work in works):
            return
        begin("estimate")
        rounded = min(1 << (length - 1).bit_length(), view.n_ctx or 1 << 62)
        # What a longer text may take a shorter one may, so that few lengths are estimated.
        if self._fit(self._costs(works, rounded)):
            return
        costs = self._costs(works, length)
        if not self._fit(costs):
            raise self._too_much(costs, length)

    def _costs(self, works: Sequence[_Work], length: int) -> dict[str, _Cost]:
        """Returns what each part takes: operations and bytes; nothing for what is refused.

        The page itself says what is refused.
        """
        result = {}
        for work in works:
            if (work.name, length) not in self._known:
                try:
                    estimated = estimate(self.model, length, work.function)
                    cost = (estimated.flops, estimated.peak_bytes)
                except ContextMixError:
                    cost = (0, 0)
                self._known[work.name, length] = cost
            flops, held = self._known[work.name, length]
            result[work.name] = (work.times * flops, held)
        return result

    def _fit(self, costs: dict[str, _Cost]) -> bool:
        flops, gib = _totals(costs)
        return flops <= self.flops and gib <= self.gib

    def _too_much(self, costs: dict[str, _Cost], length: int) -> ContextMixError:
        flops, gib = _totals(costs)
        most = max(costs, key=lambda name: costs[name])
        enough = (
            f"--max-flops {_up(max(flops, self.flops)):.0e} --max-gib {_up(max(gib, self.gib)):g}"
        )
        return InvalidInput(
            "this would take more than this page allows",
            f"{flops:.1e} FLOPs and {gib:.2g} GiB for {length} tokens, most of it for {most}",
            f"at most {self.flops:.1e} FLOPs and {self.gib:g} GiB",
            f"Shorten the text, show less, or start again with {enough}.",
        )

    def surely(self, name: str, length: int) -> bool:
        """Returns whether so few tokens are within the limits, whatever the estimate.

        No part takes as much as 16 passes for each token, or a byte for each weight and token; a
        test holds them against their estimates. What an encoder-decoder says is about as long as
        the text.
        """
        if name in ALWAYS_ESTIMATED:
            return False
        flops, held = 16 * length * 2 * self._weights * length, length * self._weights
        return flops <= self.flops / 8 and held <= self.gib * _GIB


def _totals(costs: dict[str, _Cost]) -> tuple[float, float]:
    """Returns all operations, and the most memory at once in GiB."""
    flops, held = zip(*costs.values(), strict=True)
    return sum(flops), max(held) / _GIB


def _works(view: ModelView, question: TypedQuestion) -> Iterator[_Work]:
    """Yields what a question makes the model do."""
    stack = "encoder" if len(view.stacks) == 2 else None
    yield _Work("maps", partial(attention_norms, at=POINTS, stack=stack))
    for name in question.sections:
        for index, function in enumerate(_of_section(name, stack)):
            times = _answer_length(view, question) if name == "answer" else 1
            yield _Work(f"{name} {index + 1}" if index else name, function, times)
    for name in question.methods:
        yield _Work(name, methods()[name].function)


def _answer_length(view: ModelView, question: TypedQuestion) -> int:
    """Returns how many tokens of an answer are explained, at most."""
    return question.generate or (OUTPUT if len(view.stacks) == 2 else SAID)


def _of_section(name: str, stack: StackName | None) -> list[Callable[..., Any]]:
    """Returns the methods behind a section of the report that cost more than its maps."""
    by_layer, by_position, by_head = (
        partial(log_prob_contributions, by=by) for by in ("layer", "position", "head")
    )
    works: dict[str, list[Callable[..., Any]]] = {
        "answer": [by_layer, by_position],
        "mixing": [partial(value_zeroing, stack=stack), partial(mixing_ratio, stack=stack)],
        "memories": [ff_memories],
        "components": [by_layer, by_position, by_head],
        "graph": [partial(flow, neurons=False, k=60)],
        "encoder-layers": [decoder_lens],
        "comparison": [value_zeroing, alti, decompx],
    }
    return works.get(name, [])


def _up(number: float) -> float:
    """Returns a number rounded up to one digit."""
    power = 10.0 ** (len(f"{number:.0f}") - 1) if number >= 1 else 1.0
    return -(-number // power) * power
