"""Axes of activations that a host shows in another order than `core.blocks` reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tl_contextmix.adapters.attention_weights import is_latent
from tl_contextmix.adapters.handles import Handle
from tl_contextmix.core.blocks import AttentionSublayer, Block


@dataclass(frozen=True)
class Layout:
    """How an activation is turned into `core.blocks`' axes, and back.

    Attributes:
        read: From the host's axes.
        write: To the host's axes, given one that has them.
    """

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], Tensor]


def find_layouts(handle: Handle, stacks: Mapping[str, tuple[Block, ...]]) -> dict[str, Layout]:
    """Returns the layouts of a model's activations, by name; without those that are as read."""
    every = [block for blocks in stacks.values() for block in blocks]
    return {
        name: layout
        for block in every
        for attention in block.attentions
        for name, layout in _of_attention(handle, attention).items()
    }


def _of_attention(handle: Handle, attention: AttentionSublayer) -> dict[str, Layout]:
    module = handle.get().get_submodule(attention.pattern.rpartition(".")[0])
    if not is_latent(module):
        return {attention.query: _BESIDE_GATES} if attention.gate else {}
    # Queries, keys and values of latent attention are shown as [batch, head, pos, d_head]; z, whose
    # heads are as wide as values, is cut by the width of keys' rotary part, or not at all.
    swapped = Layout(lambda x: x.transpose(1, 2), lambda x, like: x.transpose(1, 2))
    heads = attention.W_O.shape[0]
    cut = Layout(
        lambda z: z.flatten(2).unflatten(2, (heads, -1)), lambda z, like: z.reshape(like.shape)
    )
    names = (attention.query, attention.key, attention.value)
    return {**dict.fromkeys(names, swapped), attention.mixed: cut}


def _put_beside_gates(x: Tensor, like: Tensor) -> Tensor:
    result = like.clone()
    result[:, :, ::2] = x
    return result


# Queries whose projection holds the gates, too, are shown with them: head, gate, head, gate.
_BESIDE_GATES = Layout(lambda x: x[:, :, ::2], _put_beside_gates)
