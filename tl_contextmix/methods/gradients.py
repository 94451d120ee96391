"""Gradient x input and integrated gradients: saliency of a prediction for each input token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy
import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.passes import Pass, ask_in_pass
from tl_contextmix.adapters.questions import Question, TokenAnswerInputs, predictions, split_answer
from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.contrast import Contrast, Of
from tl_contextmix.core.finite import why_not_finite
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import Positive
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput, warn
from tl_contextmix.results import ContextMap

Found = dict[str, tuple[str, Tensor]]
Score = Literal["l2", "l1", "sum"]
_PARTS = "batch turn source:block_out"
# The path is walked as alpha = u ** 4, u in [0, 1]. The integral is the same; but a LayerNorm of
# the embeddings changes only where alpha is of the order of 1e-3: 50 points in alpha miss that.
_CLOSE = 4
# Of the change: what the steps may miss without a word.
_MISSED = 0.1
# Numbers that a graph keeps of one token: times the logits, each block's d_model, head's d_head and
# sources, and neurons. The largest need, over all families: see tests/test_baselines.py.
_LOGITS, _STREAMS, _HEADS, _PATTERNS, _NEURONS = 2, 8, 6, 5, 8
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda x: x.norm(dim=-1),
    "l1": lambda x: x.abs().sum(dim=-1),
    "sum": lambda x: x.sum(dim=-1).abs(),
}


@method(cites=("denil2014extraction", "shrikumar2017learning"), compared=True, of_prediction=True)
def gradient_x_input(
    model: object,
    input: Input,
    *,
    of: Of = "logit",
    score: Score = "l2",
    **inputs: Unpack[TokenAnswerInputs],
) -> ContextMap:
    r"""Returns how strongly a prediction depends on each input token, to first order.

    .. math:: C_j = \Big|\Big| x_j \odot \frac{\partial f}{\partial x_j} \Big|\Big|_2

    with :math:`f` the logit of a token at a position (with a foil: less the foil's) and :math:`x_j`
    the residual stream that enters the first block (token, position and segment embeddings
    together; past the embedding norm where there is one). Denil et al. 2014, Shrikumar et al. 2017
    ("input x gradient").

    Args:
        model: Any TransformerLens model with a vocabulary readout, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        of: What of the target is asked about: ``"logit"``, ``"log_prob"`` or ``"prob"``; with a
            foil the target's less the foil's. A set counts as one token, with their probabilities'
            sum.
        score: What a token's vector becomes: its length (``"l2"``), the sum of its entries' sizes
            (``"l1"``), or the size of its sum (``"sum"``: of the dot product; its sign is lost,
            as a map holds no negative scores).
        **inputs: ``target``, ``foil`` and ``pos``, see `Asked`; mask, padding and the like, see
            `TokenInputs`.

    Returns:
        A `ContextMap` with one layer, in units of ``of``; its targets are the positions that
        predict, usually one. The sources of an
        encoder-decoder are the decoder's tokens followed by the encoder's.

    Raises:
        InvalidInput: If an argument does not fit the model, or gradients overflow its precision.
        UnsupportedModel: If the model has no vocabulary readout, or its numbers would be wrong.

    Cost: a forward pass, and a backward pass for each position.
    """
    # What inference mode makes can have no gradient.
    with torch.inference_mode(False), torch.enable_grad():
        given, answer = split_answer(input, inputs)
        question, whole = ask_in_pass(as_view(model), given, answer)
        turns = [*question.rounds()]

        def attribute(part: Pass) -> Found:
            asked = _ask(part, [turn for turn, _ in turns], of, grad=True)
            parts = [
                one.joined(_slopes(one.value, one.inputs, again=one is not asked[-1]))
                for one in asked
            ]
            return {**_best(asked), "parts": (_PARTS, torch.stack(parts, dim=1))}

        found = whole.together(attribute)
        return _map("gradient_x_input", question, whole, turns, found, {"of": of, "score": score})


@method(cites=("sundararajan2017axiomatic",), compared=True, of_prediction=True)
def integrated_gradients(
    model: object,
    input: Input,
    *,
    steps: Positive = 50,
    of: Of = "logit",
    score: Score = "l2",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[TokenAnswerInputs],
) -> ContextMap:
    r"""Returns integrated gradients of a prediction for each input token.

    .. math:: C_j = \Big|\Big| x_j \odot \int_0^1
              \frac{\partial f}{\partial x_j}(\alpha x) \, d\alpha \Big|\Big|_2

    (Sundararajan et al. 2017) from the zero baseline, all tokens at once, by Gauss-Legendre
    quadrature in :math:`u = \alpha^{1/4}`, which puts points close to the baseline. What is
    integrated and what :math:`f` is: see `gradient_x_input`.

    Attributions add up to :math:`f(x) - f(0)` as far as the quadrature is exact. A norm that reads
    the embeddings directly (pre-LN models) changes nothing along most of the path and everything
    close to zero, at a distance that its epsilon sets: where that is small (RMSNorms of 1e-6)
    hundreds of steps are needed. How much of the change the steps missed is in
    `ContextMap.bias`, and a warning says when it is more than a tenth.

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        input: A text, several, or token ids [batch, pos].
        steps: Points of the path.
        of: See `gradient_x_input`.
        score: See `gradient_x_input`.
        max_bytes: Bound on what points of the path take that are computed as one batch, those of
            all sentences together: where one sentence's fill it, a list costs what a loop does. One
            at least is; and one after the other where hooks of your own look on.
        **inputs: ``target``, ``foil`` and ``pos``, see `Asked`; mask, padding and the like, see
            `TokenInputs`.

    Returns:
        A `ContextMap` with one layer, in units of ``of``, see `gradient_x_input`. Its bias is
        ``|f(x) - f(0) - sum of attributions|``: the change that no token got.

    Raises:
        InvalidInput: If an argument does not fit the model, or gradients overflow its precision.
        UnsupportedModel: If the model has no vocabulary readout, or its numbers would be wrong.

    Warns:
        ContextMixWarning: If the steps miss more than a tenth of a sentence's change.

    Cost: for each position ``steps`` forward and backward passes and one more; and a forward pass.
    """
    with torch.inference_mode(False), torch.no_grad():
        given, answer = split_answer(input, inputs)
        question, whole = ask_in_pass(as_view(model), given, answer)
        turns = [*question.rounds()]

        def attribute(part: Pass) -> Found:
            asked = _ask(part, [turn for turn, _ in turns], of)
            each = [_integrate(one, steps, max_bytes) for one in asked]
            parts, missed, change = (torch.stack(some, dim=1) for some in zip(*each, strict=True))
            return {
                **_best(asked),
                "parts": (_PARTS, parts),
                "missed": ("batch turn", missed),
                "change": ("batch turn", change),
            }

        found = whole.together(attribute)
        _warn_if_missed(found["missed"], found["change"], found["parts"], steps)
        options = {"steps": steps, "baseline": "zero", "of": of, "score": score}
        return _map("integrated_gradients", question, whole, turns, found, options)


def _warn_if_missed(missed: Tensor, change: Tensor, parts: Tensor, steps: int) -> None:
    # Attributions that cancel may leave a change of the size of their rounding.
    rounding = 1e-5 * parts.abs().sum(dim=(-2, -1))
    if bool((missed.abs() > _MISSED * change.abs() + rounding).any()):
        warn(
            f"integrated gradients in {steps} steps miss more than a tenth of the change "
            "(ContextMap.bias holds how much in each sentence): pass more steps"
        )


def _integrate(asked: _Asked, steps: int, max_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns attributions [batch source d_model], what they miss, and of what change [batch]."""
    u, weights = (torch.tensor(x) for x in numpy.polynomial.legendre.leggauss(steps))
    u, weights = (u + 1) / 2, weights / 2
    shares = weights * _CLOSE * u ** (_CLOSE - 1)
    total = {name: torch.zeros_like(x, dtype=asked.dtype) for name, x in asked.inputs.items()}
    for chosen in torch.arange(steps).split(asked.points_at_once(max_bytes)):
        found = asked.slopes_along(u[chosen] ** _CLOSE, shares[chosen])
        total = {name: total[name] + found[name] for name in total}
    parts = asked.joined(total)
    start = asked.at({name: torch.zeros_like(x) for name, x in asked.inputs.items()})
    change = asked.value - start
    return parts, change - parts.sum(dim=(1, 2)), change


def _slopes(
    value: Tensor, inputs: Mapping[str, Tensor], *, again: bool = False
) -> dict[str, Tensor]:
    """Returns the gradients of predictions, each of its own sentence's.

    Args:
        value: The predictions.
        inputs: What they depend on.
        again: Whether their graph is needed once more.
    """
    found = torch.autograd.grad(value.sum(), [*inputs.values()], retain_graph=again)
    if not all(bool(gradient.isfinite().all()) for gradient in found):
        raise InvalidInput(why_not_finite("the gradients", found[0].dtype))
    return dict(zip(inputs, found, strict=True))


@dataclass(frozen=True)
class _Asked:
    """A prediction of each sentence and the residual streams that it is traced back to.

    Attributes:
        question: The predictions, one for each sentence.
        inputs: What enters the first block of each stack, by the name of the activation; the
            decoder's first.
        contrast: The tokens that are asked about.
        of: What of them is taken.
        value: The prediction [batch], in the graph of ``inputs`` if gradients were recorded.
    """

    question: Question
    inputs: Mapping[str, Tensor]
    contrast: Contrast
    of: Of
    value: Tensor

    @property
    def view(self) -> ModelView:
        """The model."""
        return self.question.view

    @property
    def batch(self) -> Batch:
        """The tokens."""
        return self.question.batch

    @property
    def rows(self) -> Tensor:
        """Position of the prediction in each sentence."""
        return self.question.rows

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the maths."""
        return self.view.dtype

    def at(self, inputs: Mapping[str, Tensor], *, grad: bool = False) -> Tensor:
        """Returns the predictions [row] at other inputs, as many times the sentences."""
        edits = {name: _instead(x) for name, x in inputs.items()}
        times = len(next(iter(inputs.values()))) // len(self.rows)
        batch = self.batch.each(lambda some: torch.cat([some] * times))
        logits = self.view.run(batch, [], edits=edits, grad=grad).logits
        assert logits is not None
        each = torch.arange(len(self.rows) * times)
        read = replace(self.question, sentences=each, rows=self.rows.repeat(times)).read(logits)
        return self.contrast.repeat(times).score(read, self.of)

    def slopes_along(self, points: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """Returns gradients at points of the way from zero, times shares and summed over points.

        The shares go in before the backward pass: close to zero gradients after a norm are larger
        than float16 can hold, and their share of the path is small.
        """
        with torch.enable_grad():
            leaves = {}
            for name, x in self.inputs.items():
                # Not a tensor of points: close to zero they are below what half precision can hold.
                scaled = [x * point for point in points.tolist()]
                leaves[name] = torch.cat(scaled).requires_grad_()
            value = self.at(leaves, grad=True)
            found = _slopes(value * shares.repeat_interleave(len(self.rows)).to(value), leaves)
        count = (len(points), len(self.rows))
        return {name: x.to(self.dtype).unflatten(0, count).sum(0) for name, x in found.items()}

    def points_at_once(self, max_bytes: int) -> int:
        """Returns how many points of a path fit, from what a graph keeps of one."""
        if self.view.hooked(backward=True):
            return 1  # hooks may count on the sentences that were given
        d_model = next(iter(self.inputs.values())).shape[-1]
        longest = max(x.shape[1] for x in self.inputs.values())
        n = self.batch.side(self.view.base_stack(None)).ids.shape[1]
        count = _LOGITS * n * self.view.d_vocab
        for stack, block in self.view.every_block():
            n = self.batch.side(stack).ids.shape[1]
            count += n * _STREAMS * d_model
            for attention in block.attentions:
                heads, width = attention.W_O.shape[:2]
                count += n * heads * (_PATTERNS * longest + _HEADS * width)
            if block.feed_forward is not None:
                count += n * _NEURONS * block.feed_forward.width
        return max(1, max_bytes // (count * len(self.rows) * self.dtype.itemsize))

    def joined(self, slopes: Mapping[str, Tensor]) -> Tensor:
        """Returns gradient times input [batch source d_model], 0 at padding."""
        sides = _entries(self.view)
        found = []
        for name, x in self.inputs.items():
            real = self.batch.side(sides[name]).mask.to(x.device)
            part = slopes[name].to(self.dtype) * x.detach().to(self.dtype)
            found.append(part.masked_fill(~real[:, :, None], 0))
        return torch.cat(found, dim=1)


def _map(
    method: str,
    question: Question,
    whole: Pass,
    turns: list[tuple[Question, Tensor]],
    found: Mapping[str, Tensor],
    options: dict[str, Any],
) -> ContextMap:
    """Returns the map of gradient times input, its targets what is predicted."""
    there = torch.stack([there for _, there in turns], dim=1)
    scores = _SCORES[options["score"]](found["parts"])
    missed = found.get("missed")
    predicted = question.target or [[token] for token in found["best"][there].tolist()]
    asked = predictions(question, whole.target, predicted)
    there = there.to(scores.device)
    return replace(whole, asked=asked).map(
        method,
        (scores * there[:, :, None])[:, None, None],
        "block_out",
        options["of"].replace("_", " "),
        options=options,
        layers=(0,),
        point="resid_in",
        target=asked.target,
        bias=None if missed is None else (missed.abs() * there)[:, None, None],
        from_input=True,
    )


def _instead(leaf: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: leaf


def _entries(view: ModelView) -> dict[str, str]:
    """Returns the stack by the name of what enters its first block, the decoder's first."""
    order = sorted(view.stacks, key=lambda stack: stack != "decoder")
    return {view.stacks[stack][0].resid_in: stack for stack in order}


def _ask(part: Pass, turns: list[Question], of: Of, *, grad: bool = False) -> list[_Asked]:
    """Returns the predictions of a part, one of each sentence at a time."""
    view = part.view
    # Copies, which a gradient's graph may keep: what is given may be made in inference mode.
    batch = part.batch.each(Tensor.clone)
    entries = _entries(view)
    leaves: dict[str, Tensor] = {}

    def enter(name: str) -> Callable[[Tensor], Tensor]:
        def edit(tensor: Tensor) -> Tensor:
            leaves[name] = tensor.detach().clone().requires_grad_(grad)
            return leaves[name]

        return edit

    logits = view.run(batch, [], edits={name: enter(name) for name in entries}, grad=grad).logits
    assert logits is not None
    inputs = {name: leaves[name] for name in entries}
    result = []
    for turn in turns:
        own = replace(part.own_question(turn), batch=batch)
        read = own.read(logits)
        contrast = own.contrast(read.detach())
        result.append(_Asked(own, inputs, contrast, of, contrast.score(read, of)))
    return result


def _best(asked: list[_Asked]) -> Found:
    """Returns the first token asked about in each sentence: the best, where none is given."""
    ids = [torch.stack([ids[0] for ids in one.contrast.target]) for one in asked]
    return {"best": ("batch turn", torch.stack(ids, dim=1))}
