"""Blocks of a bridge as formulas, read from one pass and checked against it.

Shared by :mod:`~transformer_lens.tools.analysis.value_zeroing`,
:mod:`~transformer_lens.tools.analysis.log_prob_contributions` and
:mod:`~transformer_lens.tools.analysis.decoder_lens`. A block is read as attention patterns, values
and weights, a feed-forward sublayer with an elementwise activation, and norms in one of the usual
places; a reading counts only if it reproduces the block's own output.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.tools.analysis._model_state import (
    compute_dtype,
    hybrid_block_types,
    require_eval_mode,
)

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.verification.probe import (
    Probe,
    relative_error,
    settle_block,
    tolerance_of,
)
from tl_contextmix.core.blocks import Batch, Block, Side, Trace


def open_bridge(model: Any, operation: str) -> tuple[Handle, float]:
    """Return what reads a bridge, and the largest relative error that counts as equal.

    Args:
        model: A ``TransformerBridge``.
        operation: Name of the tool, for messages.

    Raises:
        ValueError: If the model is in training mode.
        NotImplementedError: If it has state-space or linear-attention blocks.
    """
    require_eval_mode(model, operation=operation)
    # An encoder-decoder bridge has no `blocks` to ask for their types.
    hybrid = hybrid_block_types(model) if "blocks" in model._modules else []
    if hybrid:
        raise NotImplementedError(f"{operation} does not support block types {hybrid}")
    first = next(model.parameters())
    dtype = compute_dtype(first.dtype)
    handle = Handle(weakref.ref(model), "TransformerBridge", dtype, first.device)
    return handle, tolerance_of({weight.dtype for weight in model.parameters()}, first.device)


def read_pass(
    handle: Handle,
    readings: Sequence[Sequence[Block]],
    input: str | list[str] | torch.Tensor | None,
    cache: ActivationCache | None,
    attention_mask: torch.Tensor | None,
    decoder_input: torch.Tensor | None = None,
) -> Trace:
    """Run the model, or take the cache, and hold what it left behind by hook name.

    Args:
        handle: The model.
        readings: Possible readings of each block, one stack's.
        input: Prompts or token ids ``[batch, pos]``.
        cache: A cache of a pass, instead.
        attention_mask: 1 at real tokens ``[batch, pos]``.
        decoder_input: Decoder token ids ``[batch, pos]`` of an encoder-decoder.

    Raises:
        ValueError: If an argument is invalid, or the pass does not show what is needed.
    """
    model = handle.get()
    pair = "decoder_blocks" in model._modules
    names = _needed(readings)
    ids = None if input is None else _token_ids(model, input, pair)
    logits = None
    if cache is not None:
        held = cache
    else:
        if ids is None:
            raise ValueError("there is neither an input to run nor a cache to read")
        if pair and decoder_input is None:
            raise ValueError("an encoder-decoder bridge needs decoder_input, its decoder's ids")
        options = {"attention_mask": attention_mask, "decoder_input": decoder_input}
        options = {name: value for name, value in options.items() if value is not None}
        logits, held = model.run_with_cache(ids, names_filter=names, **options)
    missing = [name for name in names if name not in held]
    if missing:
        raise ValueError(
            f"the pass shows no {missing[0]} ({len(missing)} of {len(names)} activations are "
            "missing); use eager attention, and no names_filter for a cache of your own"
        )
    values = {name: held[name].to(handle.device) for name in names}
    if values[names[0]].ndim != 3:
        raise ValueError("a cache needs a batch dimension here")

    def side(name: str, mask: torch.Tensor | None) -> Side:
        pattern = values[next(n for n in names if name in n and n.endswith("hook_pattern"))]
        # Only the shape counts here: the pass is over.
        shape = (pattern.shape[0], pattern.shape[3])
        blank = torch.zeros(shape, dtype=torch.long, device=handle.device)
        if mask is not None and mask.shape != shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, the pass {shape}")
        whole = torch.ones_like(blank, dtype=torch.bool)
        return Side(blank, whole if mask is None else mask.to(blank.device).bool())

    # A decoder's own positions have no padding here; its cross-attention reads the encoder's.
    if not pair or not names[0].startswith("decoder_blocks"):
        batch = Batch(side(".attn.", attention_mask))
    else:
        batch = Batch(side(".cross_attn.", attention_mask), side(".self_attn.", None))
    return Trace(batch=batch, values=values, dtype=handle.dtype, logits=logits)


def settled(options: list[Block], trace: Trace, tolerance: float) -> tuple[Block, float]:
    """Return the reading of a block that reproduces its output in this pass, and its error.

    Args:
        options: Possible readings.
        trace: The pass.
        tolerance: Largest relative error that counts as equal.

    Raises:
        NotImplementedError: If none does.
    """

    def unmasked(side: Side | None) -> Side | None:
        return None if side is None else replace(side, mask=torch.ones_like(side.mask))

    main = unmasked(trace.batch.main)
    assert main is not None
    # The model computes rows of padding too, and they must be reproduced like all others.
    whole = replace(trace, batch=Batch(main, unmasked(trace.batch.decoder)))
    resid_out, path = options[0].resid_out, options[0].resid_out.rpartition(".")[0]
    for attention in options[0].attentions:
        shape = (trace[options[0].resid_in].shape[1], trace[attention.value].shape[1])
        if trace[attention.pattern].shape[2:] != shape:
            raise NotImplementedError(
                f"{attention.pattern} is no pattern over {shape[0]} targets and {shape[1]} "
                "sources: windowed attention is not supported"
            )
    try:
        block, _ = settle_block(options, Probe(whole, whole, tolerance), resid_out, None)
        error = relative_error(block.output(whole), whole[resid_out])
    except (RuntimeError, IndexError) as failure:
        raise NotImplementedError(f"{path} cannot be read: {failure}") from failure
    if block.feed_forward is not None and block.feed_forward.refusal:
        raise NotImplementedError(f"{path}: {block.feed_forward.refusal}")
    if not error <= tolerance:
        raise NotImplementedError(
            f"{path} is not reproduced: its recomputed output is off by {error:.3g} of the "
            f"largest entry (tolerance {tolerance:g})"
        )
    return block, error


def _needed(readings: Sequence[Sequence[Block]]) -> list[str]:
    """Hook names to cache: what blocks are recomputed from, and what they are compared with."""
    names: list[str] = []
    for options in readings:
        block = options[0]
        keys = [attention.key for attention in block.attentions if attention.kind == "cross"]
        names += [*block.points(), *block.checkpoints(), *keys]
    return list(dict.fromkeys(names))


def _token_ids(model: Any, input: str | list[str] | torch.Tensor, pair: bool) -> torch.Tensor:
    if isinstance(input, torch.Tensor):
        return input
    if pair:
        raise ValueError("an encoder-decoder bridge needs token ids as input")
    texts = [input] if isinstance(input, str) else input
    rows = [model.to_tokens(text)[0] for text in texts]
    if len({len(row) for row in rows}) != 1:
        raise ValueError("prompts differ in length; pass padded token ids and attention_mask")
    return torch.stack(rows)
