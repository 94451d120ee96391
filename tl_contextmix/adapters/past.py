"""Keys and values of earlier positions, kept by the host, so that later ones run without them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from tl_contextmix.adapters.handles import Handle

Past = Callable[[int], Mapping[str, Any]]


def make_past(handle: Handle) -> Callable[[int], Past] | None:
    """Returns the function that begins to keep the keys and values of a number of rows.

    What it returns gives arguments of the model's own forward. With 0: those of a pass whose keys
    and values are to be kept. With more: those of a pass over as many copies of the rows, one after
    the other, which read what was kept and change nothing of it.

    None for classes that keep nothing.
    """
    if handle.bridge:
        return _begin_in_bridge
    if handle.host == "HookedTransformer":
        return lambda rows: _begin_in_hooked(handle, rows)
    return None


def _begin_in_bridge(rows: int) -> Past:
    from transformers import DynamicCache

    # Not told what the model is: layers with a sliding window would drop the keys outside of it,
    # and their patterns would lack columns.
    cache: Any = DynamicCache()

    def past(copies: int) -> Mapping[str, Any]:
        read = cache
        if copies:
            read = copy.deepcopy(cache)
            for layer in read.layers:
                layer.keys, layer.values = (_times(copies, x) for x in (layer.keys, layer.values))
        return {"past_key_values": read, "use_cache": True}

    return past


def _begin_in_hooked(handle: Handle, rows: int) -> Past:
    try:
        own = import_module("transformer_lens.cache.key_value_cache").TransformerLensKeyValueCache
    except ImportError:  # 2.x
        own = import_module("transformer_lens").HookedTransformerKeyValueCache
    cache = own.init_cache(handle.get().cfg, handle.device, rows)

    def past(copies: int) -> Mapping[str, Any]:
        read = cache
        if copies:
            read = copy.deepcopy(cache)
            read.previous_attention_mask = _times(copies, read.previous_attention_mask)
            for one in read.entries:
                one.past_keys, one.past_values = (
                    _times(copies, x) for x in (one.past_keys, one.past_values)
                )
        return {"past_kv_cache": read}

    return past


def _times(copies: int, x: Tensor) -> Tensor:
    """Returns copies of all rows, one after the other; of a single row without copying it."""
    return x[None].expand(copies, *x.shape).flatten(0, 1)


def empty_cache() -> Any:
    """Returns an empty cache of a decoder's keys and values."""
    from transformers import DynamicCache, EncoderDecoderCache

    # Without sizes: transformers 5.23 counts the encoder's layers for the decoder's cache.
    return EncoderDecoderCache(DynamicCache(), DynamicCache())
