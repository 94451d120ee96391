"""TransformerLens' model for LIT (the Learning Interpretability Tool) with more fields.

LIT is optional, and TransformerLens' wrapper is a class of LIT's only where LIT is installed, so
that ours is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch

from tl_contextmix.errors import ContextMixError


def lit_wrapper(
    model: Any,
    fields: Mapping[str, bool],
    compute: Callable[[torch.Tensor], Mapping[str, Any]],
    config: Any = None,
) -> Any:
    """Returns TransformerLens' LIT model of a model, with more fields.

    Args:
        model: A model of TransformerLens 3 or 4, or a HookedTransformer of 2.18.
        fields: Name of each field, and whether its numbers, one for each token, have signs.
        compute: Takes token ids ``[1, pos]``, as TransformerLens' wrapper has them, and returns the
            numbers ``[pos]`` of all fields.
        config: Of TransformerLens' wrapper; None for its defaults.

    Raises:
        ContextMixError: If LIT is not installed.
    """
    wrapper = import_module("transformer_lens.lit")
    if not wrapper.check_lit_installed():
        raise ContextMixError(
            "there is no model for LIT",
            "an environment without lit-nlp",
            "LIT",
            "Install lit-nlp (version 1.3 needs numpy below 2, so in an environment of its own).",
        )
    base = getattr(wrapper, "TransformerLensLIT", None) or wrapper.HookedTransformerLIT
    types, dtypes = (import_module(f"lit_nlp.api.{name}") for name in ("types", "dtypes"))
    reading = import_module("transformer_lens.lit.utils").get_tokens_from_model

    class ContextMixingLIT(base):
        """TransformerLens' wrapper, and what this package computes of the same tokens."""

        def output_spec(self) -> dict[str, Any]:
            """Returns TransformerLens' fields and ours."""
            own = {
                name: types.TokenSalience(autorun=True, signed=signed)
                for name, signed in fields.items()
            }
            return {**super().output_spec(), **own}

        def predict(self, inputs: Iterable[dict[str, Any]], **more: Any) -> Iterator[Any]:
            """Yields TransformerLens' outputs and ours."""
            given = [*inputs]
            for example, found in zip(given, super().predict(given, **more), strict=True):
                yield {**found, **self._own(example["text"], found["tokens"])}

        def _own(self, text: str, tokens: list[str]) -> dict[str, Any]:
            _, ids = reading(
                self.model,
                text,
                prepend_bos=self.config.prepend_bos,
                max_length=self.config.max_seq_length,
            )
            found = compute(ids[None])
            return {name: dtypes.TokenSalience(tokens, found[name]) for name in fields}

    return ContextMixingLIT(model, config)
