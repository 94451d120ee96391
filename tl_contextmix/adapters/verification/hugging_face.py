"""Compares a bridge with the Hugging Face model that it holds, run without the bridge's modules.

TransformerLens rewrites parts of some models (rotary embeddings, ALiBi, fused projections). Every
identity holds of what a bridge computes; that this is what the model computes is seen here alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.recognition import every_module, inner
from tl_contextmix.adapters.verification.identity_report import HUGGING_FACE, CheckRow
from tl_contextmix.adapters.verification.probe import Probe, relative_error
from tl_contextmix.core.blocks import Batch

# How bridges call what splits fused weights, and the modules that then hold the pieces.
_SPLITTERS = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}


def hugging_face_rows(model: Any, probe: Probe) -> Iterator[CheckRow]:
    """Yields the comparison of a bridge's logits with those of its Hugging Face model.

    Nothing where there is no such model, or where they differ as its weights are not the bridge's:
    weights that were processed or edited, where the bridge holds copies. Cost: a pass over the few
    tokens of the probe.
    """
    original: Any = getattr(model, "original_model", None)
    config = getattr(original, "config", None)
    if config is None or getattr(model, "_weights_processed", False):
        return
    own = probe.clean.logits
    assert own is not None
    finite = own.isfinite()
    if not bool(finite.any()):
        return  # what overflows has no logits to compare
    with _unwrapped(original):
        try:
            logits = original(**_arguments(probe.clean.batch, own.device)).logits.to(own)
        except (AttributeError, TypeError, ValueError):
            return  # it takes something besides ids
    error = float("inf")
    if torch.equal(finite, logits.isfinite()):
        error = relative_error(own[finite], logits[finite])
    row = CheckRow(HUGGING_FACE, type(original).__name__, error, probe.tolerance)
    if row.ok or _holds_its_weights(model, original):
        yield row


def _holds_its_weights(model: Any, original: nn.Module) -> bool:
    """Whether the pieces of fused weights that a bridge runs on are what those still hold."""
    fused = [  # in a bridge's own modules, which are among those that are put aside
        (module, splitter)
        for module in every_module(model)
        for splitter in _SPLITTERS
        if splitter in module.__dict__ or hasattr(type(module), splitter)
    ]
    # Pieces are put into new modules, which draw random numbers first.
    with _unwrapped(original), torch.random.fork_rng(range(torch.cuda.device_count())):
        return all(_as_split(*one) for one in fused)


def _arguments(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    result = {"input_ids": batch.main.ids.to(device)}
    if batch.decoder is not None:
        result["decoder_input_ids"] = batch.decoder.ids.to(device)
    return result


@contextmanager
def _unwrapped(model: nn.Module) -> Iterator[None]:
    """Puts a Hugging Face model's own modules back in their places for a while."""
    places: list[tuple[dict[str, Any], str, nn.Module]] = []

    def unwrap(module: nn.Module) -> None:
        for name, child in module._modules.items():
            if child is None:
                continue
            own = inner(child)
            if own is not child:
                places.append((module._modules, name, child))
                module._modules[name] = own
            unwrap(own)

    try:
        unwrap(model)
        yield
    finally:
        for own, name, child in reversed(places):
            own[name] = child


def _as_split(module: nn.Module, splitter: str) -> bool:
    """Whether the pieces of a module's fused weights are still what these hold."""
    split = getattr(module, splitter)
    if split is None:
        return True
    pieces = [inner(module._modules[name]) for name in _SPLITTERS[splitter]]
    for again, piece in zip(split(inner(module)), pieces, strict=True):
        for name, weight in again.named_parameters():
            held = getattr(piece, name)
            # Most are views of the fused weights, which need not be read.
            if not (weight.is_set_to(held) or torch.equal(weight, held)):
                return False
    return True
