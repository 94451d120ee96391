r"""By which route parts go through the neurons of a feed-forward sublayer, decided by counts.

A part of width D becomes :math:`(p W_{in} \odot r_i) W_{out}`, its target's slopes being
:math:`r_i`. Three ways to the same numbers:

* ``"all"``: every neuron of every pair of target and source.
* ``"active"``: only neurons whose slope is not exactly zero (ReLU), gathered for each target.
* ``"folded"``: one matrix for each target, :math:`W_{in} \mathrm{diag}(r_i) W_{out}`, which costs
  ``2 D d_mlp d_model``, and ``2 D d_model`` for each pair: for long inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_contextmix.core.token_sums import multiply, through_neurons

Route = Literal["all", "active", "folded"]

# Measured on one core: to move a number takes as long as so many operations of a product, and a
# target that is looked at alone as many as these, for its calls.
_PER_MOVE, _PER_TARGET = 100, 5 * 10**7
# A route that is hardly cheaper is no faster: it works through smaller products.
_SAVES = 0.9


@dataclass(frozen=True)
class Costs:
    """Sizes that costs depend on.

    Attributes:
        width: How many neurons there are.
        d_model: Width of what they write.
        mixed: How many numbers are summed for a neuron of a pair, all branches together: of its
            heads, or of what is read.
        entering: The same where neurons are taken one by one: of what is read.
        read: Width of a part as it is folded.
    """

    width: int
    d_model: int
    mixed: int
    entering: int
    read: int

    @classmethod
    def of_parts(cls, neurons: int, d_model: int, width: int, branches: int) -> Costs:
        """Returns the sizes where parts of some width enter, not what heads mix."""
        return cls(neurons, d_model, branches * width, branches * width, width)

    def active(self, pairs: int, targets: int, active: int) -> int:
        """Returns what the active neurons of some targets cost, all targets together.

        Args:
            pairs: Sources of each target.
            targets: How many there are.
            active: Neurons, of all of them together.
        """
        weights = self.d_model + self.entering
        return active * weights * (2 * pairs + _PER_MOVE) + targets * _PER_TARGET

    def all(self, pairs: int, targets: int) -> int:
        """Returns what all neurons cost."""
        return targets * pairs * self.width * 2 * (self.d_model + self.mixed)

    def folded(self, pairs: int, targets: int, times: int = 1) -> int:
        """Returns what a matrix for each target costs.

        Args:
            pairs: Sources of each target.
            targets: How many there are.
            times: How often each matrix is made.
        """
        made = times * 2 * self.read * self.width * self.d_model
        return targets * (made + pairs * 2 * self.read * self.d_model + _PER_TARGET)

    def route(
        self, pairs: int, targets: int, *, active: int | None = None, times: int = 1
    ) -> Route:
        """Returns the cheapest way.

        Args:
            pairs: Sources of each target.
            targets: How many there are.
            active: Neurons with a slope, of all of them together; None where that is not known.
            times: How often a target's matrix would be made.
        """
        whole = _SAVES * self.all(pairs, targets)
        # No active neuron at all is no count (`estimate` has no numbers).
        gathered = self.active(pairs, targets, active) if active else whole
        folded = self.folded(pairs, targets, times)
        if gathered < min(whole, folded):
            return "active"
        return "folded" if folded < whole else "all"

    def may_gather(self, pairs: int, targets: int) -> bool:
        """Returns whether few active neurons could be cheaper: counting them takes a look."""
        return self.active(pairs, targets, targets) < self.all(pairs, targets)


def in_use(slopes: Sequence[Float[Tensor, "*place neuron"]]) -> Bool[Tensor, "*place neuron"]:
    """Returns which neurons have a slope other than exactly zero, in any branch."""
    used = slopes[0] != 0
    for slope in slopes[1:]:
        used |= slope != 0
    return used


def active_at(used: Bool[Tensor, "*place neuron"]) -> list[Int[Tensor, " some"]]:
    """Returns the neurons in use at each place, one place after the other."""
    flat = used.flatten(0, -2)
    counts = flat.sum(dim=-1).tolist()
    found = flat.flatten().nonzero()[:, 0].split(counts)
    return [some - index * flat.shape[1] for index, some in enumerate(found)]


def transmit(
    parts: Float[Tensor, "place part d_in"],
    weights: Sequence[Float[Tensor, "d_in neuron"]],
    slopes: Sequence[Float[Tensor, "place neuron"]],
    W_out: Float[Tensor, "neuron d_out"],
    silent: bool,
) -> Float[Tensor, "place part d_out"] | None:
    """Returns what parts become by a cheaper route than all neurons; None where there is none.

    Args:
        parts: Parts of what the sublayer reads.
        weights: Each branch's input weights.
        slopes: For each branch what a share of its pre-activation is multiplied with.
        W_out: Value vectors.
        silent: Whether slopes can be exactly zero.
    """
    count, pairs, width = parts.shape
    neuron, d_out = W_out.shape
    sizes = Costs.of_parts(neuron, d_out, width, len(weights))
    used, active = None, None
    if silent and sizes.may_gather(pairs, count):
        used = in_use(slopes)
        active = int(used.sum())
    route = sizes.route(pairs, count, active=active)
    if route == "all":
        return None
    out = parts.new_empty(count, pairs, d_out)
    if route == "folded":
        for place in range(count):
            out[place] = multiply(parts[place], fold(weights, slopes, W_out, place))
        return out
    assert used is not None
    rows = [weight.T.contiguous() for weight in weights]
    for place, some in enumerate(active_at(used)):
        own = [slope[place, some] for slope in slopes]
        out[place] = through_some(parts[place], rows, own, W_out, some)
    return out


def through_some(
    parts: Float[Tensor, "part d_in"],
    weights: Sequence[Float[Tensor, "neuron d_in"]],
    slopes: Sequence[Float[Tensor, " some"]],
    W_out: Float[Tensor, "neuron d_out"],
    some: Int[Tensor, " some"],
) -> Float[Tensor, "part d_out"]:
    """Returns what parts become through some neurons, given their slopes; in W_out's dtype."""
    rows = [weight.index_select(0, some).T for weight in weights]
    return through_neurons(parts, rows, slopes, W_out.index_select(0, some))


def fold(
    weights: Sequence[Float[Tensor, "read neuron"]],
    slopes: Sequence[Float[Tensor, "*place neuron"]],
    W_out: Float[Tensor, "neuron d_out"],
    *place: int,
) -> Float[Tensor, "read d_out"]:
    """Returns a target's slopes folded into the weights around them, in the dtype of W_out."""
    inner = None
    for weight, slope in zip(weights, slopes, strict=True):
        one = weight * slope[place]
        inner = one if inner is None else inner.add_(one)
    assert inner is not None
    return multiply(inner.to(W_out.dtype), W_out)
