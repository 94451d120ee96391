r"""From states of the residual stream to log-probabilities, with the final norm held or not.

With the scale of the final norm frozen, logits are linear in the stream, and the change that a
vector :math:`v` makes to :math:`\log p(w)` at a state :math:`h` is

.. math:: \log p(w|h+v) - \log p(w|h) = b_w(v) - \log E_{u \sim p(\cdot|h)}\, e^{b_u(v)}
          \le b_w(v) - E_u\, b_u(v) = v \cdot g(h)

with :math:`b(v)` the logits of :math:`v` and :math:`g` the gradient of :math:`\log p(w)`: Jensen's
bound costs one inner product of d_model numbers where the score costs a product with W_U. The
left-hand side is what is computed everywhere here: it keeps the digits that a difference of two
log-probabilities loses.

Asked for one of several tokens :math:`T` rather than one of :math:`F` (`contrast`), the change is

.. math:: \log E_{u \sim p(\cdot|h, T)}\, e^{b_u(v)} - \log E_{u \sim p(\cdot|h, F)}\, e^{b_u(v)}
          \le \max_{w \in T} b_w(v) - E_{u \sim p(\cdot|h, F)}\, b_u(v)

with :math:`F` the vocabulary where there is no foil. For two single tokens it is
:math:`b_w(v) - b_f(v)` at every state: linear, and its own bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import require_weight, shift
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.core.log_means import LogMean, Reach, log_mean
from tl_contextmix.core.model_view import Readout
from tl_contextmix.core.readout import CACHE_BYTES, Scan, scan, tile_sizes
from tl_contextmix.core.token_sums import beside, blocks, multiply

NormRule = Literal["frozen", "frozen+beta", "recompute"]
Columns = Callable[[slice | Tensor], Tensor]
"""Numbers of some tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """The readout of one position in each sentence, under a rule for its norm.

    Attributes:
        readout: The model's.
        rule: ``"frozen"``: scale of the final norm as it really is, no norm bias, no b_U.
            ``"frozen+beta"``: the same with both. ``"recompute"``: the norm of each state.
        divisor: The real scale of the final norm.
        weight: W_U, of what the head makes of the stream where there is one.
        constants: Logits of the zero vector, under the rule.
        asked: The tokens asked about, and their foils, in each sentence.
        final: The stream after the last block.
        max_bytes: Workspace.
        reach: How increases are computed, see `log_mean`.
    """

    readout: Readout
    rule: NormRule
    divisor: Float[Tensor, "batch 1"]
    weight: Float[Tensor, "width d_vocab"]
    constants: Float[Tensor, " d_vocab"]
    asked: Contrast
    final: Float[Tensor, "batch d_model"]
    max_bytes: int
    reach: Reach = "either"

    @property
    def nonlinear(self) -> str:
        """Why logits are not linear in the stream; empty where they are."""
        if self.readout.head is not None:
            return "the head is not linear"
        if self.readout.soft_cap is not None:
            return "the model caps its logits"
        return "the norm is recomputed at every state" if self._recomputed else ""

    @property
    def _recomputed(self) -> bool:
        return self.rule == "recompute" and self.readout.norm is not None

    def direction(self, x: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
        """Returns what W_U multiplies, of a vector, before the frozen scale divides it."""
        norm = self.readout.norm
        return (x if norm is None else norm.linear(x)) * self.readout.scale

    @cached_property
    def target_columns(self) -> Float[Tensor, "batch d_model"]:
        """Columns of W_U that `target_logits` multiplies: the target's less the foil's.

        Of several tokens their mean, each as likely as the model finds it among them.
        """
        logits = None if self.asked.single else self.readout(self.final)

        def mean(sets: tuple[Tensor, ...]) -> Tensor:
            if logits is None:
                return self.weight[:, torch.cat(sets)].T
            each = zip(sets, logits, strict=True)
            return torch.stack([self.weight[:, ids] @ row[ids].softmax(dim=0) for ids, row in each])

        target, foil = mean(self.asked.target), self.asked.foil
        return target if foil is None else target - mean(foil)

    def target_logits(self, vectors: Float[Tensor, "batch *rest d_model"]) -> Tensor:
        """Returns the target's logit, less the foil's, of each vector, the norm's scale frozen.

        NaN with a masked-LM head, where logits are no sums.
        """
        if self.readout.head is not None:
            return torch.full_like(vectors[..., 0], torch.nan)
        found = torch.einsum("b...d,bd->b...", self.direction(vectors), self.target_columns)
        return found / self.divisor.view(-1, *[1] * (found.ndim - 1))

    def target_logits_shared(
        self, vectors: Float[Tensor, "neuron d_model"]
    ) -> Float[Tensor, "batch neuron"]:
        """Returns the same of vectors that all sentences share."""
        if self.readout.head is not None:
            return vectors.new_full((len(self.asked.target), len(vectors)), torch.nan)
        return (self.direction(vectors) @ self.target_columns.T).T / self.divisor

    def hidden(self, x: Float[Tensor, "some d_model"], row: int) -> Float[Tensor, "some width"]:
        """Returns what W_U multiplies, of states of one sentence."""
        readout = self.readout
        if readout.head is not None:
            return readout.head(x) * readout.scale
        if self.rule == "recompute" and readout.norm is not None:
            return readout.norm(x) * readout.scale
        return self.direction(x) / self.divisor[row]

    def _finish(self, products: Tensor, tokens: Tensor | slice) -> Tensor:
        found = products + self.constants[tokens]
        cap = self.readout.soft_cap
        return found if cap is None else cap * torch.tanh(found / cap)

    def log_probs(
        self, states: Float[Tensor, "some d_model"], row: int
    ) -> Float[Tensor, "some d_vocab"]:
        """Returns the whole distribution of states of one sentence."""
        logits = self._finish(self.hidden(states, row) @ self.weight, slice(None))
        return logits.log_softmax(dim=-1)

    def target_log_probs(
        self, states: Float[Tensor, "batch step d_model"]
    ) -> Float[Tensor, "batch step"]:
        """Returns the target's log-probability, less the foil's, at states."""
        return torch.stack([self.trajectory(each, row) for row, each in enumerate(states)])

    def trajectory(self, states: Float[Tensor, "step d_model"], row: int) -> Float[Tensor, " step"]:
        """Returns `target_log_probs` of one sentence."""
        parts = states.split(self.rows_that_fit(len(states)))
        return torch.cat([self.of_target(self.log_probs(part, row), row) for part in parts])

    def of_target(
        self, log_probs: Float[Tensor, "some d_vocab"], row: int
    ) -> Float[Tensor, " some"]:
        """Returns the target's log-probability, less the foil's, in distributions."""
        result = log_probs[:, self.asked.target[row]].logsumexp(dim=1)
        if self.asked.foil is not None:
            result = result - log_probs[:, self.asked.foil[row]].logsumexp(dim=1)
        return result

    def within_reach(
        self, compute: Callable[[Vocabulary], Iterable[tuple[Tensor, ...]]]
    ) -> list[tuple[Tensor, ...]]:
        """Returns increases that a function computes, anew where exponentials overflow.

        A GPU is waited for once, whatever their number.
        """
        found = [*compute(replace(self, reach="near"))]
        odd = [some.isnan().any() for each in found for some in each]
        if not bool(torch.stack(odd).any()):
            return found
        pairs = zip(found, compute(replace(self, reach="far")), strict=True)
        return [
            tuple(torch.where(near.isnan(), far, near) for near, far in zip(*pair, strict=True))
            for pair in pairs
        ]

    def gains(
        self,
        base: Float[Tensor, "batch d_model"],
        vectors: Float[Tensor, "batch some d_model"],
        there: Bool[Tensor, "batch some"] | None = None,
    ) -> Float[Tensor, "batch some"]:
        """Returns the increase of `target_log_probs` by each vector, added to a state alone.

        Where ``there`` is given, the others gain 0.
        """
        result = vectors.new_zeros(vectors.shape[:2])
        rows, tile = self._tiles(vectors.shape[1])
        every = torch.arange(vectors.shape[1])
        for row in range(len(base)):
            before = self.log_probs(base[row : row + 1], row)
            start = self.hidden(base[row : row + 1], row)
            for part in (every if there is None else every[there[row].cpu()]).split(rows):
                part = beside(vectors, part)
                shift = self._shift(start, base[row], vectors[row, part], row)
                result[row, part] = self._gained(_columns_of(before), shift, row, tile)
        return result

    def gains_at(
        self,
        states: Float[Tensor, "batch step d_model"],
        steps: Sequence[int],
        vectors: Float[Tensor, "batch some d_model"],
        there: Bool[Tensor, "batch some"] | None = None,
    ) -> tuple[Float[Tensor, "batch some"], Float[Tensor, "batch step"]]:
        """Returns `gains` of vectors, each added to a state of its own, and `target_log_probs`.

        Linear readouts multiply W_U once with all states and once with all vectors of a sentence,
        as far as these fit, not once for each state.

        Args:
            states: The states.
            steps: Which of them each vector is added to.
            vectors: The vectors.
            there: The others gain 0; None: all are there.
        """
        result, each = vectors.new_zeros(vectors.shape[:2]), torch.tensor([*steps])
        if self.nonlinear:
            for step in sorted({*steps}):
                mine = each == step
                some = None if there is None else there[:, mine.to(there.device)]
                result[:, mine] = self.gains(states[:, step], vectors[:, mine], some)
            return result, self.target_log_probs(states)
        every, log_probs = torch.arange(len(steps)), []
        for row in range(len(states)):
            some = every if there is None else every[there[row].cpu()]
            found = Distributions(self, states[row], row)
            log_probs.append(found.of_target())
            for part in some.split(self.rows_that_fit(max(1, len(some)))):
                before, at = found.at(each[part])
                result[row, part] = self.gains_from(before, at, vectors[row, part], row)
        return result, torch.stack(log_probs)

    def gains_from(
        self,
        before: Float[Tensor, "step d_vocab"],
        at: Int[Tensor, " some"],
        vectors: Float[Tensor, "some d_model"],
        row: int,
    ) -> Float[Tensor, " some"]:
        """Returns the increase by vectors of one sentence, each from its own of some distributions.

        Linear readouts only.
        """
        moved = self.direction(vectors) / self.divisor[row]
        # Each vector has its own distribution: one more copy of a tile.
        tile = max(1, self._tiles(len(vectors))[1] // 2)
        return self._gained(_columns_of(before, at), self._moved_by(moved), row, tile)

    def _moved_by(self, moved: Float[Tensor, "some d_model"]) -> Columns:
        """Returns the function that multiplies vectors with a part of W_U."""
        return lambda part: multiply(moved, self.weight[:, part])

    def _gained(
        self, before: Columns, shift: Columns, row: int, tile: int
    ) -> Float[Tensor, " some"]:
        """Returns the increases of one sentence by changes of its logits.

        Args:
            before: Returns log-probabilities of some tokens (one row, or one for each change).
            shift: Returns the changes of some tokens' logits.
            row: The sentence.
            tile: How many tokens at once.
        """
        gained = self._log_mean_of(self.asked.target[row], before, shift)
        if self.asked.foil is not None:
            return gained - self._log_mean_of(self.asked.foil[row], before, shift)

        def add_to(mean: LogMean) -> None:
            for part in blocks(self.weight.shape[1], tile):
                mean.add(..., before(part), shift(part))

        return gained - log_mean(gained, add_to, self.reach)

    def _log_mean_of(
        self, ids: Int[Tensor, " alternative"], before: Columns, shift: Columns
    ) -> Tensor:
        """Returns what changes of logits add to the log-sum-exp of some tokens."""
        changes = shift(ids)
        if len(ids) == 1:
            return changes[..., 0]
        among = before(ids).log_softmax(dim=-1)
        like = changes[..., 0]
        return log_mean(like, lambda mean: mean.add(..., among, changes.clone()), self.reach)

    def _shift(self, start: Tensor, base: Tensor, vectors: Tensor, row: int) -> Columns:
        """Returns the function that gives the change of a part of the logits.

        Never a difference of two logits, which has lost the digits of a small change.
        """
        if self.readout.head is None and not self._recomputed:
            moved = self.direction(vectors) / self.divisor[row]
        else:
            moved = self.hidden(base + vectors, row) - start
        cap = self.readout.soft_cap

        def shift(part: slice | Tensor) -> Tensor:
            change = moved @ self.weight[:, part]
            if cap is None:
                return change
            # tanh(a + b) - tanh(a) = tanh(b) (1 - tanh(a) tanh(a + b))
            logits = start @ self.weight[:, part] + self.constants[part]
            before, after = ((x / cap).tanh() for x in (logits, logits + change))
            return cap * (change / cap).tanh() * (1 - before * after)

        return shift

    def neuron_gains(
        self,
        base: Float[Tensor, "batch d_model"],
        vectors: Callable[[slice], Tensor],
        coefficients: Float[Tensor, "batch source neuron"],
    ) -> Float[Tensor, "batch source neuron"]:
        """Returns the increase by every neuron: number times vector, vectors shared by sentences.

        Each vector is multiplied with W_U once, whatever the number of sentences and sources.

        Args:
            base: The state they are added to.
            vectors: Returns vectors of some neurons.
            coefficients: Their numbers.
        """
        count = coefficients.shape[2]
        rows, tile = self._tiles(count)
        if self.nonlinear:
            return self._each_neuron(base, vectors, coefficients, rows)
        before = torch.cat([self.log_probs(x[None], row) for row, x in enumerate(base)])
        scaled = coefficients / self.divisor[:, None]
        result = torch.empty_like(coefficients)
        for part in blocks(count, rows):
            moved_by = self._moved_by(self.direction(vectors(part)))
            some = scaled[:, :, part]
            if self.asked.foil is None:

                def add_to(
                    mean: LogMean, moved_by: Columns = moved_by, some: Tensor = some
                ) -> None:
                    for columns in blocks(self.weight.shape[1], tile):
                        shift = moved_by(columns)
                        fit = rows * tile // shift.numel()
                        for here in blocks(len(base), fit // some.shape[1]):
                            for sources in blocks(some.shape[1], fit):
                                change = some[here, sources, :, None] * shift
                                mean.add((here, sources), before[here, None, None, columns], change)

                rest = log_mean(some, add_to, self.reach)
            else:
                rest = self._alternatives(self.asked.foil, before, moved_by, some, rows * tile)
            gained = self._alternatives(self.asked.target, before, moved_by, some, rows * tile)
            result[:, :, part] = gained - rest
        return result

    def _alternatives(
        self,
        sets: tuple[Tensor, ...],
        before: Tensor,
        moved_by: Columns,
        scaled: Float[Tensor, "batch source some"],
        room: int,
    ) -> Float[Tensor, "batch source some"]:
        """Returns what neurons add to the log-sum-exp of each sentence's tokens."""
        result = torch.empty_like(scaled)
        for row, ids in enumerate(sets):
            shift = moved_by(ids)
            for sources in blocks(scaled.shape[1], room // shift.numel()):
                changes = scaled[row, sources, :, None] * shift
                result[row, sources] = self._log_mean_of(
                    ids, _columns_of(before[row : row + 1]), lambda _, changes=changes: changes
                )
        return result

    def _each_neuron(
        self,
        base: Tensor,
        vectors: Callable[[slice], Tensor],
        coefficients: Tensor,
        rows: int,
    ) -> Tensor:
        result = torch.empty_like(coefficients)
        for part in blocks(coefficients.shape[2], rows):
            some = vectors(part)
            for source in range(coefficients.shape[1]):
                scaled = coefficients[:, source, part, None] * some
                result[:, source, part] = self.gains(base, scaled)
        return result

    def slopes(
        self, before: Float[Tensor, "step d_vocab"], row: int
    ) -> Float[Tensor, "step alternative d_model"]:
        """Returns gradients at states of one sentence, one for each alternative of the target.

        The largest of ``vector @ slope`` is at least what the vector gains. Linear readouts only.

        Args:
            before: The distributions at the states.
            row: The sentence.
        """
        if self.asked.foil is None:
            mean = before.exp() @ self.weight.T
        else:
            ids = self.asked.foil[row]
            mean = before[:, ids].softmax(dim=1) @ self.weight[:, ids].T
        return self._slope(self.weight[:, self.asked.target[row]].T - mean[:, None], row)

    def linear_part(
        self, state: Float[Tensor, " d_model"], row: int
    ) -> tuple[Float[Tensor, " d_model"], float]:
        r"""Returns slope and constant of what is asked about one sentence, linear in the stream.

        :math:`\sum_u (p_u^T - p_u^F)\, l_u = g \cdot h + c` with the probabilities among targets
        and among foils, without a foil among all tokens, frozen at the state. With single tokens
        and a foil it is the difference of their logits, else the score less a difference of
        entropies. A soft cap is frozen as a secant from zero; a masked-LM head has a gradient, and
        :math:`c` the rest.
        """
        log_probs = self.log_probs(state[None], row)[0]
        among = torch.zeros_like(log_probs)
        target, foil = self.asked.target[row], self.asked.foil
        among[target] = log_probs[target].softmax(dim=0)
        if foil is None:
            among -= log_probs.exp()
        else:
            among[foil[row]] -= log_probs[foil[row]].softmax(dim=0)
        if self.readout.head is not None:
            # Also right when called under no_grad or inference_mode.
            with torch.inference_mode(False), torch.enable_grad():
                x = state.detach().clone().requires_grad_()
                score = (
                    self._finish(self.hidden(x[None], row) @ self.weight, slice(None))[0] @ among
                )
                (slope,) = torch.autograd.grad(score, x)
            return slope, float(score.detach() - slope @ state)
        if self.readout.soft_cap is not None:
            logits = self.hidden(state[None], row)[0] @ self.weight + self.constants
            capped = self._finish(logits - self.constants, slice(None))
            among = among * torch.where(logits == 0, 1, capped / logits)
        return self._slope(self.weight @ among, row), float(self.constants @ among)

    def _slope(self, hidden: Float[Tensor, "*some d_model"], row: int) -> Tensor:
        """Returns the gradient in the stream, given that of what W_U multiplies."""
        norm, found = self.readout.norm, hidden
        if norm is not None:
            found = norm.centre(found if norm.weight is None else found * norm.weight)
        return found * self.readout.scale / self.divisor[row]

    def ranks(self, vectors: Float[Tensor, "some d_model"], row: int) -> Float[Tensor, " some"]:
        """Returns the rank of the target's best alternative in the logits of vectors alone; from 1.

        Constants are omitted where logits are linear: they are no part of the vector.
        """
        # The scale of the norm makes no rank.
        ranks = [self._scan(vectors, row, 1, token).rank[:, 0] for token in self.asked.target[row]]
        return torch.stack(ranks).amin(dim=0).to(vectors)

    def extremes(
        self, vectors: Float[Tensor, "some d_model"], row: int, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns values and ids of the tokens that vectors alone raise and lower most.

        Before the softmax, the norm's scale frozen; a masked-LM head is applied in full.
        """
        found = self._scan(vectors, row, k)
        return found.ends[:, 0], found.ids[:, 0], found.ends[:, 1], found.ids[:, 1]

    def _scan(self, vectors: Tensor, row: int, k: int, token: Tensor | None = None) -> Scan:
        """Returns what vectors alone say, and the rank of a token."""
        targets = None if token is None else token.expand(len(vectors))
        if self.readout.head is None:
            hidden, finish = self.direction(vectors) / self.divisor[row], _as_it_is
        else:
            hidden, finish = self.hidden(vectors, row), self._finish
        return scan(hidden, self.weight, finish, k, targets=targets, max_bytes=self.max_bytes)

    def rows_that_fit(self, count: int) -> int:
        """Returns how many whole distributions may be worked on at once."""
        return self._tiles(count, whole=True)[0]

    def _tiles(self, count: int, *, whole: bool = False) -> tuple[int, int]:
        """Returns how many vectors, and how many tokens, to multiply at once."""
        size = self.weight.element_size()
        room = self.max_bytes if whole else min(self.max_bytes, CACHE_BYTES)
        return tile_sizes(count, self.weight.shape[1], size, room, whole=whole)


class Distributions:
    """The distributions at states of one sentence, kept where all of them fit.

    Args:
        vocabulary: How the states are read.
        states: The states.
        row: The sentence.
    """

    def __init__(
        self, vocabulary: Vocabulary, states: Float[Tensor, "step d_model"], row: int
    ) -> None:
        self.vocabulary, self.states, self.row = vocabulary, states, row
        fits = vocabulary.rows_that_fit(len(states)) >= len(states)
        self._kept = vocabulary.log_probs(states, row) if fits else None

    def at(self, steps: Int[Tensor, " some"]) -> tuple[Tensor, Tensor]:
        """Returns distributions, and which of them is that at each of some states."""
        if self._kept is not None:
            return self._kept, steps
        used, at = steps.unique(return_inverse=True)
        return self.vocabulary.log_probs(self.states[used], self.row), at

    def of_target(self) -> Float[Tensor, " step"]:
        """Returns `Vocabulary.trajectory`."""
        if self._kept is None:
            return self.vocabulary.trajectory(self.states, self.row)
        return self.vocabulary.of_target(self._kept, self.row)


def _columns_of(rows: Float[Tensor, "some d_vocab"], at: Tensor | None = None) -> Columns:
    """Returns the function that returns some columns, of all rows or of those at some places."""
    return lambda part: rows[:, part] if at is None else rows[:, part][at]


def _as_it_is(products: Tensor, tokens: Tensor | slice) -> Tensor:
    return products


def read_vocabulary(
    readout: Readout,
    rule: NormRule,
    final: Float[Tensor, "batch d_model"],
    asked: Contrast,
    max_bytes: int,
) -> Vocabulary:
    """Returns the readout of a position under a rule for its norm.

    Args:
        readout: The model's.
        rule: The rule.
        final: The stream after the last block: its norm's scale is the one that is frozen.
        asked: The tokens asked about, and their foils, in each sentence.
        max_bytes: Workspace.

    Raises:
        UnsupportedModel: If there are no logits to read.
    """
    readout.require()
    norm, weight = readout.norm, require_weight(readout.weights, "W_U")
    constants = weight.new_zeros(weight.shape[1])
    if rule != "frozen":
        constants = shift(constants, readout.weights("b_U"))
        if rule == "frozen+beta" and norm is not None and norm.bias is not None:
            constants = constants + norm.bias * readout.scale @ weight
    divisor = final.new_ones(len(final), 1) if norm is None else norm.scale(final)
    return Vocabulary(readout, rule, divisor, weight, constants, asked, final, max_bytes)
