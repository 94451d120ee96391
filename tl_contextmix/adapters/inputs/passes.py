"""One pass of the model over what was given, with the labels of its axes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tl_contextmix.adapters.inputs.activation_cache import trace_of
from tl_contextmix.adapters.inputs.tokens import Given, make_batch
from tl_contextmix.core.blocks import IDENTITIES, Batch, Block, Identity, Side, Trace
from tl_contextmix.core.model_view import ModelView, StackName
from tl_contextmix.core.validation import Layers
from tl_contextmix.errors import bad
from tl_contextmix.results import ContextMap, Provenance, Tokens
from tl_contextmix.results.axes import real_pairs


@dataclass(frozen=True)
class Pass:
    """A forward pass that happened, and what was asked of it.

    Attributes:
        view: The model.
        trace: What the pass left behind.
        stack: The stack that was asked for.
        blocks: The blocks that were asked for.
        tokens: Labels of each side: ``"encoder"`` and/or ``"decoder"``.
    """

    view: ModelView
    trace: Trace
    stack: StackName
    blocks: tuple[Block, ...]
    tokens: Mapping[str, Tokens]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that were asked for."""
        return tuple(block.layer for block in self.blocks)

    def progress(self, what: str) -> Iterator[Block]:
        """Yields the blocks, with a progress bar on a terminal once two seconds have passed."""
        # tqdm's own switches: silent where nobody looks, and until it has taken `delay` seconds.
        yield from tqdm(self.blocks, desc=what, unit="layer", delay=2, leave=False, disable=None)

    @property
    def target(self) -> Tokens:
        """Labels of the positions that are written."""
        return self.tokens[self.view.base_stack(self.stack)]

    def source(self, point: str) -> Tokens:
        """Returns the labels of the positions that are read, up to a point of the block.

        Past its cross-attention a decoder block has read its own tokens and the encoder's: the
        source axis is then both, the decoder's first.
        """
        if len(self.view.stacks) == 1 or self.stack == "encoder":
            return self.target
        if self.stack == "decoder" and point in ("attn_out", "resid_mid"):
            return self.tokens["decoder"]
        if self.stack == "cross" and point == "attn_out":
            return self.tokens["encoder"]
        return self.tokens["decoder"].cat(self.tokens["encoder"])

    def map(
        self,
        method: str,
        scores: Float[Tensor, "batch layer head target source"],
        at: str,
        unit: str,
        *,
        heads: Sequence[str] = ("all",),
        options: Mapping[str, Any] = MappingProxyType({}),
        **facts: Any,
    ) -> ContextMap:
        """Returns a method's map, labelled, with its padding at exactly zero.

        Args:
            method: Name of the method.
            scores: Its scores, of the blocks that were asked for.
            at: The point up to which sources were read, see `source`.
            unit: Of the scores.
            heads: Labels of the heads.
            options: What the method was asked for.
            **facts: Further fields of `ContextMap`, and those that differ.
        """
        source = self.source(at)
        real = real_pairs(self.target.mask, source.mask)
        if not bool(real.all()):
            scores = scores.masked_fill(~real.to(scores.device)[:, None, None], 0)
        if facts.get("bias") is not None:
            real_targets = self.target.mask.to(scores.device)
            facts["bias"] = facts["bias"] * real_targets[:, None, None]
        fields: dict[str, Any] = {
            "scores": scores,
            "layers": self.layers,
            "heads": tuple(heads),
            "point": at,
            "stack": self.stack,
            "target": self.target,
            "source": source,
            "unit": unit,
            "includes_residual": True,
            "provenance": self.provenance(method, options),
        }
        return ContextMap(**{**fields, **facts})

    def provenance(self, method: str, options: Mapping[str, Any], **given: str) -> Provenance:
        """Returns where the results of a method on this pass come from; see `provenance`."""
        return provenance(self.view, method, options, **given)


def provenance(
    view: ModelView, method: str, options: Mapping[str, Any], **given: str
) -> Provenance:
    """Returns where the results of a method on a model come from.

    Warns where the processing of the weights changes them.

    Args:
        view: The model.
        method: Name of the method.
        options: What it was asked for.
        given: What else decides whether processing matters; see `weight_processing.changed_by`.
    """
    if view.processing:
        view.notice(method, {**options, **given})
    return Provenance(
        method=method,
        options=dict(options),
        model=view.name,
        host=view.host,
        host_version=view.host_version,
        version=package_version(),
        processing=view.processing,
        fingerprint=view.fingerprint,
    )


@functools.cache
def package_version() -> str:
    """Returns the installed version of this package."""
    try:
        return version("tl-contextmix")
    except PackageNotFoundError:
        return "0+source"


def run_pass(
    view: ModelView,
    given: Given,
    *,
    layer: Layers | None = None,
    stack: StackName | None = None,
    also: Callable[[Block], Sequence[str]] | None = None,
    needs: Collection[Identity] = IDENTITIES,
) -> Pass:
    """Runs the model once over what was given (or takes the cache) and labels the axes.

    Hooks of the user's own stay on and are part of the pass.

    Args:
        view: The model.
        given: Input, masks and cache.
        layer: Layer or layers; None for all of the stack, negative from the end.
        stack: Which stack; None for the only one, or the decoder of an encoder-decoder.
        also: Names of further activations that the caller needs of each block.
        needs: What the caller needs to hold of each block where hooks edited the pass.

    Raises:
        InvalidInput: If something given does not fit the model, or the model's own activations
            are not finite.
        UnsupportedModel: If the user's hooks edit the pass so that this does not hold.
    """
    base = view.base_stack(stack)
    blocks = select_blocks(view.stacks[base], layer)
    batch = make_batch(view, given)
    names = [name for block in blocks for name in (*block.points(), *(also(block) if also else ()))]
    if given.cache is None:
        trace = fresh_trace(view, batch, base, blocks, names, needs)
    else:
        trace = trace_of(view, given.cache, batch, blocks, names)
        _require_finite(trace, base, blocks)
        trace = view.follow(trace, base, blocks, frozenset(needs), None)
    sides = {"decoder": batch.decoder, "encoder": batch.main}
    if batch.decoder is None:
        sides = {base: batch.main}
    tokens = {name: label(view, name, side) for name, side in sides.items() if side is not None}
    asked: Any = base if stack is None else stack
    return Pass(view=view, trace=trace, stack=asked, blocks=blocks, tokens=tokens)


def fresh_trace(
    view: ModelView,
    batch: Batch,
    stack: str,
    blocks: tuple[Block, ...],
    names: Sequence[str],
    needs: Collection[Identity] = IDENTITIES,
) -> Trace:
    """Runs the model on a batch, the user's own hooks included.

    Args:
        view: The model.
        batch: The tokens.
        stack: The stack that is asked about.
        blocks: Its blocks that are asked about.
        names: Activations to keep.
        needs: See `run_pass`.

    Raises:
        InvalidInput: If the model's own activations are not finite.
        UnsupportedModel: If the user's hooks edit the pass so that this does not hold.
    """
    hooked = view.hooked()
    more = [
        name for block in blocks for name in (block.checkpoints() if hooked else block.spared())
    ]
    trace = view.run(batch, [*names, *more], watch=bool(hooked))
    _require_finite(trace, stack, blocks)
    return view.follow(trace, stack, blocks, frozenset(needs), hooked) if hooked else trace


def _require_finite(trace: Trace, stack: str, blocks: tuple[Block, ...]) -> None:
    mask = trace.batch.side(stack).mask
    for block in blocks:
        for name in (block.resid_in, *(attention.mixed for attention in block.attentions)):
            value = trace.values.get(name)
            if value is None or bool(value[mask.to(value.device)].isfinite().all()):
                continue
            raise bad(
                "the model's own activations are not finite",
                f"NaN or infinity at a real token in {name}",
                "finite activations",
                "Load the model in float32 or bfloat16: float16 overflows in T5 and others, "
                "and in float64 some Hugging Face code makes NaN of padding. Look at hooks of "
                "your own, too.",
            )


def select_blocks(blocks: tuple[Block, ...], layer: Layers | None) -> tuple[Block, ...]:
    """Returns the blocks of the layers asked for, in the order asked.

    Raises:
        InvalidInput: If there is no such layer.
    """
    if layer is None:
        return blocks
    asked = [layer] if isinstance(layer, int) else [*layer]
    if not asked:
        raise bad(
            "no layer was asked for",
            "an empty list",
            "a layer or several",
            "Leave `layer` out for all of them.",
        )
    return tuple(blocks[_layer_number(number, len(blocks))] for number in asked)


def _layer_number(number: int, count: int) -> int:
    if not -count <= number < count:
        raise bad(
            "there is no such layer",
            repr(number),
            f"an integer from {-count} to {count - 1}",
            f"This stack has {count} layers; the first is 0.",
        )
    return number


def word_table(view: ModelView, *ids: Tensor) -> dict[str, str]:
    """Returns the text of every token that occurs, by its id as text (as files hold them)."""
    known = torch.cat([some.flatten().cpu() for some in ids]).unique().tolist()
    return {str(token): view.to_string(token) for token in known}


def label(view: ModelView, name: str, side: Side) -> Tokens:
    """Returns the labels of one side of a batch."""
    # Copies: the caller may write on what was given, or on a result.
    ids, mask = side.ids.cpu().clone(), side.mask.cpu().clone()
    # Each token is decoded once: long inputs repeat theirs.
    texts = {token: view.to_string(token) for token in ids.unique().tolist()}
    strings = tuple(tuple(texts[token] for token in row) for row in ids.tolist())
    return Tokens(ids=ids, strings=strings, mask=mask, sides=((name, ids.shape[1]),))
