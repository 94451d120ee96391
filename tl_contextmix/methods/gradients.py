"""Gradient x input and integrated gradients: saliency of a prediction for each input token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import (
    Given,
    Input,
    Pass,
    TokenInputs,
    run_pass,
)
from tl_contextmix.adapters.inputs.targets import ids_of, rows_at
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.finite import require_predictions, why_not_finite
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import Positive
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import (
    InvalidInput,
    warn,
)
from tl_contextmix.results import ContextMap, Tokens

Of = Literal["logit", "log_prob"]
Found = dict[str, tuple[str, Tensor]]
Score = Literal["l2", "l1", "sum"]
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
    target: int | Sequence[int] | None = None,
    pos: int = -1,
    of: Of = "logit",
    score: Score = "l2",
    **inputs: Unpack[TokenInputs],
) -> ContextMap:
    r"""Returns how strongly a prediction depends on each input token, to first order.

    .. math:: C_j = \Big|\Big| x_j \odot \frac{\partial f}{\partial x_j} \Big|\Big|_2

    with :math:`f` the logit of a token at one position and :math:`x_j` the residual stream that
    enters the first block (token, position and segment embeddings together; past the embedding
    norm where there is one). Denil et al. 2014, Shrikumar et al. 2017 ("input x gradient").

    Args:
        model: Any TransformerLens model with a vocabulary readout, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        target: Id of the token that is predicted, one for all sentences or one for each; None:
            the token with the largest logit.
        pos: Where it is predicted: the position whose logits are taken, of the decoder in an
            encoder-decoder. Negative ones count from the last real token of each sentence.
        of: ``"logit"``, or ``"log_prob"`` for the logarithm of its probability.
        score: What a token's vector becomes: its length (``"l2"``), the sum of its entries' sizes
            (``"l1"``), or the size of its sum (``"sum"``: of the dot product; its sign is lost,
            as a map holds no negative scores).
        **inputs: Mask, padding and the like, see `TokenInputs`.

    Returns:
        A `ContextMap` with one layer and one target, in units of ``of``. The sources of an
        encoder-decoder are the decoder's tokens followed by the encoder's.

    Raises:
        InvalidInput: If an argument does not fit the model, or gradients overflow its precision.
        UnsupportedModel: If the model has no vocabulary readout, or its numbers would be wrong.

    Cost: a forward and a backward pass.
    """
    # What inference mode makes can have no gradient.
    with torch.inference_mode(False), torch.enable_grad():
        question = _question(as_view(model), Given(input, **inputs), target, pos, of, score)

        def attribute(part: Pass) -> Found:
            asked = question.ask(part, grad=True)
            parts = asked.joined(_slopes(asked.value, asked.inputs))
            return {**asked.about(), "parts": ("batch source:block_out", parts)}

        return question.map("gradient_x_input", question.whole.together(attribute), {})


@method(cites=("sundararajan2017axiomatic",), compared=True, of_prediction=True)
def integrated_gradients(
    model: object,
    input: Input,
    *,
    steps: Positive = 50,
    target: int | Sequence[int] | None = None,
    pos: int = -1,
    of: Of = "logit",
    score: Score = "l2",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[TokenInputs],
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
        target: See `gradient_x_input`.
        pos: See `gradient_x_input`.
        of: See `gradient_x_input`.
        score: See `gradient_x_input`.
        max_bytes: Bound on what points of the path take that are computed as one batch. One at
            least is; and one after the other where hooks of your own look on.
        **inputs: Mask, padding and the like, see `TokenInputs`.

    Returns:
        A `ContextMap` with one layer and one target, in units of ``of``. Its bias is
        ``|f(x) - f(0) - sum of attributions|``: the change that no token got.

    Raises:
        InvalidInput: If an argument does not fit the model, or gradients overflow its precision.
        UnsupportedModel: If the model has no vocabulary readout, or its numbers would be wrong.

    Warns:
        ContextMixWarning: If the steps miss more than a tenth of a sentence's change.

    Cost: ``steps`` forward and backward passes, and two forward passes more.
    """
    with torch.inference_mode(False), torch.no_grad():
        question = _question(as_view(model), Given(input, **inputs), target, pos, of, score)

        def attribute(part: Pass) -> Found:
            asked = question.ask(part)
            parts, missed, change = _integrate(asked, steps, max_bytes)
            return {
                **asked.about(),
                "parts": ("batch source:block_out", parts),
                "missed": ("batch", missed),
                "change": ("batch", change),
            }

        found = question.whole.together(attribute)
        _warn_if_missed(found["missed"], found["change"], found["parts"], steps)
        options = {"steps": steps, "baseline": "zero"}
        return question.map("integrated_gradients", found, options)


def _own(side: Side) -> Side:
    """Returns tokens that a gradient's graph may keep: not those made in inference mode."""
    with torch.inference_mode(False):
        return Side(side.ids.clone(), side.mask.clone())


def _warn_if_missed(missed: Tensor, change: Tensor, parts: Tensor, steps: int) -> None:
    # Attributions that cancel may leave a change of the size of their rounding.
    rounding = 1e-5 * parts.abs().sum(dim=(1, 2))
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


def _slopes(value: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of predictions, each of its own sentence's."""
    found = torch.autograd.grad(value.sum(), [*inputs.values()])
    if not all(bool(gradient.isfinite().all()) for gradient in found):
        raise InvalidInput(why_not_finite("the gradients", found[0].dtype))
    return dict(zip(inputs, found, strict=True))


@dataclass(frozen=True)
class _Question:
    """Which prediction is asked about.

    Attributes:
        whole: The pass over all sentences.
        rows: Position of the prediction in each of them.
        target: Id of the predicted token in each; None: the one with the largest logit.
        of: What of it is taken.
        score: What a token's vector becomes.
    """

    whole: Pass
    rows: Tensor
    target: Tensor | None
    of: Of
    score: Score

    def ask(self, part: Pass, *, grad: bool = False) -> _Asked:
        """Returns the predictions of a part, and what enters its first blocks."""
        view, said = part.view, part.batch.decoder
        batch = Batch(_own(part.batch.main), None if said is None else _own(said))
        entries = _entries(view)
        leaves: dict[str, Tensor] = {}

        def enter(name: str) -> Callable[[Tensor], Tensor]:
            def edit(tensor: Tensor) -> Tensor:
                leaves[name] = tensor.detach().clone().requires_grad_(grad)
                return leaves[name]

            return edit

        edits = {name: enter(name) for name in entries}
        logits = view.run(batch, [], edits=edits, grad=grad).logits
        assert logits is not None
        rows = part.own_positions(self.rows)
        if self.target is None:
            target = logits.detach().cpu()[torch.arange(len(rows)), rows].argmax(dim=-1)
        else:
            target = part.own_rows(self.target)
        value = _predicted(logits, rows, target, self.of, view.dtype)
        inputs = {name: leaves[name] for name in entries}
        return _Asked(view, batch, inputs, rows, target, self.of, value)

    def map(
        self, method: str, found: Mapping[str, Tensor], options: dict[str, object]
    ) -> ContextMap:
        """Returns the map of gradient times input."""
        missed = found.get("missed")
        options = {
            **options,
            "of": self.of,
            "score": self.score,
            "pos": self.rows.tolist(),
            "target": found["target"].tolist(),
        }
        return ContextMap(
            scores=_SCORES[self.score](found["parts"])[:, None, None, None],
            layers=(0,),
            heads=("all",),
            point="resid_in",
            stack=self.whole.stack,
            target=_one_each(self.whole.target, self.rows.tolist()),
            source=self.whole.source("block_out"),
            unit=self.of.replace("_", " "),
            includes_residual=True,
            bias=None if missed is None else missed.abs()[:, None, None, None],
            from_input=True,
            provenance=self.whole.provenance(method, options),
        )


@dataclass(frozen=True)
class _Asked:
    """A prediction and the residual streams that it is traced back to.

    Attributes:
        view: The model.
        batch: The tokens.
        inputs: What enters the first block of each stack, by the name of the activation; the
            decoder's first.
        rows: Position of the prediction in each sentence.
        target: Id of the predicted token in each sentence.
        of: What of it is taken.
        value: The prediction [batch], in the graph of ``inputs`` if gradients were recorded.
    """

    view: ModelView
    batch: Batch
    inputs: Mapping[str, Tensor]
    rows: Tensor
    target: Tensor
    of: Of
    value: Tensor

    def about(self) -> Found:
        """Returns what has to be known of the predictions to label them."""
        return {"target": ("batch", self.target)}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the maths."""
        return self.view.dtype

    def at(self, inputs: Mapping[str, Tensor], *, grad: bool = False) -> Tensor:
        """Returns the predictions [row] at other inputs, as many times the sentences."""
        edits = {name: _instead(x) for name, x in inputs.items()}
        times = len(next(iter(inputs.values()))) // len(self.rows)
        logits = self.view.run(_repeated(self.batch, times), [], edits=edits, grad=grad).logits
        rows, target = self.rows.repeat(times), self.target.repeat(times)
        return _predicted(logits, rows, target, self.of, self.dtype)

    def slopes_along(self, points: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """Returns gradients at points of the way from zero, times shares and summed over points.

        The shares go in before the backward pass: close to zero gradients behind a norm are larger
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
                count += n * _NEURONS * len(block.feed_forward.W_out)
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


def _instead(leaf: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: leaf


def _entries(view: ModelView) -> dict[str, str]:
    """Returns the stack by the name of what enters its first block, the decoder's first."""
    order = sorted(view.stacks, key=lambda stack: stack != "decoder")
    return {view.stacks[stack][0].resid_in: stack for stack in order}


def _question(
    view: ModelView,
    given: Given,
    target: int | Sequence[int] | None,
    pos: int,
    of: Of,
    score: Score,
) -> _Question:
    view.readout.require()
    whole = run_pass(view, given)
    rows = rows_at(pos, whole.target.mask)
    ids = None if target is None else ids_of(target, torch.zeros(len(rows)), view.d_vocab)
    return _Question(whole, rows, ids, of, score)


def _predicted(
    logits: Tensor | None, rows: Tensor, target: Tensor, of: Of, dtype: torch.dtype
) -> Tensor:
    """Returns what is asked of each sentence's logits [batch]."""
    assert logits is not None
    each = torch.arange(len(rows), device=logits.device)
    row = logits[each, rows.to(logits.device)]
    require_predictions(row)
    row = row.to(dtype)
    row = row.log_softmax(dim=-1) if of == "log_prob" else row
    return row[each, target.to(logits.device)]


def _repeated(batch: Batch, times: int) -> Batch:
    """Returns sentences one after the other, as often as asked."""
    sides = (batch.main, batch.decoder)
    main, decoder = (
        side and Side(side.ids.repeat(times, 1), side.mask.repeat(times, 1)) for side in sides
    )
    assert main is not None
    return Batch(main, decoder)


def _one_each(tokens: Tokens, rows: list[int]) -> Tokens:
    """Returns one token per sentence, not the same position in each."""
    at = torch.tensor(rows)[:, None]
    return Tokens(
        ids=tokens.ids.gather(1, at),
        strings=tuple((words[row],) for words, row in zip(tokens.strings, rows, strict=True)),
        mask=tokens.mask.gather(1, at),
        sides=((tokens.sides[0][0], 1),),
        places=at,
    )
