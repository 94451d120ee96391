"""Gemma 4's per-layer embeddings, read as a sublayer, and the vectors that they are made of.

Every token has a vector for each layer: an embedding of its own, and a projection of what enters
the first block. The host's own module makes it anew of these two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.recognition import inner
from tl_contextmix.core.blocks import Block, EditPoints
from tl_contextmix.core.per_layer_embedding import PerLayerEmbedding
from tl_contextmix.core.token_sums import Norm

_NORM = "post_per_layer_input_norm"
_LAYERS = {"W_in": "per_layer_input_gate", "W_out": "per_layer_projection"}


def with_ending(
    block: Block, handle: Any, path: str, module: nn.Module, norm: Callable[[Any], Norm | None]
) -> Block:
    """Returns a reading with the sublayer of per-layer embeddings, where there is one."""
    if _LAYERS["W_out"] not in module._modules:
        return block

    def weights(name: str) -> Tensor | None:
        if name not in _LAYERS:
            return None  # its layers have no biases
        layer = inner(handle.get().get_submodule(f"{path}.{_LAYERS[name]}"))
        return handle.ready(layer.weight.T)

    ending = PerLayerEmbedding(
        pre=f"{path}.{_LAYERS['W_in']}.hook_out",
        post=f"{path}.{_LAYERS['W_out']}.hook_in",
        pre_linear=None,
        weights=weights,
        norm_out=norm(module._modules[_NORM]),
        edits=EditPoints(
            raw=(f"{path}.{_LAYERS['W_out']}.hook_out",), out=(f"{path}.{_NORM}.hook_out",)
        ),
        vector=f"{path}.per_layer_input",
    )
    ff = block.feed_forward
    ff = None if ff is None else replace(ff, edits=replace(ff.edits, stream=()))
    return replace(block, feed_forward=ff, ending=ending)


def vector_of(handle: Any, layer: int, ids: Tensor, entering: Tensor) -> Tensor:
    """Returns the vectors of a layer [batch pos neuron], by what enters the first block."""
    modules = handle.get().original_model.modules()
    own = next(one for one in modules if hasattr(one, "project_per_layer_inputs"))
    with torch.no_grad():
        embedded = own.get_per_layer_inputs(ids.to(entering.device), None)
        return own.project_per_layer_inputs(entering, embedded)[:, :, layer]
