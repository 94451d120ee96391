"""Maps and attributions as fields of TransformerLens' model for LIT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tl_contextmix.adapters.lit_wrapper import Shown, lit_wrapper
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import bad, did_you_mean
from tl_contextmix.results import ContextMap
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

    LIT's "Attention" shows each map with a layer in the place of a head, as shares of rows
    (`ContextMap.normalize`); "Salience Maps" shows attributions of the model's best next token,
    under "Model-provided salience". The rest is TransformerLens' own: tokens, predictions,
    attention, embeddings, gradients. Pass the result to ``transformer_lens.lit.serve``.

    Args:
        model: A causal model of TransformerLens with a tokenizer.
        maps: Methods whose result is one map of each layer.
        salience: Methods that explain one prediction.
        config: A ``TransformerLensLITConfig`` (on TransformerLens 2 and 3
            ``HookedTransformerLITConfig``); None for its defaults.

    Raises:
        InvalidInput: If a method is no such method.
        ContextMixError: If LIT is not installed.

    Cost: TransformerLens' passes, and one call of each method for each text.
    """
    known = methods()
    explain = [name for name, one in known.items() if one.of_prediction]
    draw = [name for name, one in known.items() if one.compared and not one.of_prediction]
    for names, allowed in ((maps, draw), (salience, explain)):
        for name in names:
            if name not in allowed:
                raise bad(
                    "LIT cannot show this method here",
                    repr(name),
                    f"one of {', '.join(allowed)}",
                    did_you_mean(name, allowed) + "Pass other names in maps= or salience=.",
                )
    shown: dict[str, Shown] = {f"{_words(name)}, a layer as a head": "map" for name in maps}
    shown |= {_words(name): "salience" for name in salience}

    def compute(ids: torch.Tensor) -> Mapping[str, Any]:
        found = [_layers(known[name].function(model, ids)) for name in maps]
        found += [_tokens(known[name].function(model, ids)) for name in salience]
        return dict(zip(shown, found, strict=True))

    return lit_wrapper(model, shown, compute, config)


def _words(method: str) -> str:
    return as_heading(in_plain_words(method))


def _layers(map: ContextMap) -> Any:
    """Returns the shares of one text as [layer and head, target, source]."""
    return map.normalize().scores[0].flatten(0, 1).cpu().numpy()


def _tokens(map: ContextMap) -> Any:
    """Returns the scores of one text's sources for its last prediction."""
    return map.scores.flatten().cpu().numpy()
