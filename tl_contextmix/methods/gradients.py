"""Gradient x input and integrated gradients: saliency of a prediction for each input token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from torch import Tensor

from tl_contextmix.errors import UnsupportedModel, bad, require_choice
from tl_contextmix.hosts import as_view
from tl_contextmix.inputs import Given, PaddingSide, Text, label, make_batch, provenance
from tl_contextmix.inputs.targets import ids_of, rows_at
from tl_contextmix.model_view import Batch, ModelView
from tl_contextmix.results import ContextMap, Tokens

Of = Literal["logit", "log_prob"]
Score = Literal["l2", "l1", "sum"]
# The path is walked as alpha = u ** 4, u in [0, 1]. The integral is the same; but a LayerNorm of
# the embeddings changes only where alpha is of the order of 1e-3: 50 points in alpha miss that.
_CLOSE = 4
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda x: x.norm(dim=-1),
    "l1": lambda x: x.abs().sum(dim=-1),
    "sum": lambda x: x.sum(dim=-1).abs(),
}


def gradient_x_input(
    model: object,
    input: Text | Tensor,
    *,
    target: int | Sequence[int] | None = None,
    pos: int = -1,
    of: Of = "logit",
    score: Score = "l2",
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide = "right",
    decoder_input: Text | Tensor | None = None,
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
        attention_mask: 1 at real tokens, 0 at padding. Scores of padding are 0.
        prepend_bos: Whether texts get a beginning-of-sequence token; None: the model's default.
        padding_side: Where texts of unequal length are padded.
        decoder_input: Decoder side of an encoder-decoder; None: its start token.

    Returns:
        A `ContextMap` with one layer and one target, in units of ``of``. The sources of an
        encoder-decoder are the decoder's tokens followed by the encoder's.

    Raises:
        InvalidInput: If an argument does not fit the model, or gradients overflow its precision.
        UnsupportedModel: If the model has no vocabulary readout, or its numbers would be wrong.

    Cost: two forward passes and a backward pass.
    """
    given = Given(_own(input), attention_mask, prepend_bos, padding_side, decoder_input)
    # What inference mode makes can have no gradient.
    with torch.inference_mode(False):
        asked = _ask(as_view(model), given, target, pos, of, score)
        inputs = asked.inputs
        parts = asked.joined(asked.gradients(inputs), inputs)
        return asked.map("gradient_x_input", parts, None, {})


def integrated_gradients(
    model: object,
    input: Text | Tensor,
    *,
    steps: int = 50,
    target: int | Sequence[int] | None = None,
    pos: int = -1,
    of: Of = "logit",
    score: Score = "l2",
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide = "right",
    decoder_input: Text | Tensor | None = None,
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
    `ContextMap.bias`: look at it.

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        input: A text, several, or token ids [batch, pos].
        steps: Points of the path.
        target: See `gradient_x_input`.
        pos: See `gradient_x_input`.
        of: See `gradient_x_input`.
        score: See `gradient_x_input`.
        attention_mask: 1 at real tokens, 0 at padding.
        prepend_bos: Whether texts get a beginning-of-sequence token; None: the model's default.
        padding_side: Where texts of unequal length are padded.
        decoder_input: Decoder side of an encoder-decoder; None: its start token.

    Returns:
        A `ContextMap` with one layer and one target, in units of ``of``. Its bias is
        ``|f(x) - f(0) - sum of attributions|``: the change that no token got.

    Raises:
        InvalidInput: If an argument does not fit the model, or gradients overflow its precision.
        UnsupportedModel: If the model has no vocabulary readout, or its numbers would be wrong.

    Cost: ``steps`` forward and backward passes, and three forward passes more.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise bad(
            "a path cannot have so many points", repr(steps), "a positive integer", "Ask for 50."
        )
    given = Given(_own(input), attention_mask, prepend_bos, padding_side, decoder_input)
    with torch.inference_mode(False):
        asked = _ask(as_view(model), given, target, pos, of, score)
        parts, missed = _integrate(asked, steps)
        options = {"steps": steps, "baseline": "zero"}
        return asked.map("integrated_gradients", parts, missed, options)


def _own(input: Text | Tensor) -> Text | Tensor:
    """Returns ids that a gradient's graph may keep: those made in inference mode are copied."""
    if not isinstance(input, Tensor) or not input.is_inference():
        return input
    with torch.inference_mode(False):
        return input.clone()


def _integrate(asked: _Asked, steps: int) -> tuple[Tensor, Tensor]:
    """Returns attributions [batch source d_model] and what they miss of the change [batch]."""
    nodes, weights = numpy.polynomial.legendre.leggauss(steps)
    inputs = asked.inputs
    total = {name: torch.zeros_like(x, dtype=asked.view.dtype) for name, x in inputs.items()}
    for node, weight in zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True):
        share = weight * _CLOSE * node ** (_CLOSE - 1)
        found = asked.gradients({name: x * node**_CLOSE for name, x in inputs.items()}, share)
        total = {name: total[name] + found[name] for name in total}
    parts = asked.joined(total, inputs)
    start = asked.prediction({name: torch.zeros_like(x) for name, x in inputs.items()})
    end = asked.prediction(inputs)
    return parts, end - start - parts.sum(dim=(1, 2))


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
        score: What a token's vector becomes.
    """

    view: ModelView
    batch: Batch
    inputs: Mapping[str, Tensor]
    rows: Tensor
    target: Tensor
    of: Of
    score: Score

    def prediction(self, inputs: Mapping[str, Tensor], grad: bool = False) -> Tensor:
        """Returns the prediction at other inputs [batch]."""
        edits = {name: _instead(x) for name, x in inputs.items()}
        logits = self.view.run(self.batch, [], edits=edits, grad=grad).logits
        assert logits is not None
        each = torch.arange(logits.shape[0], device=logits.device)
        row = logits[each, self.rows.to(logits.device)].to(self.view.dtype)
        row = row.log_softmax(dim=-1) if self.of == "log_prob" else row
        return row[each, self.target.to(logits.device)]

    def gradients(self, inputs: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        """Returns a factor times the gradients of the prediction at other inputs.

        The factor goes in before the backward pass: close to zero gradients behind a norm are
        larger than float16 can hold, and their share of the path is small.
        """
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
            value = self.prediction(leaves, grad=True)
            found = torch.autograd.grad(value.sum() * factor, [*leaves.values()])
        if not all(bool(gradient.isfinite().all()) for gradient in found):
            raise bad(
                "the model's gradients cannot be held in its precision",
                f"gradients in {found[0].dtype} that are not finite",
                "finite numbers",
                "Load the model in bfloat16 or in float32.",
            )
        return {n: g.to(self.view.dtype) for n, g in zip(leaves, found, strict=True)}

    def joined(self, gradients: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns gradient times input [batch source d_model], 0 at padding."""
        sides = _entries(self.view)
        found = []
        for name, x in inputs.items():
            real = self.batch.side(sides[name]).mask.to(x.device)
            part = gradients[name] * x.to(self.view.dtype)
            found.append(part.masked_fill(~real[:, :, None], 0))
        return torch.cat(found, dim=1)

    def map(
        self, method: str, parts: Tensor, missed: Tensor | None, options: dict[str, object]
    ) -> ContextMap:
        """Returns the map of gradient times input."""
        sides = [*_entries(self.view).values()]
        tokens = [label(self.view, side, self.batch.side(side)) for side in sides]
        source = tokens[0] if len(tokens) == 1 else tokens[0].cat(tokens[1])
        options = {
            **options,
            "of": self.of,
            "score": self.score,
            "pos": self.rows.tolist(),
            "target": self.target.tolist(),
        }
        return ContextMap(
            scores=_SCORES[self.score](parts)[:, None, None, None],
            layers=(0,),
            heads=("all",),
            point="resid_in",
            stack=sides[0],
            target=_one_each(tokens[0], self.rows.tolist()),
            source=source,
            unit=self.of.replace("_", " "),
            includes_residual=True,
            bias=None if missed is None else missed.abs()[:, None, None, None],
            from_input=True,
            provenance=provenance(self.view, method, options),
        )


def _instead(leaf: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: leaf


def _entries(view: ModelView) -> dict[str, str]:
    """Returns the stack by the name of what enters its first block, the decoder's first."""
    order = sorted(view.stacks, key=lambda stack: stack != "decoder")
    return {view.stacks[stack][0].resid_in: stack for stack in order}


def _ask(
    view: ModelView,
    given: Given,
    target: int | Sequence[int] | None,
    pos: int,
    of: Of,
    score: Score,
) -> _Asked:
    require_choice("of", of, ("logit", "log_prob"))
    require_choice("score", score, (*_SCORES,))
    if view.readout.refusal:
        raise UnsupportedModel(view.readout.refusal)
    batch = make_batch(view, given)
    entries = _entries(view)
    trace = view.run(batch, [*entries])
    assert trace.logits is not None
    stack = next(iter(entries.values()))
    rows = rows_at(pos, batch.side(stack).mask)
    each = torch.arange(len(rows))
    best = trace.logits.cpu()[each, rows].argmax(dim=-1)
    inputs = {name: trace.values[name].detach() for name in entries}
    return _Asked(view, batch, inputs, rows, ids_of(target, best, view.d_vocab), of, score)


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
