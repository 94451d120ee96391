"""Reads blocks out of a TransformerLens model of any class and version.

Names that mean the same tensor on every host are few: residual in and out, pattern, values, z and
the feed-forward's neurons. Everything else (attention output, mid residual, norm outputs) differs
between HookedEncoder and TransformerBridge and between versions, and is recomputed instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tl_contextmix.adapters.attention_weights import (
    adapted,
    borrows,
    compression,
    is_latent,
    latent_scales,
)
from tl_contextmix.adapters.expert_reading import has_experts, read_experts
from tl_contextmix.adapters.handles import MERGE, Handle, attribute_of
from tl_contextmix.adapters.multipliers import with_multipliers
from tl_contextmix.adapters.norm_reading import block_norms, read_head_norm, read_norm
from tl_contextmix.adapters.per_layer_embeddings import with_ending
from tl_contextmix.adapters.recognition import MIXERS, inner
from tl_contextmix.adapters.unseen import EXPERTS_OUT, SUMMED
from tl_contextmix.core.blocks import (
    AttentionSublayer,
    Block,
    EditPoints,
    FeedForward,
    Mixer,
    ValueNorm,
    require_weight,
)
from tl_contextmix.core.opaque_feed_forward import OpaqueFeedForward
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.errors import UnsupportedModel, four_parts

# How each class names its lists of blocks, and the stack they are to us.
_STACKS = {
    "encoder": "encoder",
    "encoder_blocks": "encoder",
    "decoder": "decoder",
    "decoder_blocks": "decoder",
}
_ATTENTIONS = (("attn", "self"), ("self_attn", "self"), ("cross_attn", "cross"))
# About how many numbers a feed-forward module holds of each token as it computes, in d_model. The
# experts that a token is sent to have 4 (gpt-oss) to 7 (Mixtral) neurons for each in all.
_WORKING = 8


def block_lists(model: nn.Module, encoder_only: bool) -> dict[str, tuple[str, nn.ModuleList]]:
    """Returns prefix and blocks of every stack of a model.

    Raises:
        UnsupportedModel: If there is no list of blocks.
    """
    found = {
        stack: (name, module)
        for name, stack in {**_STACKS, "blocks": "encoder" if encoder_only else "decoder"}.items()
        if isinstance(module := model._modules.get(name), nn.ModuleList)
    }
    if not found:
        raise UnsupportedModel(
            "no transformer blocks can be found",
            f"a {type(model).__name__} with {sorted(model._modules)}",
            "a TransformerLens language model with its blocks in one or two lists",
            "Vision, audio and state-space models are not supported.",
        )
    return dict(sorted(found.items(), reverse=True))


def candidates(handle: Handle, stack: str, prefix: str, layer: int) -> Iterator[Block]:
    """Yields every reading of a block that its submodules allow.

    Which norm sits where is not said by any config field that can be trusted; the identity check
    keeps the reading that reproduces the block's own output.
    """
    block = handle.get()._modules[prefix][layer]
    path = f"{prefix}.{layer}"
    norms = block_norms(handle, block)
    attentions = [(name, kind) for name, kind in _ATTENTIONS if name in block._modules]
    mixers = [name for name in MIXERS if name in block._modules]
    names = [name for name, _ in attentions] or mixers
    edits = _edit_points(handle, path, names, block)
    bare = Block(
        layer=layer,
        resid_in=f"{path}.{'hook_in' if handle.bridge else 'hook_resid_pre'}",
        resid_out=f"{path}.{_resid_out(handle, block)}",
        attentions=tuple(
            replace(
                _attention(handle, stack, path, name, kind),
                edits=edits[name],
                window=_window(handle, layer) if kind == "self" else None,
            )
            for name, kind in attentions
        ),
        feed_forward=None,
        mixers=tuple(_mixer(handle, prefix, layer, name) for name in mixers),
    )
    like = torch.empty(0, device=handle.device, dtype=handle.dtype)
    for ff in _feed_forwards(handle, path, block, edits["mlp"]):
        for reading in _placements(replace(bare, feed_forward=ff), norms):
            if handle.bridge:
                reading = with_ending(
                    reading, handle, path, block, partial(read_norm, handle=handle)
                )
                reading = with_multipliers(reading, block, like)
            yield reading


def _mixer(handle: Handle, prefix: str, layer: int, name: str) -> Mixer:
    """Returns a sublayer that mixes tokens without attention weights."""
    blocks: Any = handle.get()._modules[prefix]
    module = blocks[layer]._modules[name]
    kind = type(getattr(module, "original_component", None) or module).__name__
    read = [n for n, one in enumerate(blocks) if {"attn", "self_attn"} & set(one._modules)]
    where = f"{prefix}.{layer}.{name}"
    # A rollout, a graph and what follows tokens through all layers has no use for some of them.
    alone = "of a method that looks at each layer alone (value_zeroing, attention_norms)"
    remedy = f"Ask for layer={read}, which have attention, {alone}"
    if layer in read:
        remedy = "Ask for at='attn_out', attention or value_zeroing, which are of attention alone"
    refusal = four_parts(
        f"what layer {layer} reads of each token is not known",
        f"a {kind} ({where}), which mixes tokens by recurrence or convolution",
        "attention alone",
        f"{remedy}; log-prob contributions and feed-forward memories are of all layers.",
    )
    return Mixer(f"{where}.hook_out", refusal, int(handle.get().cfg.d_model))


def with_placed_edits(block: Block) -> Block:
    """Returns a reading of a bridge's block that knows which hook points are on its stream.

    What a norm reads is the stream in a post-LN block. In others the stream goes past the norm, and
    an edit in front of it (a bridge's hook_resid_mid) is one of what the sublayer reads; there the
    block's output is the stream.
    """

    def placed(sublayer: Any) -> Any:
        post = sublayer.norm_after is not None
        names = (n for n in sublayer.edits.stream if n.endswith(".hook_out") is not post)
        return replace(sublayer, edits=replace(sublayer.edits, stream=tuple(names)))

    ff = None if block.feed_forward is None else placed(block.feed_forward)
    return replace(block, attentions=tuple(map(placed, block.attentions)), feed_forward=ff)


def _edit_points(
    handle: Handle, path: str, attentions: list[str], block: nn.Module
) -> dict[str, EditPoints]:
    """Returns where hooks may edit what each sublayer writes; see `with_placed_edits`."""
    mlp = _mlp_name(block)
    if not handle.bridge:
        cross = {"cross_attn": "_cross"}
        outs = {"cross_attn": ("hook_cross_attn_out",)}
        result = {
            name: EditPoints(
                out=_under(path, outs.get(name, ("hook_attn_out",))),
                stream=_under(path, (f"hook_resid_mid{cross.get(name, '')}",)),
            )
            for name in attentions
        }
        result["mlp"] = EditPoints(
            raw=_under(path, ("mlp.hook_out",)),
            out=_under(path, ("hook_mlp_out",)),
            stream=_under(path, ("hook_resid_post",)),
        )
    else:
        result = {
            name: EditPoints(
                raw=_under(path, (f"{name}.o.hook_out", f"{name}.hook_out")),
                out=_post_norm(path, block, index + 1),
                stream=_under(path, (f"ln{index + 1}.hook_in",)),
            )
            for index, name in enumerate(attentions)
        }
        result["mlp"] = EditPoints(
            raw=_under(path, (f"{mlp}.out.hook_out", f"{mlp}.hook_out")),
            out=_post_norm(path, block, len(attentions) + 1),
            stream=_under(path, (f"ln{len(attentions) + 1}.hook_in", "hook_out")),
        )
    if mlp not in block._modules and attentions:
        last = result[attentions[-1]]
        result[attentions[-1]] = replace(last, stream=last.stream + result["mlp"].stream)
    return result


def _post_norm(path: str, block: nn.Module, number: int) -> tuple[str, ...]:
    """Returns the hook point after the norm of a sublayer's output, where there is one."""
    name = f"ln{number}_post"
    return _under(path, (f"{name}.hook_out",)) if name in block._modules else ()


def _under(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in names)


def _resid_out(handle: Handle, block: nn.Module) -> str:
    if handle.bridge:
        return "hook_out"
    # HookedEncoder's hook_resid_post is the input of LN2, not the block's output.
    normalized = "hook_normalized_resid_post"
    return normalized if normalized in block._modules else "hook_resid_post"


def _placements(block: Block, norms: dict[str, Norm | None]) -> Iterator[Block]:
    count = len(block.attentions) or len(block.mixers)
    names = [f"ln{index + 1}" for index in range(count + 1)]
    ff = block.feed_forward
    if block.mixers:
        mixers = tuple(replace(mixer, norm_in=norms.get("ln1")) for mixer in block.mixers)
        block = replace(block, mixers=mixers)
    if "ln1_post" in norms:
        attentions = tuple(
            replace(attention, norm_in=norms.get(name), norm_out=norms.get(f"{name}_post"))
            for attention, name in zip(block.attentions, names, strict=False)
        )
        if ff is not None:
            name = names[count]
            ff = replace(ff, norm_in=norms.get(name), norm_out=norms.get(f"{name}_post"))
        yield replace(block, attentions=attentions, feed_forward=ff)
        return
    before = tuple(
        replace(attention, norm_in=norms.get(name))
        for attention, name in zip(block.attentions, names, strict=False)
    )
    last = norms.get(names[count])
    pre_ff = None if ff is None else replace(ff, norm_in=last)
    yield replace(block, attentions=before, feed_forward=pre_ff)
    if ff is not None and count == 1:
        # GPT-J and Falcon share one norm between the branches, Pythia has two.
        shared = norms.get("ln1") if names[count] not in norms else last
        both = replace(ff, norm_in=shared)
        yield replace(block, attentions=before, feed_forward=both, parallel=True)
    if any(norm is not None for norm in norms.values()) and not block.mixers:
        after = tuple(
            replace(attention, norm_after=norms.get(name))
            for attention, name in zip(block.attentions, names[:count], strict=True)
        )
        post_ff = None if ff is None else replace(ff, norm_after=last)
        yield replace(block, attentions=after, feed_forward=post_ff)


def _attention(handle: Handle, stack: str, path: str, name: str, kind: Any) -> AttentionSublayer:
    here = f"{path}.{name}"
    weights, module = handle.weights(here), handle.get().get_submodule(here)
    lender = _lender(handle, path, name) if borrows(module) else here
    normed = "v_norm" in handle.get().get_submodule(lender)._modules

    def width() -> int:
        return require_weight(weights, "W_O").shape[1]

    return AttentionSublayer(
        stack=stack,
        kind=kind,
        pattern=f"{here}.hook_pattern",
        value=f"{lender}.v_norm.hook_out" if normed else f"{lender}.hook_v",
        mixed=f"{here}.hook_z",
        key=f"{lender}.hook_k",
        weights=weights,
        value_norm=_value_norm(handle, here),
        gate=f"{here}.hook_q_gate" if "hook_q_gate" in module._modules else "",
        sink_scores="" if weights("sinks") is None else f"{here}.hook_attn_scores",
        lender=None if lender == here else int(lender.split(".")[1]),
        query=f"{here}.hook_q",
        scores=f"{here}.hook_attn_scores" if "hook_attn_scores" in module._modules else "",
        soft_cap=_soft_cap(handle, module),
        scale=getattr(inner(module), "scaling", None) if kind == "cross" else None,
        query_norm=read_head_norm(module, "q", width, handle.dtype),
        key_norm=read_head_norm(module, "k", width, handle.dtype),
        divisors=_divisors(handle, here) if is_latent(module) else None,
    )


def _lender(handle: Handle, path: str, name: str) -> str:
    """Returns the attention whose keys and values a later one of the same kind uses, too."""
    prefix, _, layer = path.rpartition(".")
    blocks: Any = handle.get().get_submodule(prefix)

    *before, own = [inner(block._modules[name]) for block in blocks[: int(layer) + 1]]
    lent = (
        index
        for index, one in reversed([*enumerate(before)])
        if one.store_full_length_kv and one.layer_type == own.layer_type
    )
    return f"{prefix}.{next(lent)}.{name}"


def _divisors(
    handle: Handle, path: str
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Returns what divides queries and keys of latent attention."""

    def scale(x: Tensor, name: str) -> Tensor:
        return latent_scales(handle.get().get_submodule(path), x, name, handle.ready)

    return partial(scale, name="Q"), partial(scale, name="K")


def _soft_cap(handle: Handle, module: Any) -> float | None:
    """Returns the soft cap of the scores of an attention module, or None."""
    if not handle.bridge:
        cap = float(getattr(handle.get().cfg, "attn_scores_soft_cap", 0.0) or 0.0)
        return cap if cap > 0 else None
    return getattr(module.original_component, "attn_logit_softcapping", None)


def _value_norm(handle: Handle, path: str) -> ValueNorm | None:
    """Returns the norm between W_V and values (latent attention, Gemma 4), or None."""
    module = handle.get().get_submodule(path)
    if "v_norm" in module._modules:
        read, eps = handle.weights(path), float(module.v_norm.original_component.eps)
        each = Norm(kind="rms", weight=None, bias=None, eps=eps)
        return ValueNorm(lambda x: torch.einsum("...m,hmd->...hd", x, read("W_V")), each)
    if not is_latent(module):
        return None

    def latent(x: Tensor) -> Tensor:
        module = handle.get().get_submodule(path)
        return functional.linear(x, *map(handle.ready, compression(module)))[..., None, :]

    norm = read_norm(handle.get().get_submodule(f"{path}.kv_a_layernorm"), handle)
    assert norm is not None
    return ValueNorm(latent, norm)


def _window(handle: Handle, layer: int) -> int | None:
    """Returns how many tokens a layer's self-attention reads, where a sliding window limits it.

    Estimates alone rest on it: patterns are the model's own.
    """
    model = handle.get()
    if handle.bridge:
        config = getattr(getattr(model, "original_model", None), "config", None)
        kinds = getattr(config, "layer_types", None)
        slides = kinds is None or kinds[layer] == "sliding_attention"
        return getattr(config, "sliding_window", None) if slides else None
    kinds = getattr(model.cfg, "attn_types", None)
    slides = getattr(model.cfg, "use_local_attn", False) and kinds and kinds[layer] == "local"
    return model.cfg.window_size if slides else None


def _mlp_name(block: nn.Module) -> str:
    """Returns what a block calls its feed-forward module; Granite has names of its own."""
    others = ("moe", "shared_mlp", "block_sparse_moe")
    return next((name for name in others if name in block._modules), "mlp")


def _feed_forwards(
    handle: Handle, path: str, block: nn.Module, edits: EditPoints
) -> Iterator[FeedForward | None]:
    """Yields what the feed-forward sublayer may be: None for nothing, else opaque at the last."""
    name = _mlp_name(block)
    mlp = block._modules.get(name)
    if mlp is None:
        yield None
        return
    here = f"{path}.{name}"
    # Granite 4 adds a layer that every token goes through to its experts in the block itself.
    added_path = f"{path}.{SUMMED[1]}" if {*SUMMED} <= set(block._modules) else ""
    written = f"{path}.{EXPERTS_OUT}" if added_path else ""
    if added_path:
        names = (f"{name}.hook_out", *(f"{SUMMED[1]}.{leaf}hook_out" for leaf in ("out.", "")))
        edits = replace(edits, raw=_under(path, names))
    opaque = _opaque(handle, path, here, edits, added_path, written)
    if attribute_of(mlp, "W_in") is not None:
        yield _neurons(handle, here, mlp, edits)
    elif has_experts(mlp):
        experts = read_experts(handle, here, edits, opaque.module, added_path)
        if experts is not None and written:
            experts = replace(experts, written=written, edited=experts.written)
        if experts is not None:
            yield experts
    else:
        # circuit-tracer puts a module of its own around it, with more hook points.
        inner = [
            name for name, one in mlp.named_children() if attribute_of(one, "W_in") is not None
        ]
        if len(inner) == 1:
            there = f"{here}.{inner[0]}"
            raw = (f"{there}.hook_out", *edits.raw)
            yield _neurons(handle, there, mlp.get_submodule(inner[0]), replace(edits, raw=raw))
    yield opaque


def _neurons(handle: Handle, here: str, mlp: nn.Module, edits: EditPoints) -> FeedForward:
    """Returns a feed-forward sublayer with neurons."""
    gated = attribute_of(mlp, "W_gate") is not None
    after: dict[str, str | None] = {"b_post": None}
    if gated and not handle.bridge:
        # HookedTransformer's gated block adds b_in after the product of its branches.
        after = {"b_post": "b_in", "b_in": None}
    return FeedForward(
        pre=f"{here}.hook_pre",
        post=f"{here}.hook_post",
        pre_linear=f"{here}.hook_pre_linear" if gated else None,
        weights=handle.weights(here, after),
        edits=edits,
    )


def _opaque(
    handle: Handle, path: str, here: str, edits: EditPoints, added_path: str, written: str
) -> OpaqueFeedForward:
    """Returns a feed-forward sublayer as one component, which does not need its weights.

    The output of the module at ``added_path`` is added to its own, and ``written`` names the sum.
    """

    def call(place: str, x: Tensor) -> Tensor:
        model = handle.get()
        like = next(model.parameters())
        with torch.no_grad():
            found = model.get_submodule(place)(x.to(like.device, like.dtype))
        return handle.ready(found[0] if isinstance(found, tuple) else found)

    def module(x: Tensor) -> Tensor:
        return call(here, x) + call(added_path, x) if added_path else call(here, x)

    held = handle.get().get_submodule(here)
    kind, merge = type(held).__name__, ""
    if any(map(adapted, held._modules.values())):
        kind, merge = f"{kind} with adapters that are not merged (PEFT)", f"{MERGE} "
    out = written or (f"{here}.hook_out" if handle.bridge else f"{path}.hook_mlp_out")
    return OpaqueFeedForward(
        pre=out,
        post=out,
        pre_linear=None,
        weights=lambda name: None,
        refusal=four_parts(
            "the feed-forward block is not taken apart into neurons",
            f"a {kind} at {here}",
            "one dense feed-forward layer, with W_in and W_out",
            f"{merge}Ask for 'attn_out', 'resid_mid' or 'mlp_in'; Value Zeroing, gradients and "
            "log_prob_contributions by layer, head or position do not need the neurons either.",
        ),
        # What hooks make of its output is what it puts out.
        edits=EditPoints(stream=edits.stream),
        module=module,
        working=_WORKING * int(handle.get().cfg.d_model),
    )
