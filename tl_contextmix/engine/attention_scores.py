r"""Why a head looks where it does: its score before the softmax, as a sum over what it read.

The score of a target and a source is bilinear in the two streams that query and key are made of,
with norms and positions frozen (`core.score_forms`). What the form is, positions and all, is
measured at the model itself: queries and keys of one pass are replaced by known ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Batch, Trace, require_weight, shift
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.score_forms import HeadNorm, fit_form
from tl_contextmix.errors import UnsupportedModel


@dataclass(frozen=True)
class Edge:
    """Where a head looks.

    Attributes:
        layer: Its layer.
        head: Its number.
        target: The position that looks.
        source: The position that it looks at.
    """

    layer: int
    head: int
    target: int
    source: int


@dataclass(frozen=True)
class Side:
    """Queries, or keys, of one head at one position.

    Attributes:
        weight: What they are made of the normed stream with.
        bias: What is added, or None.
        norm: Norm of them, or None.
        head: Which of them.
        divisor: What divides them before that norm [d_head], at the stream that is read, or None.
        turn: What they are multiplied with before they are shown, or None.
    """

    weight: Float[Tensor, "head d_model d_head"]
    bias: Float[Tensor, "head d_head"] | None
    norm: HeadNorm | None
    head: int
    divisor: Float[Tensor, " d_head"] | None = None
    turn: Float[Tensor, "d_head d_head"] | None = None

    @classmethod
    def of(cls, attention: AttentionSublayer, name: str, head: int, shown: int, x: Tensor) -> Side:
        """Returns those of a head.

        Args:
            attention: The sublayer.
            name: ``"Q"`` or ``"K"``.
            head: The query head.
            shown: How many heads there are of them, several query heads sharing one.
            x: The normed stream that they are made of.
        """
        attention.require_own_values()  # nor keys of its own
        weight = require_weight(attention.weights, f"W_{name}")
        bias = attention.weights(f"b_{name}")
        every = slice(None, None, max(1, len(weight) // shown))
        weight, bias = weight[every], None if bias is None else bias[every]
        norm = attention.query_norm if name == "Q" else attention.key_norm
        by = attention.divisors
        divisor = None if by is None else by[name == "K"](x)
        return cls(weight, bias, norm, head * shown // len(attention.W_O), divisor)

    def raw(self, x: Float[Tensor, " d_model"]) -> Float[Tensor, "head d_head"]:
        """Returns what all heads have of a normed stream, before a norm of them."""
        found = shift(torch.einsum("m,hmd->hd", x, self.weight), self.bias)
        return found if self.divisor is None else found / self.divisor

    def finished(self, raw: Float[Tensor, "*some head d_head"]) -> Tensor:
        """Returns them after that norm."""
        return raw if self.norm is None else self.norm(raw)

    def parts(
        self, vectors: Float[Tensor, "some d_model"], whole: Float[Tensor, "head d_head"]
    ) -> Float[Tensor, "some d_head"]:
        """Returns parts of this head's, the scale of the norm being that of the whole."""
        found = vectors @ self.weight[self.head]
        return self._after(found, whole)

    def constant(
        self, x: Float[Tensor, " d_model"], whole: Float[Tensor, "head d_head"]
    ) -> Float[Tensor, "1 d_head"]:
        """Returns the part that is nobody's: of the norm's bias and of its own."""
        found = x @ self.weight[self.head]
        bias = None if self.bias is None else self.bias[self.head]
        return self._after(shift(found, bias)[None], whole)

    def _after(self, found: Tensor, whole: Tensor) -> Tensor:
        found = found if self.divisor is None else found / self.divisor
        if self.turn is not None:
            return found @ self.turn
        if self.norm is None:
            return found
        gain = self.norm.gain.expand(len(self.weight), -1)[self.head]
        return self.norm.norm.centre(found) * gain / self.norm.scale(whole)[self.head]


@dataclass(frozen=True)
class MeasuredScore:
    """The score of an edge, as the model has it.

    Attributes:
        matrix: What it makes of a query and a key.
        position: What positions add.
        score: The score itself, before a soft cap.
    """

    matrix: Float[Tensor, "d_head d_head"]
    position: float
    score: float


@dataclass(frozen=True)
class Ruler:
    """Measures scores of an edge's target and source for queries and keys that are put there.

    Attributes:
        view: The model.
        batch: The sentence.
        attention: The sublayer.
        edge: The edge.
        plain: A pass without edits, with queries, keys, pattern and what may be scores.
        max_bytes: Workspace: so many copies of the sentence run at a time, at least one.
    """

    view: ModelView
    batch: Batch
    attention: AttentionSublayer
    edge: Edge
    plain: Trace
    max_bytes: int

    @property
    def pattern(self) -> Float[Tensor, "head source"]:
        """What every head attends to from the target."""
        return self.plain[self.attention.pattern][0, :, self.edge.target]

    @cached_property
    def shown(self) -> bool:
        """Whether the model shows its scores, not (as some bridges do) its patterns once more."""
        name = self.attention.scores
        if not name or name not in self.plain.values:
            return False
        scores, pattern = self.plain[name][0], self.plain[self.attention.pattern][0]
        seen = pattern > 0
        odds = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        odds = odds * pattern.sum(-1, keepdim=True)  # less what goes to a sink
        chosen = bool((seen.sum(-1) > 1).any())
        return chosen and bool((odds - pattern).abs().max() <= self.view.tolerance)

    @property
    def possible(self) -> bool:
        """Whether the target can read the source: a weight may be 0 because it is too small."""
        edge = self.edge
        if float(self.pattern[edge.head, edge.source]) > 0:
            return True
        attention = self.attention
        later = attention.kind == "self" and attention.stack == "decoder"
        if not self.shown or (later and edge.source > edge.target):
            return False
        score = float(self.plain[attention.scores][0, edge.head, edge.target, edge.source])
        return score > torch.finfo(torch.float16).min  # what is masked is far below, if not -inf

    @property
    def other(self) -> int | None:
        """Another source, which scores that are not shown are counted from; None: there is none."""
        seen = (self.pattern > 0).all(dim=0)
        seen[self.edge.source] = False
        return int(seen.nonzero()[0]) if bool(seen.any()) else None

    def __call__(
        self, query: Float[Tensor, "copy head d_head"], key: Float[Tensor, "copy key_head d_head"]
    ) -> Float[Tensor, "copy head"]:
        """Returns the scores of queries and keys, before a soft cap.

        Where the model does not show its scores they are read off its pattern: what they are above
        that of another source, whose key is nothing.
        """
        width = self.pattern.numel() * self.batch.main.ids.shape[1] * 8 + query[0].numel()
        room = max(1, self.max_bytes // (8 * width * 16))
        found = [
            self._measured(query[at : at + room], key[at : at + room])
            for at in range(0, len(query), room)
        ]
        return torch.cat(found)

    def _measured(self, query: Tensor, key: Tensor) -> Tensor:
        attention, edge, count = self.attention, self.edge, len(query)
        batch = self.batch.each(lambda x: x.expand(count, *x.shape[1:]).contiguous())
        name = attention.scores if self.shown else attention.pattern

        def put_query(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, edge.target] = query.to(x)
            return x

        def put_key(x: Tensor) -> Tensor:
            x = x.clone()
            if not self.shown and self.other is not None:
                x[:, self.other] = 0
            x[:, edge.source] = key.to(x)
            return x

        edits = {attention.query: put_query, attention.key: put_key}
        trace = self.view.run(batch, [name], edits=edits, logits=False)
        row = trace[name][:, :, edge.target]
        if not self.shown:
            assert self.other is not None
            return (row[..., edge.source] / row[..., self.other]).log()
        scores, cap = row[..., edge.source], attention.soft_cap
        return scores if cap is None else cap * (scores / cap).atanh()


def measure(
    ruler: Ruler, query: Side, key: Side, raw: tuple[Tensor, Tensor], normed: tuple[bool, bool]
) -> MeasuredScore:
    """Returns the form of an edge's score, and the score.

    Args:
        ruler: What measures.
        query: Queries.
        key: Keys.
        raw: The model's own query and key of the edge, of all heads, as its hook points have them.
        normed: Whether these come after the norms of queries and keys.

    Raises:
        UnsupportedModel: If the score is no bilinear form of query and key.
    """
    attention, head = ruler.attention, ruler.edge.head
    heads, d_head = len(attention.W_O), raw[0].shape[1]
    own_dtype = ruler.plain.values[attention.query].dtype
    generator = torch.Generator(device="cpu").manual_seed(0)

    def drawn(like: Tensor, count: int) -> Tensor:
        found = torch.randn(count, *like.shape, generator=generator, device="cpu") * d_head**-0.25
        return found.to(own_dtype).to(like)  # as a half-precision model rounds them

    def finished(x: Tensor, side: Side, after: bool) -> Tensor:
        found = x if after else side.finished(x)
        return found.repeat_interleave(heads // found.shape[1], dim=1)

    counts = 3, math.ceil(1.5 * d_head / heads) + 1, math.ceil(3 * d_head / heads) + 1
    for count in counts:
        queries = torch.cat([raw[0][None], torch.zeros_like(raw[0])[None], drawn(raw[0], count)])
        keys = torch.cat([raw[1][None], raw[1][None], drawn(raw[1], count)])
        scores = ruler(queries, keys)
        own, position = scores[0], scores[1]  # of the model's own query, and of none
        q = finished(queries[2:], query, normed[0]).flatten(0, 1)
        k = finished(keys[2:], key, normed[1]).flatten(0, 1)
        matrix = fit_form(q, k, (scores[2:] - position).flatten(), ruler.view.tolerance)
        if matrix is not None:
            if not ruler.shown and float(position.abs().max()) > 10 * ruler.view.tolerance:
                why = "scores that the model does not show, with a bias of positions"
                raise _no_form(attention, why)
            return MeasuredScore(matrix.to(own), float(position[head]), float(own[head]))
    raise _no_form(attention, "scores that no matrix fits")


def _no_form(attention: AttentionSublayer, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        "the score of this edge cannot be taken apart",
        f"{attention.pattern}, {why}",
        "scores that are q M k and a bias of positions, at frozen norms",
        "Ask log_prob_contributions or flow, which take patterns as they are.",
    )
