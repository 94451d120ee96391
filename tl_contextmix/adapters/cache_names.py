"""How each host keeps activations in an ActivationCache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.layouts import Layout
from tl_contextmix.adapters.recognition import Facts, token_embedding
from tl_contextmix.adapters.unseen import Unseen
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.model_view import CacheReader

# A bridge keeps an activation under its own name, under HookedTransformer's, or under both,
# depending on names_filter.
_OTHER_ENDINGS = {
    ".hook_in": ".hook_resid_pre",
    ".hook_out": ".hook_resid_post",
    ".hook_v": ".v.hook_out",
    ".hook_z": ".o.hook_in",
}
_POSITIONS = ("pos_embed.hook_out", "hook_pos_embed")
_SEGMENTS = ("token_type_embed.hook_out", "embed.hook_token_type_embed")
_BRIDGE = {"main": ("embed.hook_out",), "decoder": ("decoder_embed.hook_out",)}


def cache_reader(
    handle: Handle,
    facts: Facts,
    stacks: Mapping[str, tuple[Block, ...]],
    layouts: Mapping[str, Layout],
    unseen: Mapping[str, Unseen],
) -> CacheReader:
    """Returns what has to be known of a host's caches."""
    if facts.t5:
        # No position is added: the first block reads the embeddings themselves. The bridge has
        # no hook before that.
        embedded = {
            {"encoder": "main"}.get(stack, stack): (blocks[0].resid_in,)
            for stack, blocks in stacks.items()
        }
    elif facts.bridge:
        embedded = _BRIDGE
    else:
        # A bridge's hook_embed may be after the embeddings' norm; these are not.
        embedded = {"main": ("embed.hook_embed", "hook_embed")}
    embedded = {**embedded, "token_type_ids": _SEGMENTS}
    pos_embed = facts.model._modules.get("pos_embed") if facts.bridge else None
    table = getattr(pos_embed, "original_component", None)
    # An encoder-decoder takes no positions, and sinusoids are in no table.
    if getattr(table, "weight", None) is not None and len(stacks) == 1:
        embedded = {**embedded, "position_ids": _POSITIONS}
    padding = getattr(table, "padding_idx", None)
    return CacheReader(
        other_names=_other_names if facts.bridge else lambda name: (),
        embedded=embedded,
        # OPT's table has two rows before that of position 0.
        embedding=_embedding(handle, getattr(table, "offset", 0)),
        # RoBERTa counts from after its padding's.
        first_position=0 if padding is None else padding + 1,
        read=lambda name, value: layouts[name].read(value) if name in layouts else value,
        made={name: (one.sources, one.make) for name, one in unseen.items()},
    )


def _other_names(name: str) -> tuple[str, ...]:
    return tuple(
        name.removesuffix(ending) + other
        for ending, other in _OTHER_ENDINGS.items()
        if name.endswith(ending)
    )


def _embedding(handle: Handle, first: int) -> Callable[..., Tensor]:
    def embedding(ids: Tensor, name: str = "main") -> Tensor:
        model = handle.get()
        if name == "position_ids":
            weight, ids = model.pos_embed.original_component.weight, ids + first
        elif name != "token_type_ids":
            weight = token_embedding(model)
        elif handle.bridge:
            weight = model.token_type_embed.original_component.weight
        else:
            weight = model.embed.token_type_embed.W_token_type
        return weight.detach()[ids.to(weight.device)].to(torch.float32)

    return embedding
