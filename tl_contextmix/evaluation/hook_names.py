"""Which activations a method reads, as a names_filter of TransformerLens' caching run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import names_read
from tl_contextmix.core.validation import checked, require_choice
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import InvalidInput


@checked
def hook_names(model: object, method: Callable[..., Any] | str) -> list[str]:
    """Returns the names of the activations that a method reads, and of those it checks them by.

    A ``names_filter`` for TransformerLens' ``run_with_cache``, whose cache the method then takes:

    ``_, cache = model.run_with_cache(text, names_filter=hook_names(model, "alti"))``

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        method: Its name (``"value_zeroing"``), or the function, with ``functools.partial`` for
            options: ``partial(cm.attention_norms, layer=3)`` reads one layer.

    Returns:
        Names of hook points. A cache without those that it is checked by (heads, neurons and
        outputs of blocks) is taken as well; edits of hooks go unnoticed in it.

    Raises:
        InvalidInput: If there is no such method, it takes no cache, or it rejects its options.
        UnsupportedModel: If the model is not supported.

    Cost: no forward pass.
    """
    if isinstance(method, str):
        known = {name: one.function for name, one in methods().items() if one.on_text}
        require_choice("method", method, tuple(known))
        method = known[method]
    view = as_view(model)
    ids = torch.arange(2)[None] % view.d_vocab
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    if view.encode_decoder is not None:
        given["decoder_input"] = ids
    result = names_read(model, lambda cache: method(model, ids, cache=cache, **given))
    if result is None:
        raise InvalidInput(
            "there are no names to cache",
            f"a method that reads none: {getattr(method, '__name__', method)!r}",
            "a method that takes `cache`",
            "Call it without a cache.",
        )
    return result
