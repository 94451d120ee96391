"""One view of each model, made when it is first asked about and again when it has changed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.building import build
from tl_contextmix.adapters.encoder_decoder.direct import from_text, held_in, is_text
from tl_contextmix.adapters.encoder_decoder.model import EncoderDecoder, from_view
from tl_contextmix.adapters.encoder_decoder.whisper import from_speech, is_speech
from tl_contextmix.adapters.recognition import every_module, recognise
from tl_contextmix.adapters.refusals import require_supported
from tl_contextmix.adapters.running import lock_of, require_no_autocast, require_no_dropout
from tl_contextmix.adapters.speech import build_speech, is_sound
from tl_contextmix.adapters.verification import IdentityReport, require_identities
from tl_contextmix.adapters.weight_processing import require_finite, require_present, sampled
from tl_contextmix.core.model_view import ModelView, NeedsModel
from tl_contextmix.errors import InvalidInput, UnsupportedModel

# What every module has is watched otherwise, or changes no number; nor do names, what acts on
# gradients or slices of a cache only, and what hosts count in a pass.
_UNWATCHED = frozenset(
    {
        *vars(nn.Module()),
        *("name", "backward_scale", "pos_dim", "optional", "context_level", "is_caching"),
    }
)
# Which adapters (PEFT) a layer computes with.
_SWITCHES = frozenset({"_active_adapter", "_disable_adapters"})
_CONFIGS = ("cfg", "config")
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# Views of weights that are kept to be compared would keep the memory of weights that were moved to
# another device until the next call. Those of larger models are made anew, 4 us a weight.
_KEPT_BYTES = 2**26

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

_held, _version, _forward = attrgetter("__dict__"), attrgetter("_version"), attrgetter("forward")


class Glance:
    """What the numbers of a model depend on, as it was when it was made.

    Modules, their classes, the ``forward`` of each, their plain public attributes and those of
    their configs (values by value, functions and other objects by identity), which adapters are on,
    weights and buffers. Not containers, nor other attributes with an underscore, where hosts keep
    state of their passes.

    Nothing of the model is kept alive but small weights: an object is its id, which counts as long
    as none of them has died.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = _modules(model)
        dicts = list(map(_held, modules))
        configs = {id(config): config for own in dicts for config in map(own.get, _CONFIGS)}
        configs = [one for one in configs.values() if hasattr(one, "__dict__") and _dies(one)]
        kinds = dict.fromkeys(map(type, modules))
        weights = _weights(dicts)
        self._dead: list[Any] = []
        self._modules, self._configs = self._refs(modules), self._refs(configs)
        self._kinds, self._weights = self._refs(kinds), self._refs(weights)
        self._counted = not any(weight.is_inference() for weight in weights)
        every = dicts + list(map(_held, configs))
        # The names are kept, too: a getter does not say what it gets.
        self._names: list[list[str]] = []
        self._places: list[tuple[int, str]] = []
        roles = _Roles()
        for i, own in enumerate(every):
            found = [
                ("value" if name in _SWITCHES else roles[type(value)], name)
                for name, value in own.items()
                if name not in _UNWATCHED and (name[:1] != "_" or name in _SWITCHES)
            ]
            self._names.append([name for role, name in found if role == "value"])
            self._places += [(i, name) for role, name in found if role == "object"]
        self._getters = [(i, itemgetter(*some)) for i, some in enumerate(self._names) if some]
        self._others = self._refs([every[i][name] for i, name in self._places])
        self._others += self._refs(map(_forward, kinds))
        self._sizes = list(map(len, every))
        self._values = self._read_values(every)
        self._identities = self._read_identities(modules, dicts, weights)
        self._objects = self._read_objects(every)
        self._sample = _Sample(weights)

    def still(self) -> bool:
        """Whether nothing has changed, be it an attribute that a pass has set; see `same`."""
        if self._dead:
            return False
        # All there are: none is new where the children of each are the same.
        modules = [reference() for reference in self._modules]
        dicts = list(map(_held, modules))
        weights = _weights(dicts)
        if self._read_identities(modules, dicts, weights) != self._identities:
            return False
        dicts += [reference().__dict__ for reference in self._configs]
        try:
            return (
                list(map(len, dicts)) == self._sizes
                and self._read_values(dicts) == self._values
                and self._read_objects(dicts) == self._objects
                and self._sample.still(weights)
            )
        except (KeyError, RuntimeError, TypeError, ValueError):
            return False  # an attribute is gone, or is an array now

    def same(self, other: Glance) -> bool:
        """Whether another glance, taken now, saw the same."""
        return (
            not self._dead
            and self._identities == other._identities
            and self._places == other._places
            and self._objects == other._objects
            and self._names == other._names
            and self._values == other._values
            and self._sample.same(other._sample)
        )

    def _refs(self, things: Iterable[Any]) -> list[Any]:
        return [weakref.ref(thing, self._dead.append) for thing in things]

    def _read_values(self, dicts: list[dict[str, Any]]) -> list[Any]:
        return [get(dicts[i]) for i, get in self._getters]

    def _read_objects(self, dicts: list[dict[str, Any]]) -> list[int]:
        return [id(dicts[i][name]) for i, name in self._places]

    def _read_identities(
        self, modules: list[Any], dicts: list[dict[str, Any]], weights: list[Tensor]
    ) -> tuple[list[Any], ...]:
        return (
            # A bridge's model is none of its modules, but it is what runs.
            [id(dicts[0].get("original_model"))],
            [id(child) for own in dicts if (some := own["_modules"]) for child in some.values()],
            list(map(id, map(type, modules))),
            [id(_forward(kind())) for kind in self._kinds],
            list(map(id, weights)),
            list(map(Tensor.data_ptr, weights)),
            list(map(Tensor.stride, weights)),
            list(map(Tensor.size, weights)),
            list(map(_version, weights)) if self._counted else [],
        )


def _modules(model: nn.Module) -> list[nn.Module]:
    own = model.__dict__
    found = dict.fromkeys(every_module(model))
    if isinstance(original := own.get("original_model"), nn.Module):
        found.update(dict.fromkeys(every_module(original)))
    return list(found)


def _weights(dicts: list[dict[str, Any]]) -> list[Tensor]:
    """Returns the parameters and the buffers of modules."""
    return [
        weight
        for table in ("_parameters", "_buffers")
        for own in dicts
        if (some := own[table])
        for weight in some.values()
        if weight is not None
    ]


class _Roles(dict[type, str]):
    """What the attributes of each class are: "value", "object" or nothing that is watched here.

    Objects are functions and all else of which a death can be noticed. Lists and dicts, which
    passes fill, are none; modules are aliases here.
    """

    def __missing__(self, kind: type) -> str:
        watched = not issubclass(kind, (Tensor, nn.Module)) and kind.__weakrefoffset__
        self[kind] = role = "value" if issubclass(kind, _VALUES) else "object" if watched else ""
        return role


def _dies(value: Any) -> bool:
    """Whether the death of an object can be noticed."""
    return bool(type(value).__weakrefoffset__)


class _Sample:
    """Entries of every weight, as they were.

    PyTorch's counters of changes in place miss those through ``.data``.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        views = _views(weights)
        self._then = _read(views)
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        self._kept = views if size <= _KEPT_BYTES else None

    def still(self, weights: list[Tensor]) -> bool:
        """Whether the entries of the same weights, in the same places, are what they were."""
        return _equal(_read(self._kept or _views(weights)), self._then)

    def same(self, other: _Sample) -> bool:
        """Whether another sample has the same entries."""
        return _equal(other._then, self._then)


def _views(weights: list[Tensor]) -> list[list[Tensor]]:
    """Returns samples of weights in lists of those that can be joined."""
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for weight in weights:
        if not weight.is_meta:
            view = sampled(weight)
            view = view if view.ndim else view[None]
            found.setdefault((view.device, view.dtype, view.shape[1:]), []).append(view)
    return list(found.values())


def _read(views: list[list[Tensor]]) -> list[Tensor]:
    joined = map(torch.cat, views)
    # As bits NaN is NaN.
    return [some.view(_BITS.get(some.element_size(), torch.int64)) for some in joined]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        one.device == other.device and torch.equal(one, other)
        for one, other in zip(some, others, strict=True)
    )


@dataclass
class _Known:
    """What was found about a model the last time it had changed."""

    glance: Glance
    view: ModelView
    report: IdentityReport
    correct: bool


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def as_view(model: Any) -> ModelView:
    """Returns the one shape of a TransformerLens model, its reading checked against the model.

    The check runs a forward pass over two rows of four tokens (two where a feed-forward block
    cannot be taken apart) and one of the Hugging Face model that a bridge holds, once per model and
    again only when it has changed: a weight, a module or its ``forward``, a plain attribute, a
    config entry.

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
    if not known.correct:
        require_identities(known.report)
    return known.view


def check(model: Any) -> IdentityReport:
    """Returns how well this package reads a model: every identity, place by place.

    Each row compares something recomputed from a few hooks and the weights with the model's own
    activation: pattern @ v with z, the recomputed block with the block's output, the activation of
    the pre-activation with the neurons, the readout with the logits, and a bridge's logits with
    those of the Hugging Face model that it holds, run without the bridge (where its weights are the
    bridge's: not after weight processing). A failed identity is a row, not an error. Cost: a
    forward pass over two rows of four tokens (two where a feed-forward block cannot be taken
    apart), and one of the Hugging Face model, without hooks of your own and SAEs: where they are is
    in `IdentityReport.hooked`, and what they do is checked in each pass.

    Args:
        model: As in `as_view`.

    Raises:
        UnsupportedModel: If the model is refused by name, or shows too little to ask for an
            identity.
        InvalidInput: If a weight is not finite, the model is in train mode with dropout, or
            autocast is on.
    """
    known = _examine(model)
    return replace(known.report, hooked=known.view.hooked())


def as_encoder_decoder(
    model: Any, tokenizer: Any = None, language: str | None = None, task: str | None = None
) -> EncoderDecoder:
    """Returns an encoder-decoder as one encoder of L layers and a decoder that reads any of them.

    Args:
        model: As in `as_view`, or a Hugging Face speech model (Whisper).
        tokenizer: Tokenizer or processor of a speech model.
        language: Target language, see `TokenInputs`; a speech model's as ``generate`` takes it.
        task: ``"transcribe"`` or ``"translate"``, of a speech model.

    Raises:
        UnsupportedModel: As `as_view`, or if the model has one stack.
        InvalidInput: As `as_view`.
    """
    if isinstance(model, ModelView):
        raise NeedsModel
    if is_speech(model):
        return from_speech(model, tokenizer, language, task)
    if task is not None:
        raise InvalidInput(
            "task has no meaning for this model", repr(task), "None", "Leave it out."
        )
    if is_text(model):
        return from_text(model, tokenizer, language)
    try:
        view = as_view(model)
    except UnsupportedModel:
        # What stands in the way of maps need not stand in the way of the decoder.
        held = held_in(model)
        if held is None:
            raise
        return replace(from_text(held, model.tokenizer, language), direct=False)
    return from_view(model, view, language)


def _examine(model: Any) -> _Known:
    if isinstance(model, nn.Module) and (known := _KNOWN.get(model)) is not None:
        require_no_autocast(known.view.device)
        with lock_of(model):
            if known.glance.still():
                return known
    facts = None if is_sound(model) else recognise(model)
    weights = dict(model.named_parameters())
    require_present(weights)
    require_no_autocast(next(iter(weights.values())).device)
    with lock_of(model):
        known = _KNOWN.get(model)
        if known is not None and known.glance.same(glance := Glance(model)):
            known.glance = glance
            return known
        if facts is not None:
            require_supported(facts)
        require_finite(weights)
        require_no_dropout(model)
        view, report = build_speech(model, weights) if facts is None else build(facts, weights)
        # Now, when passes have stored what they store.
        known = _KNOWN[model] = _Known(Glance(model), view, report, report.ok)
    return known
