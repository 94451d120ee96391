"""Passes of Hugging Face models of sound: their activations at the modules that make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tl_contextmix.adapters.recognition import changed
from tl_contextmix.adapters.running import hooked_places, require_no_autocast, require_no_dropout
from tl_contextmix.adapters.unbridged import Place, keeping
from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.model_view import Hooks, PassOutput
from tl_contextmix.errors import UnsupportedModel

_PROBE_SAMPLES = 6400


def stacks_of(model: Any) -> dict[str, Any]:
    """Returns the modules that hold the blocks of each stack."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", model)
    found = {side: getattr(base, side, None) for side in ("encoder", "decoder")}
    lists = {side: getattr(module, "layers", None) for side, module in found.items()}
    return {
        side: found[side]
        for side, layers in lists.items()
        if isinstance(layers, nn.ModuleList) and len(layers)
    }


def head_of(model: Any) -> Any:
    """Returns what makes logits of the last states: an unembedding or a CTC head; None without."""
    if "decoder" in stacks_of(model):
        return model.get_output_embeddings()
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", model)
    joined = getattr(base, "adapter", None) is not None  # frames after it are fewer
    return None if joined else getattr(model, "lm_head", None)


def run_speech(
    host: Any,
    d_vocab: int,
    points: Mapping[str, tuple[str, str, str]],
    batch: Batch,
    hooks: Hooks,
    grad: bool,
    watch: bool,
    logits: bool = True,
) -> PassOutput:
    """Runs a model of sound once, see `ModelView.run`; a pass always goes to its end.

    Args:
        host: Holds the model as ``original_model``.
        d_vocab: The id of the first frame.
        points: By name of an activation: the stack, the module's path in it, and whether it is what
            goes into the module, what comes out, either by head, or an attention pattern.
        batch: The frames, what is heard, and the decoder's tokens.
        hooks: Names of activations, and what edits them.
        grad: Whether gradients are asked for, which are refused.
        watch: Without a meaning: models with hooks are refused.
        logits: Without a meaning.
    """
    del watch, logits
    model = host.original_model
    require_no_dropout(model)
    device = next(model.parameters()).device
    require_no_autocast(device)
    _require_plain(model, batch, d_vocab, grad)
    places, stacks = {}, stacks_of(model)
    for name, edit in hooks:
        side, path, kind = points[name]
        if kind == "pattern" and edit is not None:
            raise refused("an attention pattern", "edited")
        by_head, kind = kind.startswith("heads"), kind.removeprefix("heads ")
        parent = stacks[side].get_submodule(path.rpartition(".")[0])
        heads = int(parent.num_heads) if by_head else 0
        places[name] = Place(stacks[side].get_submodule(path), kind, heads, edit)
    # Fused kernels do not show patterns.
    eager = changed(model.config, "_attn_implementation", "eager")
    with keeping(model, places) as kept, eager:
        output = model(**_arguments(model, batch, device))
    return None if head_of(model) is None else output.logits, kept, {}


def _arguments(model: Any, batch: Batch, device: torch.device) -> dict[str, Any]:
    name = model.main_input_name
    sound = batch.further.get(name)
    if sound is None:  # probes look at how the model computes, whatever it hears
        config, rows = model.config, len(batch.main.ids)
        shape = (rows, _PROBE_SAMPLES)
        if name == "input_features":
            shape = (rows, config.num_mel_bins, 2 * config.max_source_positions)
        sound = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = {name: sound.to(device, next(model.parameters()).dtype)}
    if batch.decoder is not None:
        result |= {"decoder_input_ids": batch.decoder.ids.to(device), "use_cache": False}
    return result


def _require_plain(model: Any, batch: Batch, d_vocab: int, grad: bool) -> None:
    """Checks that a pass is over what is heard, as it is heard."""
    if grad:
        raise refused("gradients", "taken through sound")
    if hooked_places(model):
        raise refused("hooks on a Hugging Face model", "followed")
    expected = d_vocab + torch.arange(batch.main.ids.shape[1])
    if model.main_input_name in batch.further and not torch.equal(
        batch.main.ids.cpu(), expected.expand(batch.main.ids.shape)
    ):
        raise refused("frames of sound", "replaced or left out")


def refused(what: str, verb: str) -> UnsupportedModel:
    """Returns the refusal of what a model of sound does not answer."""
    return UnsupportedModel(
        f"{what} cannot be {verb}",
        "a model of sound",
        "a model of text",
        "Value Zeroing, norms, attention, decompositions and memories are answered.",
    )
