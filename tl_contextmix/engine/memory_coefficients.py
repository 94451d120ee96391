r"""The feed-forward sublayer as a memory: coefficients, values, and how they make up its output.

A neuron's coefficient :math:`m_i` is its activation and its value :math:`v_i` a row of W_out:
:math:`y = \sum_i m_i v_i + b` (Geva, Schuster, Berant, Levy 2021, EMNLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import Block, FeedForward, Identity, Trace, shift
from tl_contextmix.core.experts import Experts
from tl_contextmix.core.finite import require_predictions
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.readout import Scan, Unembedding, unembedding
from tl_contextmix.errors import InvalidInput, UnsupportedModel
from tl_contextmix.results.memory_composition import figure_rows

Active = Literal["positive", "nonzero"]
CASES = ("residual", "ffn", "agreement", "composition", "conflict")
"""Which of residual stream and feed-forward output has the top token of their sum: one of them,
both, none; or both the same one, which the sum has not. The last cannot be where logits are
linear."""
QUADRANTS = ("++", "+-", "-+", "--")
"""Signs of the gate and of the linear branch of a gated neuron."""


def require_feed_forward(block: Block) -> FeedForward:
    """Returns the feed-forward sublayer of a block, or what a dictionary makes of its stream.

    Raises:
        InvalidInput: If it has none.
        UnsupportedModel: If its neurons are not known.
    """
    if block.rewrite is not None and block.feed_forward is not None and block.feed_forward.point:
        raise InvalidInput(
            f"it is not clear which features of layer {block.layer} are meant",
            "a transcoder and an SAE in one layer",
            "one of them",
            "Ask about them one by one.",
        )
    if block.memories is None:
        raise InvalidInput(
            f"there are no memories in layer {block.layer}",
            "a block without a feed-forward sublayer",
            "a model with feed-forward sublayers",
            "Attention-only models have none.",
        )
    block.memories.require_neurons()
    return block.memories


def experts_of(
    ff: FeedForward, neurons: Sequence[int] | None = None
) -> Int[Tensor, " neuron"] | None:
    """Returns which expert each memory belongs to (of some neurons; None: all); None without."""
    if not isinstance(ff, Experts):
        return None
    return ff.expert_of(torch.tensor(range(ff.width) if neurons is None else neurons))[0]


def require_as_many(blocks: Sequence[Block]) -> None:
    """Checks that layers have equally many memories, to stand in one array.

    Raises:
        InvalidInput: If they have not.
    """
    sizes: dict[int, list[int]] = {}
    for block in blocks:
        sizes.setdefault(require_feed_forward(block).width, []).append(block.layer)
    if len(sizes) > 1:
        listed = "; ".join(f"{size} in layers {layers}" for size, layers in sizes.items())
        raise InvalidInput(
            "layers with different numbers of memories cannot be in one array",
            listed,
            "layers that have equally many",
            f"Ask for them apart: layer={max(sizes.values(), key=len)}.",
        )


def require_predicting(view: ModelView, stack: str) -> None:
    """Checks that the vocabulary is read from a stack.

    Raises:
        UnsupportedModel: If the model has no vocabulary readout.
        InvalidInput: If the stack is the encoder of two.
    """
    view.readout.require()
    if stack != view.base_stack(None):
        raise InvalidInput(
            "no token is read from this stack",
            f"stack={stack!r}",
            f"{view.base_stack(None)!r}, whose last stream is read as tokens",
            "Leave `stack` out.",
        )


def active_rule(active: object, gated: bool) -> Active:
    """Returns which memories count as active; None is what suits the activation.

    Raises:
        InvalidInput: If there is no such rule.
    """
    if active is None:
        return "nonzero" if gated else "positive"
    if active not in ("positive", "nonzero"):
        raise InvalidInput(
            "there is no such rule for active memories",
            f"active={active!r}",
            "'positive', 'nonzero' or None",
            "See the docstring of ff_memories.",
        )
    return active  # type: ignore[return-value]


def branch_names(ff: FeedForward) -> tuple[str, ...]:
    """Returns the names of the activations that coefficients and their signs are read from."""
    return (ff.post,) if ff.pre_linear is None else (ff.post, ff.pre, ff.pre_linear)


def quadrants(ff: FeedForward, trace: Trace) -> Int[Tensor, "batch pos neuron"]:
    """Returns the quadrant of each gated neuron, an index into `QUADRANTS`; zero counts as +.

    -1 in experts that a token is not routed to.

    The coefficient is the activation of the gate times the linear branch, so that it is negative
    in ``+-`` and ``-+``: the value then promotes what it is furthest from.
    """
    if isinstance(ff, Experts):
        return ff.signs(trace)
    assert ff.pre_linear is not None
    gate = ff.require_activation()(trace[ff.pre])
    return 2 * (gate < 0).long() + (trace[ff.pre_linear] < 0).long()


def values(ff: FeedForward) -> Float[Tensor, "neuron d_model"]:
    """Returns the value vectors as the residual stream gets them, up to a positive factor.

    A norm of the sublayer's output (Gemma 2, OLMo 2) is applied without its scale.
    """
    return ff.W_out if ff.norm_out is None else ff.norm_out.linear(ff.W_out)


@dataclass(frozen=True)
class LayerComposition:
    """How the memories of one layer make up its output, at some positions.

    Attributes:
        coefficients: What each value is multiplied with.
        active: Share of memories that are active.
        residual_top: Top token of the stream that the output is added to.
        ffn_top: Top token of the feed-forward output.
        output_top: Top token of the layer's output.
        probability: Probability of the model's final top token, read from the residual stream.
        case: Index into `CASES`.
    """

    coefficients: Float[Tensor, "place neuron"]
    active: Float[Tensor, " place"]
    residual_top: Int[Tensor, " place"]
    ffn_top: Int[Tensor, " place"]
    output_top: Int[Tensor, " place"]
    probability: Float[Tensor, " place"]
    case: Int[Tensor, " place"]

    def sums(
        self, final: Int[Tensor, " place"], agreeing: Int[Tensor, " place"]
    ) -> Float[Tensor, " quantity"]:
        """Returns the sums over positions that `CompositionFigures` has."""
        seen = (self.active, agreeing, self.residual_top == final, self.probability, self.case)
        return torch.stack([row.sum() for row in figure_rows(*seen, len(CASES))])


@dataclass(frozen=True)
class LayerReadout:
    """How layers are read, and where.

    Attributes:
        view: The model.
        states: How streams and outputs are read.
        table: How values are read.
        active: Which memories count as active.
        where: Sentences and positions that are read; not a mask, whose size a GPU would be asked
            for at every use.
        scale: Scale of the final norm at them, for where it is frozen.
        final: The model's top token at them.
    """

    NEEDS: ClassVar[frozenset[Identity]] = frozenset({"mlp", "block"})

    view: ModelView
    states: Unembedding
    table: Unembedding
    active: Active
    where: tuple[Int[Tensor, " place"], Int[Tensor, " place"]]
    scale: Float[Tensor, "place 1"]
    final: Int[Tensor, " place"]

    @staticmethod
    def names(view: ModelView, block: Block) -> tuple[str, ...]:
        """Returns the activations that reading a layer needs, besides the block's points."""
        ff = require_feed_forward(block)
        ending = () if block.ending is None else (block.ending.post,)
        return (*branch_names(ff), *block.spared(), *ending, view.blocks()[-1].resid_out)

    @classmethod
    def of(
        cls,
        view: ModelView,
        trace: Trace,
        how: tuple[Unembedding, Unembedding],
        active: Active,
        mask: Bool[Tensor, "batch pos"],
    ) -> LayerReadout:
        """Returns the readout of a pass.

        Args:
            view: The model.
            trace: The pass, with what `names` asks for.
            how: How states and how values are read.
            active: Which memories count as active.
            mask: Positions to read.

        Raises:
            UnsupportedModel: If hooks of the user's own edit what follows the last block.
        """
        row, pos = mask.to(view.device).nonzero(as_tuple=True)
        where = row, pos
        last = trace[view.blocks()[-1].resid_out][where]
        norm = view.readout.norm
        scale = torch.ones_like(last[..., :1]) if norm is None else norm.scale(last)
        final = _final_top(view, trace, where, last)
        return cls(view, *how, active, where, scale, final)

    def read(self, block: Block, trace: Trace) -> LayerComposition:
        """Returns how the memories of a layer make up its output."""
        ff = require_feed_forward(block)
        found = ff.coefficients(trace)[self.where]
        residual = block.middle(trace)[self.where]
        added = ff.output(trace, self.where)
        steering = trace.edit(ff.edits.stream)
        output = shift(residual + added, None if steering is None else steering[self.where])
        output = output if ff.norm_after is None else ff.norm_after(output)
        output = output if block.ending is None else block.output(trace)[self.where]
        first = self._scan(residual, self.final)
        residual_top, ff_top, top = (
            scan.ids[:, 0, 0] for scan in (first, self._scan(added), self._scan(output))
        )
        return LayerComposition(
            found,
            (found > 0 if self.active == "positive" else found != 0).to(found).mean(-1),
            residual_top,
            ff_top,
            top,
            first.target_prob,
            cases(residual_top, ff_top, top),
        )

    def _scan(self, x: Tensor, targets: Tensor | None = None) -> Scan:
        return self.states.scan(self.states.hidden(x, self.scale), sides=1, targets=targets)

    def firing(self, one: LayerComposition) -> list[Bool[Tensor, "place neuron"]]:
        """Returns which memories are active, by side: those that add their value, or take it."""
        m = one.coefficients
        return [m > 0] if self.active == "positive" else [m > 0, m < 0]

    def agreeing(
        self, one: LayerComposition, promoted: Int[Tensor, "neuron side"]
    ) -> Int[Tensor, " place"]:
        """Returns how many active memories promote the top token of the feed-forward output."""
        sides = zip(self.firing(one), promoted.T, strict=False)
        alike = [active & (tokens == one.ffn_top[:, None]) for active, tokens in sides]
        return torch.stack(alike).sum((0, 2))


def _final_top(view: ModelView, trace: Trace, where: tuple[Tensor, ...], last: Tensor) -> Tensor:
    """Returns the model's top tokens, from its logits where the pass has left them.

    Raises:
        InvalidInput: If a logit is NaN or infinite.
        UnsupportedModel: If hooks edit the way from the last stream to the logits.
    """
    hooked, own = view.hooked(), None
    if trace.logits is not None:
        own = trace.logits[tuple(place.to(trace.logits.device) for place in where)]
    # Blocks that are not asked about are not looked at, and NaN would be the highest.
    said, padded = last.abs() if own is None else own, not bool(trace.batch.main.mask.all())
    require_predictions(said, padded=padded)
    # Logits in half precision tie; what they are compared with is read in more digits.
    if own is not None and not hooked and own.dtype == view.dtype:
        return own.argmax(dim=-1).to(last.device)
    whole = Unembedding(view.readout, "model")
    final = whole.scan(whole.hidden(last), sides=1).ids[:, 0, 0]
    if own is None:
        return final
    own = own.to(final.device, view.dtype)
    found = own.gather(-1, final[:, None])[:, 0]
    best = own.amax(dim=-1)
    # A tie may be broken otherwise; another token may not be the highest.
    if bool((best - found > view.tolerance * best.abs().clamp(min=1)).any()):
        raise UnsupportedModel(
            "memories would be read in another way than the model reads them",
            f"top tokens that are not the model's, with hooks of your own at {hooked}",
            "hooks inside the blocks",
            "Remove the hooks on the final norm or the unembedding.",
        )
    return final


def readings(view: ModelView, projection: object) -> tuple[Unembedding, Unembedding]:
    """Returns how states and how values are read, for a projection of the states.

    Raises:
        UnsupportedModel: If the model has no vocabulary readout.
        InvalidInput: If there is no such projection, or none of this model.
    """
    states = unembedding(view.readout, projection, ("model", "frozen", "none"))
    values_how = "none" if states.projection == "none" else None
    return states, unembedding(view.readout, values_how, ("none", "folded", "head"))


def cases(
    residual: Int[Tensor, "*some"], ffn: Int[Tensor, "*some"], output: Int[Tensor, "*some"]
) -> Int[Tensor, "*some"]:
    """Returns which of the five cases top tokens are, as indices into `CASES`."""
    by_residual, by_ffn, alike = residual == output, ffn == output, residual == ffn
    result = torch.full_like(output, CASES.index("composition"))
    each = {
        "residual": by_residual & ~by_ffn,
        "ffn": by_ffn & ~by_residual,
        "agreement": by_residual & by_ffn,
        "conflict": alike & ~by_residual,
    }
    for name, which in each.items():
        result.masked_fill_(which, CASES.index(name))
    return result
