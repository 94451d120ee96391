"""The activations of a pass at the points of a block that probes and directions are about."""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import Block, Identity, Trace
from tl_contextmix.errors import InvalidInput

StatePoint = Literal[
    "resid_pre",
    "attn_in",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_out",
    "resid_post",
    "block_out",
]
POINTS: tuple[StatePoint, ...] = get_args(StatePoint)
# What has to hold of a pass that hooks edited.
_NEEDS: dict[StatePoint, frozenset[Identity]] = {
    "attn_out": frozenset({"attn"}),
    "resid_mid": frozenset({"attn"}),
    "mlp_in": frozenset({"attn", "read"}),
    "mlp_out": frozenset({"mlp"}),
    "resid_post": frozenset({"attn", "mlp"}),
}


def state_needs(points: tuple[StatePoint, ...]) -> frozenset[Identity]:
    """Returns what has to hold of a pass for its activations at some points."""
    return frozenset().union(*(_NEEDS.get(at, frozenset()) for at in points))


def state_at(block: Block, trace: Trace, at: StatePoint) -> Float[Tensor, "batch target d_model"]:
    """Returns the activation of a pass at a point of a block, see `Direction` and `decompose`.

    Args:
        block: The block.
        trace: A pass with what `core.residual_stream.needed` names.
        at: The point.

    Raises:
        InvalidInput: If the block has no feed-forward sublayer and the point is inside of one.
    """
    ff, first = block.feed_forward, block.attentions[0]
    if ff is None and at in ("mlp_in", "mlp_out"):
        raise InvalidInput(
            f"there is no {at} in layer {block.layer}",
            "a block without a feed-forward sublayer",
            "'resid_pre', 'attn_in', 'attn_out', 'resid_mid', 'resid_post' or 'block_out'",
            "Ask for one of these.",
        )
    if at == "resid_pre":
        return trace.resid_in(block)
    if at == "block_out":
        return trace[block.resid_out]
    if at == "attn_out":
        return first.output(trace)
    if at in ("resid_mid", "resid_post"):
        count = 1 if at == "resid_mid" else len(block.sublayers)
        return block.written(trace, count, normed=False)
    if at == "mlp_out" and ff is not None:
        return ff.output(trace)
    norm = first.norm_in if at == "attn_in" or ff is None else ff.norm_in
    read = trace.resid_in(block) if at == "attn_in" else block.feed_forward_input(trace)
    return read if norm is None else norm(read)
