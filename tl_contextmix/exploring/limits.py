"""What a question may take, by its estimate: a long text must not hold the machine for hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from tl_contextmix.adapters.inputs.tokens import Given, make_batch
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import ContextMixError, bad
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

MAX_FLOPS = 1e13
MAX_GIB = 4.0

_GIB = 2**30
# Of an encoder-decoder, the report explains so many tokens of the output.
_OUTPUT = 30
_Work = Callable[..., Any]


class Limits:
    """The most that a question may take.

    Args:
        model: The model that is asked.
        flops: Operations in products of matrices.
        gib: Bytes of tensors alive at once, weights not counted, in 2^30.
    """

    def __init__(
        self, model: torch.nn.Module, flops: float = MAX_FLOPS, gib: float = MAX_GIB
    ) -> None:
        self.model, self.flops, self.gib = model, flops, gib
        self._weights = sum(weight.numel() for weight in model.parameters())
        self._known: dict[tuple[str, int], tuple[float, float]] = {}

    def require(
        self, view: ModelView, question: TypedQuestion, begin: Callable[[str], object]
    ) -> None:
        """Checks what a question would take, before it is answered.

        Args:
            view: The model's view.
            question: The question.
            begin: Called before anything is estimated.

        Raises:
            InvalidInput: If it is too much, or the text cannot be read.
        """
        length = make_batch(view, Given(question.text)).main.ids.shape[1]
        works = [*_works(view, question)]
        if all(self.surely(name, length) for name, _, _ in works):
            return
        begin("estimate")
        rounded = min(1 << (length - 1).bit_length(), view.n_ctx or 1 << 62)
        # What a longer text may take a shorter one may, so that few lengths are estimated.
        for tokens in dict.fromkeys((rounded, length)):
            costs = {name: self._cost(name, work, tokens, times) for name, work, times in works}
            flops = sum(cost[0] for cost in costs.values())
            gib = max(cost[1] for cost in costs.values()) / _GIB
            if flops <= self.flops and gib <= self.gib:
                return
        most = max(costs, key=lambda name: costs[name])
        enough = (
            f"--max-flops {_up(max(flops, self.flops)):.0e} --max-gib {_up(max(gib, self.gib)):g}"
        )
        raise bad(
            "this would take more than this page allows",
            f"{flops:.1e} FLOPs and {gib:.2g} GiB for {length} tokens, most of it for {most}",
            f"at most {self.flops:.1e} FLOPs and {self.gib:g} GiB",
            f"Shorten the text, show less, or start again with {enough}.",
        )

    def surely(self, name: str, length: int) -> bool:
        """Returns whether so few tokens are within the limits, whatever the estimate.

        No question takes as much as 16 passes for each token, or a quarter of the weights for each
        (a test holds them against their estimates), but those whose work does not begin with the
        text: values of all neurons as tokens, and what is generated.
        """
        if name in ("memories", "encoder-layers", "ff_memories", "decoder_lens"):
            return False
        flops, held = 16 * length * 2 * self._weights * length, self._weights * length / 4
        return flops <= self.flops / 8 and held <= self.gib * _GIB

    def _cost(self, name: str, work: _Work, length: int, times: int) -> tuple[float, float]:
        """Returns operations and bytes; nothing for what is refused, which the page says itself."""
        if (name, length) not in self._known:
            try:
                told = estimate(self.model, length, work)
                self._known[name, length] = (told.flops, told.peak_bytes)
            except ContextMixError:
                self._known[name, length] = (0, 0)
        flops, held = self._known[name, length]
        return times * flops, held


def _works(view: ModelView, question: TypedQuestion) -> Iterator[tuple[str, _Work, int]]:
    """Yields what a question makes the model do: a name, the function, and how often."""
    stack = "encoder" if len(view.stacks) == 2 else None
    yield "maps", partial(attention_norms, at=POINTS, stack=stack), 1
    for name in question.sections:
        for index, (work, times) in enumerate(_of_section(name, view, question)):
            yield f"{name} {index}" if index else name, work, times
    for name in question.methods:
        yield name, methods()[name].function, 1


def _of_section(name: str, view: ModelView, question: TypedQuestion) -> list[tuple[_Work, int]]:
    stack = "encoder" if len(view.stacks) == 2 else None
    by_layer, by_position = (partial(log_prob_contributions, by=by) for by in ("layer", "position"))
    said = question.generate or (SAID if stack is None else _OUTPUT)
    works: dict[str, list[_Work]] = {
        "answer": [by_layer, by_position],
        "mixing": [partial(value_zeroing, stack=stack), partial(mixing_ratio, stack=stack)],
        "memories": [ff_memories],
        # The neurons, or heads, and what is knocked out of them.
        "components": [by_layer, by_position, partial(log_prob_contributions, by="head")],
        "graph": [partial(flow, neurons=False, k=60)],
        "encoder-layers": [decoder_lens] if stack else [],
        "comparison": [] if stack else [value_zeroing, alti, decompx],
    }
    return [(work, said if name == "answer" else 1) for work in works.get(name, [])]


def _up(number: float) -> float:
    """Returns a number rounded up to one digit."""
    power = 10.0 ** (len(f"{number:.0f}") - 1) if number >= 1 else 1.0
    return -(-number // power) * power
