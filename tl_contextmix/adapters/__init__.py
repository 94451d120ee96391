"""`as_view`: any TransformerLens model of any version, read into one shape and checked.

This package is the only place that knows hook names and class names of a host.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from tl_contextmix.adapters.building import build
from tl_contextmix.adapters.encoder_decoder.decoding import Generated
from tl_contextmix.adapters.encoder_decoder.model import EncoderDecoder, from_view
from tl_contextmix.adapters.encoder_decoder.whisper import from_speech, is_speech
from tl_contextmix.adapters.glance import Glance
from tl_contextmix.adapters.locks import lock_of
from tl_contextmix.adapters.recognition import recognise
from tl_contextmix.adapters.refusals import require_supported
from tl_contextmix.adapters.running import require_no_autocast, require_no_dropout
from tl_contextmix.adapters.verification import IdentityReport, require_identities
from tl_contextmix.adapters.weight_processing import (
    fingerprint,
    require_finite,
    require_present,
)
from tl_contextmix.core.model_view import ModelView, NeedsModel


@dataclass
class _Known:
    """What was found about a model the last time it had changed."""

    glance: Glance
    view: ModelView
    report: IdentityReport


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def as_view(model: Any) -> ModelView:
    """Returns the one shape of a TransformerLens model, its reading checked against the model.

    The check runs two forward passes over four tokens, once per model and again only when
    it has changed: a weight, a module or its ``forward``, a plain attribute, a config entry.

    Args:
        model: A HookedTransformer, HookedEncoder or HookedEncoderDecoder (TransformerLens 2 and
            3) or a TransformerBridge (3 and 4).

    Raises:
        UnsupportedModel: If it is none of these, is refused by name, or is not reproduced.
        InvalidInput: If a weight is not finite, the model is in train mode with dropout, or
            autocast is on.
    """
    if isinstance(model, ModelView):
        return model  # how a model is stood in for, see `tl_contextmix.evaluation.cost.estimate`
    known = _examine(model)
    require_identities(known.report)
    return known.view


def check(model: Any) -> IdentityReport:
    """Returns how well this package reads a model: every identity, place by place.

    Each row compares something recomputed from a few hooks and the weights with the model's own
    activation: pattern @ v with z, the recomputed block with the block's output, the activation of
    the pre-activation with the neurons, the readout with the logits. A failed identity is a row,
    not an error. Cost: two forward passes over four tokens, without hooks of your own.

    Args:
        model: As in `as_view`.

    Raises:
        UnsupportedModel: If the model is refused by name, or shows too little to ask for an
            identity.
        InvalidInput: If a weight is not finite, the model is in train mode with dropout, or
            autocast is on.
    """
    return _examine(model).report


def as_encoder_decoder(model: Any, tokenizer: Any = None) -> EncoderDecoder:
    """Returns an encoder-decoder as one encoder of L layers and a decoder that reads any of them.

    Args:
        model: As in `as_view`, or a Hugging Face speech model (Whisper).
        tokenizer: Tokenizer or processor of a speech model.

    Raises:
        UnsupportedModel: As `as_view`, or if the model has one stack.
        InvalidInput: As `as_view`.
    """
    if isinstance(model, ModelView):
        raise NeedsModel
    return from_speech(model, tokenizer) if is_speech(model) else from_view(model, as_view(model))


def _examine(model: Any) -> _Known:
    if isinstance(model, nn.Module) and (known := _KNOWN.get(model)) is not None:
        require_no_autocast(known.view.device)
        with lock_of(model):
            if known.glance.still():
                return known
    facts = recognise(model)
    weights = dict(model.named_parameters())
    require_present(weights)
    require_no_autocast(next(iter(weights.values())).device)
    with lock_of(model):
        known = _KNOWN.get(model)
        if known is not None and known.glance.same(glance := Glance(model)):
            known.glance = glance
            return known
        require_supported(facts)
        require_finite(weights)
        require_no_dropout(model)
        view, report = build(facts, fingerprint(weights))
        # Now, when passes have left behind what they leave.
        known = _KNOWN[model] = _Known(Glance(model), view, report)
    return known


__all__ = [
    "EncoderDecoder",
    "Generated",
    "IdentityReport",
    "as_encoder_decoder",
    "as_view",
    "check",
]
