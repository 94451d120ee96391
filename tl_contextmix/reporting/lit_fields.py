"""Maps and attributions as fields of TransformerLens' model for LIT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.lit_wrapper import lit_wrapper
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import InvalidInput, did_you_mean
from tl_contextmix.results.headings import as_heading, in_plain_words

_MAPS = ("attention_norms", "value_zeroing")
_SALIENCE = ("gradient_x_input",)


def lit_model(
    model: object,
    *,
    maps: Sequence[str] = _MAPS,
    salience: Sequence[str] = _SALIENCE,
    config: Any = None,
) -> Any:
    """Returns TransformerLens' LIT model of a model, with context-mixing maps and attributions.

    LIT's "Salience Maps" shows them under "Model-provided salience": of each layer, what the last
    token draws from every token, as shares (`ContextMap.normalize`); and attributions of the
    model's best next token. The rest is TransformerLens' own: tokens, predictions, embeddings,
    gradients. Pass the result to ``transformer_lens.lit.serve``.

    Args:
        model: A causal model of TransformerLens with a tokenizer.
        maps: Methods whose result is one map of each layer.
        salience: Methods that explain one prediction.
        config: A ``TransformerLensLITConfig`` (on TransformerLens 2 and 3
            ``HookedTransformerLITConfig``); None for its defaults.

    Raises:
        InvalidInput: If a method is no such method.
        ContextMixError: If LIT is not installed.

    Cost: TransformerLens' passes, and one call of each method for each text; one more on one token.
    """
    known = methods()
    explain = [name for name, one in known.items() if one.of_prediction]
    draw = [name for name, one in known.items() if one.compared and not one.of_prediction]
    for names, allowed in ((maps, draw), (salience, explain)):
        for name in names:
            if name not in allowed:
                raise InvalidInput(
                    "LIT cannot show this method here",
                    repr(name),
                    f"one of {', '.join(allowed)}",
                    did_you_mean(name, allowed) + "Pass other names in maps= or salience=.",
                )

    def compute(ids: torch.Tensor) -> dict[str, Any]:
        result = {}
        # First what has signs: LIT colours all fields of a model as the first.
        for name in salience:
            result[_words(name)] = known[name].function(model, ids).scores.flatten().cpu().numpy()
        for name in maps:
            shares = known[name].function(model, ids).normalize()
            for layer, scores in zip(shares.layers, shares.scores[0, :, 0, -1].cpu(), strict=True):
                result[f"{_words(name)}, layer {layer}"] = scores.numpy()
        return result

    # What there is a map of, such as the layers of a hybrid with attention, is known by asking.
    names = compute(torch.tensor([as_view(model).encode("the", True)]))
    signed = {name: name in map(_words, salience) for name in names}
    return lit_wrapper(model, signed, compute, config)


def _words(method: str) -> str:
    return as_heading(in_plain_words(method))
