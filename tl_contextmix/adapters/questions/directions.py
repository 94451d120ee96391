r"""Directions of the residual stream that a question may be about, instead of a token.

The score of a direction :math:`u` is :math:`\langle u, h \rangle`, or :math:`\langle u,
\mathrm{LN}(h) \rangle` where it is taken after a norm. That is the difference between two logits
of a vocabulary of two: the direction, and nothing. So it is read as a token with a foil is.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tl_contextmix.core.blocks import Block, Identity
from tl_contextmix.core.model_view import ModelView, Readout, select_blocks
from tl_contextmix.core.residual_stream import Stop
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.core.validation import require_choice, whole_number
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.results import Tokens

StreamPoint = Literal["resid_pre", "attn_in", "resid_mid", "mlp_in", "resid_post", "block_out"]


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction at a point of the residual stream, which ``target=`` takes instead of a token.

    Such as the weights of a probe, a column of an SAE's encoder, or a neuron's key; without their
    biases.

    Attributes:
        vector: Its numbers [d_model]; None for a neuron's key.
        layer: Number of the block; negative counts from the end.
        at: A point of that block. The stream itself: ``"resid_pre"``, ``"resid_mid"``,
            ``"resid_post"`` (in post-LN models before the norm of the sum, as `decompose` has
            them) or ``"block_out"``. What a sublayer reads, after its norm, gain and bias included:
            ``"attn_in"`` (hooks on that norm are not followed) or ``"mlp_in"``. None:
            ``"resid_post"``, or ``"mlp_in"`` for a key.
        neuron: The feed-forward neuron whose key it is (a column of W_in; gated: of W_gate).
        name: What results call it.

    Raises:
        InvalidInput: If it is not one vector or one neuron.

    Example:
        >>> import tl_contextmix as cm
        >>> model = cm.load_demo("causal-lm")
        >>> key = cm.Direction(layer=2, neuron=78)
        >>> heads = cm.log_prob_contributions(model, "the keys to the", target=key, by="head")
        >>> heads.asked()
        'the key of L2N78'
    """

    vector: Any = None
    _: KW_ONLY
    layer: int
    at: StreamPoint | None = None
    neuron: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        key = self.vector is None
        if key == (self.neuron is None) or (key and self.at not in (None, "mlp_in")):
            raise InvalidInput(
                "it is not clear which direction is meant",
                f"neuron={seen(self.neuron)}, at={self.at!r}, vector={seen(self.vector)}",
                "a vector, or a neuron at 'mlp_in'",
                "Give one of them; a key at another point is a vector.",
            )
        point = self.at or ("mlp_in" if key else "resid_post")
        require_choice("point", point, get_args(StreamPoint))
        object.__setattr__(self, "at", point)
        object.__setattr__(self, "vector", None if key else _numbers(self.vector))
        for name in ("layer", "neuron"):
            number = whole_number(getattr(self, name))
            if number is None and getattr(self, name) is not None:
                shown = seen(getattr(self, name))
                raise InvalidInput(f"this is no {name}", shown, "an integer", "Pass its number.")
            object.__setattr__(self, name, number)


def _numbers(vector: Any) -> Tensor:
    with suppress(TypeError, ValueError, RuntimeError):
        result = torch.as_tensor(vector).detach().clone()
        if result.ndim == 1 and result.is_floating_point() and bool(result.isfinite().all()):
            return result
    raise InvalidInput(
        "this is no direction",
        seen(vector),
        "finite real numbers [d_model]",
        "Give one vector; several directions are several questions.",
    )


@dataclass(frozen=True)
class Reading:
    """How a direction is read in a model.

    Attributes:
        name: What results call it.
        stop: Where the stream is read.
        readout: From the stream to the logits of the direction, and of nothing.
        needs: What has to hold of a pass that hooks edited.
    """

    name: str
    stop: Stop
    readout: Readout
    needs: frozenset[Identity]

    def label(self, count: int) -> Tokens:
        """Returns its name in place of so many tokens."""
        ids = torch.full((count, 1), -1)
        return Tokens(ids, ((self.name,),) * count, ids < 0, (("direction", 1),))


def read_direction(view: ModelView, direction: Direction) -> Reading:
    """Returns how a direction is read, in the stack that writes the answer.

    Raises:
        InvalidInput: If the model has no such layer, point or neuron, or another width.
    """
    (block,) = select_blocks(view.blocks(), direction.layer)
    ff, width = block.feed_forward, block.d_model
    vector, place = direction.vector, f"L{block.layer} {direction.at}"
    if direction.at == "mlp_in" and ff is None:
        raise _not_there(place, "a point of a block without a feed-forward sublayer")
    name = f"the direction at {place}"
    if vector is None:
        assert ff is not None
        ff.require_neurons()
        neuron, count = direction.neuron, ff.width
        if neuron is None or not 0 <= neuron < count:
            raise _not_there(f"neuron {neuron}", f"a number from 0 to {count - 1}")
        some = ff.select(torch.tensor([neuron], device=view.device))
        vector, name = some.branches()[0][0][:, 0], f"the key of L{block.layer}N{neuron}"
    if len(vector) != width:
        raise _not_there(f"a vector of {len(vector)} numbers", f"{width}, the model's d_model")
    name = f"{direction.name!r} at {place}" if direction.name else name
    stop, norm = _place(block, direction.at)
    vector = vector.to(view.device, view.dtype)
    two = torch.stack([vector, torch.zeros_like(vector)], dim=1)
    needs: frozenset[Identity] = frozenset({"read"} if direction.at == "mlp_in" else ())
    return Reading(name, stop, Readout(norm, None, {"W_U": two}.get), needs)


def _place(block: Block, at: StreamPoint | None) -> tuple[Stop, Norm | None]:
    """Returns where a point is, and the norm between it and the stream."""
    layer, ff = block.layer, block.feed_forward
    if at == "mlp_in" and ff is not None:
        return Stop.before(block, "mlp"), ff.norm_in
    if at in ("resid_pre", "attn_in"):
        return Stop(layer, 0), block.sublayers[0].norm_in if at == "attn_in" else None
    middle = len(block.attentions) + len(block.mixers) if block.mixers else 1
    written = middle if at == "resid_mid" else len(block.sublayers)
    return Stop(layer, written, normed=at == "block_out"), None


def _not_there(what: str, expected: str) -> InvalidInput:
    return InvalidInput(
        "the model has no such direction", what, expected, "Ask for one that it has."
    )
