"""Hugging Face models that no bridge holds, under the names by which those of a bridge are read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.adapters.building import text_side
from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.recognition import Facts, major, maths_dtype
from tl_contextmix.adapters.running import hooked_places, lock_of, without_hooks
from tl_contextmix.adapters.verification import tolerance_of
from tl_contextmix.adapters.weight_processing import fingerprint
from tl_contextmix.core.model_view import CacheReader, Edit, ModelView


class Unbridged:
    """A model, not kept alive.

    Args:
        model: The model.
        d_vocab: How many token ids it reads.
        pair: Whether it has a decoder: texts then get the special tokens of their tokenizer.
        tokenizer: Returns the tokenizer of the model, or None.
    """

    def __init__(
        self, model: Any, d_vocab: int, pair: bool, tokenizer: Callable[[Any], Any]
    ) -> None:
        self.model, self._tokenizer = weakref.ref(model), tokenizer
        self.cfg, self.W_E = SimpleNamespace(), torch.empty(d_vocab, 0)
        self._modules = {"decoder_blocks": None} if pair else {}
        first = next(model.parameters())
        self.handle = Handle(
            weakref.ref(self), "TransformerBridge", maths_dtype(first), first.device
        )

    @property
    def original_model(self) -> Any:
        """The model."""
        model = self.model()
        if model is None:
            raise ReferenceError("the model of this view has been deleted")
        return model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""
        return self._tokenizer(self.original_model)

    def view(self, weights: Mapping[str, Tensor], **own: Any) -> ModelView:
        """Returns a view of the model; ``own`` is what is not the same for all of them."""
        from transformers import __version__

        kind, device = type(self.original_model).__name__, self.handle.device
        facts = Facts(self, "TransformerBridge", major(), kind)
        common = {
            "name": str(getattr(self.original_model.config, "_name_or_path", "") or kind),
            "host": kind,
            "host_version": __version__,
            "processing": (),
            "fingerprint": fingerprint(weights),
            "dtype": self.handle.dtype,
            "device": device,
            "d_vocab": len(self.W_E),
            "tolerance": tolerance_of({weight.dtype for weight in weights.values()}, device),
            "hooked": lambda *, backward=False: hooked_places(
                self.original_model, backward=backward
            ),
            "without_hooks": lambda: without_hooks(self.original_model),
            "follow": lambda trace, *rest: trace,
            "cached": CacheReader(lambda name: (), {}, lambda *ids: torch.empty(0)),
        }
        return ModelView(
            **{**common, **text_side(self.handle, facts, pair=bool(self._modules)), **own}
        )


class _Ended(BaseException):
    """A pass has shown all that was asked for; no `Exception`, which a model may catch."""


@dataclass(frozen=True)
class Place:
    """Where an activation of a model is.

    Attributes:
        module: The module.
        kind: Whether it is what goes ``"in"`` to it, what comes ``"out"`` or its ``"pattern"``.
        heads: How many heads it has side by side; 0 where it has none.
        edit: What edits it.
    """

    module: nn.Module
    kind: str
    heads: int = 0
    edit: Edit | None = None


@contextmanager
def keeping(
    model: nn.Module, places: Mapping[str, Place], last: str = ""
) -> Iterator[dict[str, Tensor]]:
    """Keeps activations of a pass by name, in the order of the pass, which ends with the last."""
    kept: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> Tensor:
        place = places[name]
        value = value.unflatten(-1, (place.heads, -1)) if place.heads else value
        value = kept[name] = value if place.edit is None else place.edit(value)
        if name == last:
            raise _Ended
        return value.flatten(2) if place.heads else value

    def before(name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if given:
            return (see(name, given[0]), *given[1:]), named
        return given, {**named, "hidden_states": see(name, named["hidden_states"])}

    def after(name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        if places[name].kind == "pattern":
            kept[name] = output[1]
            return output
        if isinstance(output, tuple):
            return (see(name, output[0]), *output[1:])
        return see(name, output)

    handles: list[Any] = []
    with lock_of(model), torch.no_grad():
        try:
            for name, place in places.items():
                if place.kind == "in":
                    see_in = partial(before, name)
                    handles.append(place.module.register_forward_pre_hook(see_in, with_kwargs=True))
                else:
                    handles.append(place.module.register_forward_hook(partial(after, name)))
            yield kept
        except _Ended:
            pass
        finally:
            for handle in handles:
                handle.remove()
