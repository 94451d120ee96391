r"""Value zeroing.

`Value zeroing <https://aclanthology.org/2023.eacl-main.245>`_ (Mohebbi, Zuidema, Chrupala,
Alishahi 2023) asks how much of each token's new representation comes from each other token: the
value vector of one source is set to zero in an attention sublayer, keys and queries as they were,
and the distance by which every target's block output moves is that source's score,

.. math:: C_{ij} = d(\tilde x_i^{\neg j}, \tilde x_i).

Unlike an attention pattern it includes values, the output projection, the residual connection,
normalization and the feed-forward sublayer.

:func:`value_zeroing` is exact and needs one forward pass, not one per source: a zeroed value
changes the sublayer's output by a term that is known, and the rest of the block is recomputed from
it in tiles that fit ``max_bytes``.

Example::

    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.value_zeroing import value_zeroing

    model = TransformerBridge.boot_transformers("gpt2", device="cpu")
    result = value_zeroing(model, "The keys to the cabinet are")
    for label, batch, target, source, score in result.top(5):
        print(f"{label:>6}: position {target} reads {source} ({score:.3f})")
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Float
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.tools.analysis._model_state import (
    compute_dtype,
    hybrid_block_types,
    require_eval_mode,
    require_int,
)

from tl_contextmix.adapters.reading import Handle, block_lists, candidates, final_norms
from tl_contextmix.adapters.verification.probe import (
    Probe,
    relative_error,
    settle_block,
    tolerance_of,
)
from tl_contextmix.core.blocks import Batch, Block, Side, Trace
from tl_contextmix.core.model_view import StackName
from tl_contextmix.methods.value_zeroing import Metric, _How

_METRICS, _STACK_NAMES = get_args(Metric), get_args(StackName)


@dataclass(frozen=True)
class ValueZeroingResult:
    """Result of :func:`value_zeroing`.

    Attributes:
        scores: Distances, ``[component, batch, target, source]``. Zero where nothing is read and
            at padding.
        labels: Name of each component: ``"L3"`` for all heads of a layer, ``"L3H1"`` for one.
        metric: ``"cosine"`` or ``"euclidean"``.
        stack: Whose attention was zeroed.
        identity_error: Largest relative error of the recomputed block outputs against the model's.
    """

    scores: Float[torch.Tensor, "component batch target source"]
    labels: list[str]
    metric: str
    stack: str
    identity_error: float

    def normalized(self) -> Float[torch.Tensor, "component batch target source"]:
        """Scores with each target's row divided by its sum, as in the paper; empty rows stay 0."""
        total = self.scores.sum(dim=-1, keepdim=True)
        return self.scores / torch.where(total == 0, torch.ones_like(total), total)

    def top(
        self, k: int = 5, *, include_self: bool = False
    ) -> list[tuple[str, int, int, int, float]]:
        """Return the ``k`` highest ``(label, batch, target, source, score)``.

        Args:
            k: How many.
            include_self: Whether a position's own value counts; only other positions otherwise.
        """
        k = require_int(k, "k")
        scores = self.scores
        if not include_self and self.stack != "cross":
            own = torch.eye(*scores.shape[2:], dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(own, -1)
        values, places = scores.flatten().topk(min(k, scores.numel()))
        found = []
        for value, place in zip(values.tolist(), places, strict=True):
            component, batch, target, source = (
                int(index) for index in torch.unravel_index(place, scores.shape)
            )
            if value >= 0:
                found.append((self.labels[component], batch, target, source, value))
        return found

    def to_dataframe(self) -> Any:
        """One row per (component, batch, target, source) as a pandas DataFrame."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.labels, *(range(n) for n in self.scores.shape[1:])],
            names=["component", "batch", "target", "source"],
        )
        values = self.scores.flatten().detach().cpu().numpy()
        return pd.DataFrame({"score": values}, index=index).reset_index()


@torch.no_grad()
def value_zeroing(
    model: Any,
    input: str | list[str] | torch.Tensor | None = None,
    *,
    cache: ActivationCache | None = None,
    attention_mask: torch.Tensor | None = None,
    decoder_input: torch.Tensor | None = None,
    stack: StackName | None = None,
    layers: Sequence[int] | None = None,
    per_head: bool = False,
    metric: Metric = "cosine",
    final_norm: bool = True,
    max_bytes: int = 2**30,
) -> ValueZeroingResult:
    """Distance by which each block's output moves when one source's value is zeroed.

    The model is run once with caching unless a ``cache`` is passed. Before anything is returned,
    each block is recomputed from its input, attention patterns, values and weights, and compared
    with the output the model computed; a block that differs is refused by name.

    Args:
        model: A ``TransformerBridge`` in eval mode with attention patterns (eager attention).
        input: A prompt, prompts of the same number of tokens, or token ids ``[batch, pos]``.
            Encoder-decoder bridges take token ids. Optional when ``cache`` is given.
        cache: A cache of a pass, instead of a run.
        attention_mask: 1 at real tokens and 0 at padding, ``[batch, pos]``; of the encoder where
            there are two stacks.
        decoder_input: Decoder token ids ``[batch, pos]`` of an encoder-decoder.
        stack: ``"encoder"`` or ``"decoder"`` self-attention, or ``"cross"``-attention, whose
            sources are encoder positions; ``None`` for the only stack, or the decoder.
        layers: Layers, negative ones from the end; ``None`` for all.
        per_head: Whether each head is zeroed alone (one component per head) or all together.
        metric: ``"cosine"`` distance (computed without cancellation) or ``"euclidean"``.
        final_norm: Whether the last layer is compared behind the model's final norm.
        max_bytes: Bound on the workspace beside the pass and the result.

    Returns:
        A :class:`ValueZeroingResult` with ``scores`` ``[component, batch, target, source]``.

    Raises:
        ValueError: If an argument is invalid, neither or an incomplete ``input`` or ``cache`` is
            given, or the model is in training mode.
        NotImplementedError: If the blocks are not attention with values per head and a dense
            elementwise feed-forward sublayer (hybrid, state-space, mixture-of-experts), or are not
            reproduced.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {_METRICS}, got {metric!r}")
    if stack is not None and stack not in _STACK_NAMES:
        raise ValueError(f"stack must be one of {_STACK_NAMES} or None, got {stack!r}")
    max_bytes = require_int(max_bytes, "max_bytes")
    require_eval_mode(model, operation="value_zeroing")
    # An encoder-decoder bridge has no `blocks` to ask for their types.
    hybrid = hybrid_block_types(model) if "blocks" in model._modules else []
    if hybrid:
        raise NotImplementedError(f"value_zeroing does not support block types {hybrid}")
    first = next(model.parameters())
    handle = Handle(
        weakref.ref(model), "TransformerBridge", compute_dtype(first.dtype), first.device
    )
    lists = block_lists(model, encoder_only=False)
    stack = stack or "decoder"
    if stack != "decoder" and len(lists) == 1:
        raise ValueError(f"stack={stack!r} needs an encoder-decoder; this model has one stack")
    base = "decoder" if stack == "cross" else stack
    kind = "cross" if stack == "cross" else "self"
    prefix, modules = lists[base]
    readings = [
        list(candidates(handle, base, prefix, layer))
        for layer in _layer_numbers(layers, len(modules))
    ]
    names = _needed(readings)
    trace = _trace(model, handle, input, cache, attention_mask, decoder_input, names)
    tolerance = tolerance_of({weight.dtype for weight in model.parameters()}, first.device)
    norm = final_norms(handle).get(base) if final_norm else None
    scores: list[torch.Tensor] = []
    labels: list[str] = []
    worst = 0.0
    for options in readings:
        block, error = _settled(options, trace, tolerance)
        worst = max(worst, error)
        heads = block.attentions[0].W_O.shape[0]
        groups: list[list[int] | None] = [[h] for h in range(heads)] if per_head else [None]
        last = norm if block.layer == len(modules) - 1 else None
        how = _How(kind, None, groups, None, metric, last, max_bytes)
        scores += how.scores(block, trace).unbind(1)
        name = f"L{block.layer}"
        labels += [f"{name}H{head}" for head in range(heads)] if per_head else [name]
    target = trace.batch.side(base).mask
    source = trace.batch.side("encoder" if stack == "cross" else base).mask
    real = (target[:, :, None] & source[:, None, :]).to(first.device)
    found = torch.stack(scores).masked_fill(~real, 0)
    return ValueZeroingResult(found, labels, metric, stack if len(lists) == 2 else "self", worst)


def _layer_numbers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if len(layers) == 0:
        raise ValueError("layers must name at least one layer")
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise ValueError(f"layers {wrong} are out of range for a stack of {count} layers")
    return [layer % count for layer in layers]


def _needed(readings: Sequence[Sequence[Block]]) -> list[str]:
    """Hook names to cache: what blocks are recomputed from, and what they are compared with."""
    names: list[str] = []
    for options in readings:
        block = options[0]
        keys = [attention.key for attention in block.attentions if attention.kind == "cross"]
        names += [*block.points(), *block.checkpoints(), *keys]
    return list(dict.fromkeys(names))


def _trace(
    model: Any,
    handle: Handle,
    input: str | list[str] | torch.Tensor | None,
    cache: ActivationCache | None,
    attention_mask: torch.Tensor | None,
    decoder_input: torch.Tensor | None,
    names: list[str],
) -> Trace:
    """Run the model, or take the cache, and hold what it left behind by hook name."""
    pair = "decoder_blocks" in model._modules
    ids = None if input is None else _token_ids(model, input, pair)
    if cache is not None:
        held = cache
    else:
        if ids is None:
            raise ValueError("value_zeroing needs an input to run or a cache to read")
        if pair and decoder_input is None:
            raise ValueError("an encoder-decoder bridge needs decoder_input, its decoder's ids")
        options = {"attention_mask": attention_mask, "decoder_input": decoder_input}
        options = {name: value for name, value in options.items() if value is not None}
        _, held = model.run_with_cache(ids, names_filter=names, **options)
    missing = [name for name in names if name not in held]
    if missing:
        raise ValueError(
            f"the pass shows no {missing[0]} ({len(missing)} of {len(names)} activations are "
            "missing); use eager attention, and no names_filter for a cache of your own"
        )
    values = {name: held[name].to(handle.device) for name in names}
    if values[names[0]].ndim != 3:
        raise ValueError("value_zeroing needs a cache with a batch dimension")

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
    return Trace(batch=batch, values=values, dtype=handle.dtype)


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


def _settled(options: list[Block], trace: Trace, tolerance: float) -> tuple[Block, float]:
    """The reading of a block that reproduces its output in this pass, and its error."""

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
        block = settle_block(options, Probe(whole, whole, tolerance), resid_out, None)
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
