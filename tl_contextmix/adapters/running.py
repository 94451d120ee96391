"""Runs a TransformerLens model of any class: its lock, and hooks, ours and the user's own."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.layouts import Layout
from tl_contextmix.adapters.recognition import Facts, every_module, token_embedding
from tl_contextmix.adapters.splices import around_point, find_splices, hook_point, named, stand_ins
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import Edit, Hooks, PassOutput, Runner
from tl_contextmix.core.token_sums import beside
from tl_contextmix.errors import InvalidInput, UnsupportedModel

_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()
# Bridges and transformers keep recording hooks of their own on a model, PyTorch computes pruned or
# normalised weights in one, and a pass of ours may be under way whose hooks let others go by.
_HOSTS = {"transformer_lens", "transformers", "torch", "accelerate", "tl_contextmix"}
# Where Hugging Face's modules keep the rates at which they drop activations, or whole layers.
_RATES = ("dropout", "attention_dropout", "activation_dropout", "dropout_prob", "layerdrop")


def lock_of(model: nn.Module) -> AbstractContextManager[Any]:
    """Returns the lock of a model, which the same thread may take again."""
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


def make_runner(
    handle: Handle,
    pad_id: Callable[[], int],
    splices: Sequence[str] = (),
    layouts: Mapping[str, Layout] = MappingProxyType({}),
) -> Runner:
    """Returns the function that runs the model once with hooks at the given names.

    Args:
        handle: The model.
        pad_id: Returns the id that pads.
        splices: Paths of modules where hook points were, see `find_splices`.
        layouts: Of activations that the model shows with other axes.
    """
    under_way: list[_Pass] = []
    # A rate, or a module, that changes is seen elsewhere: there is a new runner then.
    dropping: list[list[weakref.ref[nn.Module]]] = []

    def run(batch: Batch, hooks: Hooks, grad: bool, watch: bool, logits: bool = True) -> PassOutput:
        model = handle.get()
        if not dropping:
            dropping.append([weakref.ref(one) for one in every_module(model) if _rate(one) > 0])
        if any(one is None or one.training for one in (known() for known in dropping[0])):
            require_no_dropout(model)
        require_no_autocast(handle.device)
        if not splices:
            return run_hooked(model, batch, hooks, grad, watch, logits)
        with lock_of(model), stand_ins(model, splices, around=True):
            return run_hooked(model, batch, hooks, grad, watch, logits)

    def run_hooked(
        model: Any, batch: Batch, hooks: Hooks, grad: bool, watch: bool, logits: bool
    ) -> PassOutput:
        own = _Pass(under_way, grad, model, hooks, watch, not logits, layouts)
        # One filter for all names: for each hook, 3.x makes its table of points anew, which takes
        # 6 ms in a model of twelve layers. A pass there has sixty hooks and takes 30 ms.
        fwd_hooks: list[tuple[Callable[..., bool], Callable[..., Any]]] = [
            (own.wanted.__contains__, own.hook)
        ]
        if handle.ignores_masks and not bool(batch.main.mask.all()):
            padding = ~beside(handle.device, batch.main.mask)[:, None, None]
            fwd_hooks.append((_is_scores, partial(own.hide, padding)))
        ids = beside(handle.device, _ids(batch.main, pad_id()))
        # Hooks sit on the model: two passes at once would fill each other's traces.
        late = own.softmax if own.late else nullcontext()
        with lock_of(model), own, late, torch.set_grad_enabled(grad):
            arguments = _arguments(model, handle, batch)
            try:
                output = model.run_with_hooks(ids, fwd_hooks=fwd_hooks, **arguments)
            except _Ended:
                output = None
        _require_all(model, own.kept, [name for name, _ in hooks])
        kept, added = (
            {name: value.to(handle.device) for name, value in some.items()}
            for some in (own.kept, own.added)
        )
        return output, kept, added

    return run


class _Ended(BaseException):
    """A pass has shown all that was asked for.

    No `Exception`: some attention modules of bridges catch those and go on in another way.
    """


class _Pass:
    """A pass under way, and what its hooks keep.

    Its hooks are for it alone. They let other passes go by that happen while they sit on the
    model: those of a call that a hook of the user's own makes, and of a thread that runs the model
    without this package.
    """

    def __init__(
        self,
        under_way: list[_Pass],
        grad: bool,
        model: Any,
        hooks: Hooks,
        watch: bool,
        ends: bool,
        layouts: Mapping[str, Layout],
    ) -> None:
        self.under_way, self.grad, self.layouts = under_way, grad, layouts
        self.thread = threading.get_ident()
        self.edits = dict(hooks)
        self.kept: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        # By point, never by hook.name: compatibility mode renames hook points.
        self.names: dict[int, list[str]] = {}
        listed = model.hook_dict
        points = _with_aliases(model, listed, self.edits)
        for name in self.edits:
            if name in points:
                self.names.setdefault(id(points[name]), []).append(name)
        self.wanted = {*self.edits}
        if points is not listed:
            # By one name each: by two of them, an edit would be made twice.
            once = {id(point): name for name, point in listed.items()}
            self.wanted = {once[point] for point in self.names if point in once}
        self.watched = _watched(model, points) if watch else []
        self.late = _late_patterns(model, self.edits)
        # Hooks of the user's own, which are watched, may wait for points that come later.
        self.missing = None if not ends or watch else {*self.edits}
        self.softmax = _Softmax()

    def __enter__(self) -> None:
        self.under_way.append(self)
        for name, module in self.late.items():
            self._edit_late(name, module)
        for point, names in self.watched:
            self._watch(point, names)

    def __exit__(self, *error: object) -> None:
        self.under_way.remove(self)
        for handle in self.handles:
            handle.remove()

    def _watch(self, point: nn.Module, names: Sequence[str]) -> None:
        """Records what hooks of the user's own, or a module in its place, add at a point."""
        before: list[Tensor] = []

        def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
            if not self._passes_by and given and isinstance(given[0], Tensor):
                before[:] = [given[0].detach().clone()]  # hooks may edit it in place

        def leave(module: nn.Module, given: tuple[Any, ...], found: Tensor) -> None:
            if self._passes_by or not before:
                return
            old, new = before.pop(), found.detach()
            if old.shape == new.shape and not torch.equal(old, new):
                exact = torch.promote_types(new.dtype, torch.float32)
                self.added |= dict.fromkeys(names, new.to(exact) - old.to(exact))

        # Around those of the user's own: hooks are called in the order in which they were put on.
        self.handles.append(point.register_forward_pre_hook(enter, prepend=True))
        self.handles.append(point.register_forward_hook(leave))

    def _edit_late(self, name: str, module: nn.Module) -> None:
        """Edits a pattern where it arises: in the softmax of an attention module."""

        def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
            if not self._passes_by:
                self.softmax.edit = self.edits[name]

        def leave(module: nn.Module, given: tuple[Any, ...], found: Any) -> None:
            if self._passes_by:
                return
            if self.softmax.edit is not None:
                raise _no_softmax(name)

        self.handles.append(module.register_forward_pre_hook(enter))
        self.handles.append(module.register_forward_hook(leave))

    @property
    def _passes_by(self) -> bool:
        """Whether the pass that meets a hook is another one."""
        return threading.get_ident() != self.thread or self.under_way[-1] is not self

    def hide(self, padding: Tensor, scores: Tensor, hook: Any) -> Tensor | None:
        """Lets no position read padding, as the host's own mask would."""
        return None if self._passes_by else scores.masked_fill(padding, -torch.inf)

    def hook(self, tensor: Tensor, hook: Any) -> Tensor | None:
        """Edits and keeps the activation at a point."""
        if self._passes_by:
            return None
        edited = False
        # In compatibility mode a point without a name is seen through an alias of it.
        for name in self.names[id(getattr(hook, "_target", hook))]:
            edit, layout, host = self.edits[name], self.layouts.get(name), tensor
            tensor = host if layout is None else layout.read(host)
            if edit is not None and name not in self.late:
                tensor, edited = edit(tensor), True
            # What is kept may be edited in place at a later point.
            self.kept[name] = tensor.clone() if self.watched else tensor
            if self.missing is not None:
                self.missing.discard(name)
            tensor = tensor if layout is None else layout.write(tensor, host)
        if self.missing is not None and not self.missing:
            raise _Ended
        # On a bridge a captured q, k, v or z is a copy: only a returned one is in the graph.
        return tensor if self.grad or edited else None


def _with_aliases(model: Any, listed: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns hook points by all of their names: the bridge of SAELens lists no aliases."""
    more = getattr(model, "_add_aliases_to_hooks", None)
    if more is None or all(name in listed for name in names):
        return listed
    points = dict(listed)
    more(points)
    return points


class _Softmax(TorchFunctionMode):
    """Edits what the next softmax over the sources of an attention sublayer returns."""

    edit: Edit | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        edit = self.edit
        if edit is not None and func.__name__ == "softmax" and result.ndim == 4:
            self.edit, result = None, edit(result)
        return result


# By name, as importing them imports TransformerLens.
_SHOWING_LATE = ("AttentionBridge.forward", "AskedAttention.forward")


def _late_patterns(model: Any, edits: Mapping[str, Edit | None]) -> dict[str, nn.Module]:
    """Returns the attention modules that use a pattern before they show it, by its name.

    A bridge that leaves attention to Hugging Face's module shows the pattern after the output, and
    discards what hooks make of it.
    """
    result = {}
    for name, edit in edits.items():
        path, _, point = name.rpartition(".")
        if edit is not None and point == "hook_pattern":
            module = model.get_submodule(path)
            if type(module).forward.__qualname__ in _SHOWING_LATE:
                result[name] = module
    return result


def _no_softmax(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        "an attention pattern cannot be edited",
        f"{name}, of a module that calls no softmax",
        "eager attention",
        'Call set_attn_implementation("eager") on the Hugging Face model before wrapping it.',
    )


def _watched(model: nn.Module, points: dict[str, Any]) -> list[tuple[nn.Module, list[str]]]:
    """Returns the hook points that hooks of the user's own may edit, with all of their names."""
    found = {
        id(point): (point, [name])
        for name, point in named(model)
        if isinstance(point, hook_point())
        and (is_hooked(point) or isinstance(point, around_point()))
    }
    for name, point in points.items():
        if id(point) in found:
            found[id(point)][1].append(name)
    return list(found.values())


def _is_scores(name: str) -> bool:
    return name.endswith(".hook_attn_scores")


def _ids(side: Side, pad_id: int) -> Tensor:
    """Returns the ids with one padding id wherever there is padding, whatever was there.

    RoBERTa counts positions by the ids, not by the mask.
    """
    return side.ids.masked_fill(~side.mask, pad_id)


def _require_all(model: nn.Module, kept: dict[str, Tensor], names: list[str]) -> None:
    missing = [name for name in names if name not in kept]
    if missing:
        raise _not_shown(model, missing, len(names))


def _not_shown(model: Any, missing: list[str], count: int) -> UnsupportedModel:
    config = getattr(getattr(model, "original_model", None), "config", None)
    attention = getattr(config, "_attn_implementation", None) or "eager"
    remedy = (
        "A hook that resets hooks ends a pass's own, and some bridges lose points when they are "
        "deep-copied: leave the hook out, or load the model anew. Else this class of "
        "TransformerLens does not show what maps of this model are made of; try another class or "
        "version."
    )
    if attention != "eager":
        remedy = (
            'Call set_attn_implementation("eager") on the Hugging Face model before wrapping it: '
            "fused attention kernels compute no pattern."
        )
    return UnsupportedModel(
        f"the model did not show {missing[0]}",
        f"{len(missing)} of {count} hooks that never fired, with {attention} attention",
        "attention patterns, values and neurons at hook points",
        remedy,
    )


def _arguments(model: nn.Module, handle: Handle, batch: Batch) -> dict[str, Any]:
    mask = beside(handle.device, batch.main.mask).long()
    padded = not bool(batch.main.mask.all())
    arguments: dict[str, Any] = {}
    if handle.bridge:
        arguments["attention_mask"] = mask if padded or batch.decoder is not None else None
    elif batch.decoder is not None:
        # HookedEncoderDecoder multiplies 1 - mask by the lowest float64, which overflows to
        # 0 * inf unless the mask has the model's own dtype.
        dtype = next(model.parameters()).dtype
        arguments["one_zero_attention_mask"] = mask.to(dtype)
    elif handle.host == "HookedEncoder":
        arguments["one_zero_attention_mask"] = mask
    elif padded:
        arguments["attention_mask"] = mask
    if batch.decoder is not None:
        arguments["decoder_input"] = batch.decoder.ids.to(handle.device)
    for name, value in batch.further.items():
        arguments[name] = value.to(handle.device)
    if batch.past is not None:
        arguments |= batch.past()
    return arguments


def arguments_taken(facts: Facts) -> dict[str, int | None]:
    """Returns what a model's own forward may be given of each token; see `ModelView.takes`."""
    host = facts.model
    if facts.host == "HookedEncoder":
        return {"token_type_ids": len(host.embed.token_type_embed.W_token_type)}
    config = facts.hf_config()
    if config is None:  # other Hooked classes, and models that a bridge has made itself
        return {}
    table = "pos_embed" in host._modules and "decoder_blocks" not in host._modules
    bounds = {
        # GPT-2 looks segments up among its tokens.
        "token_type_ids": getattr(config, "type_vocab_size", int(token_embedding(host).shape[0])),
        "position_ids": getattr(config, "max_position_embeddings", None) if table else None,
    }
    named = inspect.signature(host.original_model.forward).parameters
    accepted = [name for name in named if name.endswith("_ids") or name == "langs"]
    return {name: bounds.get(name) for name in accepted if not name.endswith("input_ids")}


def require_no_dropout(model: nn.Module) -> None:
    """Checks that the model gives the same numbers twice.

    Raises:
        InvalidInput: If a module is in train mode and drops activations.
    """
    if not any(module.training for module in every_module(model)):
        return
    for name, module in model.named_modules():
        if module.training and _rate(module) > 0:
            raise InvalidInput(
                "the model is in train mode and drops activations at random",
                f"dropout {_rate(module)} in {name or type(module).__name__}",
                "a model in eval mode",
                "Call model.eval() first.",
            )


def _rate(module: nn.Module) -> float:
    """Returns the rate at which a module drops activations in train mode."""
    if not isinstance(module, nn.Dropout) and module.__dict__.keys().isdisjoint(_RATES):
        return 0.0
    rate = getattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else 0.0
    rates = (module.__dict__.get(attribute) for attribute in _RATES)
    return max([rate, *(value for value in rates if isinstance(value, float))])


def require_no_autocast(device: torch.device) -> None:
    """Checks that matrix products have the precision of their factors.

    Raises:
        InvalidInput: If autocast is on.
    """
    if torch.is_autocast_enabled(device.type):
        raise InvalidInput(
            "maps cannot be computed under autocast",
            f"torch.autocast({device.type!r}, {torch.get_autocast_dtype(device.type)})",
            "matrix products in the precision of their factors",
            "Leave the autocast block, or load the model in the lower precision: its "
            "activations are then upcast for the maths.",
        )


def make_hooked(handle: Handle, splices: Sequence[str] = ()) -> Callable[..., tuple[str, ...]]:
    """Returns the function that tells which modules carry hooks of the user's own.

    Args:
        handle: The model.
        splices: Paths of modules where hook points were: they count.
    """
    modules: list[weakref.ref[nn.Module]] = []

    def hooked(*, backward: bool = False) -> tuple[str, ...]:
        model = handle.get()
        if not modules:  # those of a model that changes are in a new view
            modules.extend(map(weakref.ref, every_module(model)))
        if not (backward or splices or _any_hooked(modules)):
            return ()
        found = dict.fromkeys([*splices, *hooked_places(model, backward=backward)])
        return tuple(_spoken(model, found)) if found else ()

    return hooked


def _spoken(model: Any, places: Iterable[str]) -> Iterator[str]:
    """Yields names of places as users write them, a bridge's with its own name for it.

    A bridge has HookedTransformer's names for its hook points, too.
    """
    points = getattr(model, "hook_dict", {})
    names: dict[int, str] = {}
    for name, point in points.items():
        if name.rpartition(".")[2] not in ("hook_in", "hook_out"):
            names.setdefault(id(point), name)
    for place in places:
        alias = names.get(id(points.get(place)), place)
        yield place if alias == place else f"{alias} ({place})"


def hooked_places(model: nn.Module, *, backward: bool = False) -> tuple[str, ...]:
    """Returns the names of the modules that carry hooks of the user's own.

    Args:
        model: The model.
        backward: Whether hooks of backward passes count, too.
    """
    return tuple(
        name or type(model).__name__
        for name, module in named(model)
        if is_hooked(module)
        or (backward and _any_own((module._backward_hooks, module._backward_pre_hooks)))
    )


def _any_hooked(modules: Sequence[weakref.ref[nn.Module]]) -> bool:
    """Whether one of some modules is hooked, or is gone: much sooner than which."""
    found = [known() for known in modules]
    if None in found:
        return True
    dicts = [*map(vars, found)]
    tables = (*map(itemgetter("_forward_hooks"), dicts),)
    tables += (*map(itemgetter("_forward_pre_hooks"), dicts),)
    return _any_own(filter(None, tables))


def is_hooked(module: nn.Module) -> bool:
    """Whether a module itself carries a hook of the user's own, which sees forward passes."""
    return _any_own(_tables(module))


def _any_own(tables: Iterable[dict[int, Callable[..., Any]]]) -> bool:
    return any(not _of_host(hook) for table in tables for hook in table.values())


@contextmanager
def without_hooks(model: nn.Module, splices: Sequence[str] | None = None) -> Iterator[None]:
    """Takes the user's own hooks off for a while, and SAEs; their order is kept.

    Args:
        model: The model.
        splices: Where SAEs are, if that is known.
    """
    splices = find_splices(model) if splices is None else splices
    if splices:
        with stand_ins(model, splices, around=False), without_hooks(model, ()):
            yield
        return
    removed = [
        (table, dict(table))
        for module in every_module(model)
        for table in _tables(module)
        if table and _any_own([table])
    ]
    try:
        for table, before in removed:
            for key, hook in before.items():
                if not _of_host(hook):
                    del table[key]
        yield
    finally:
        for table, before in removed:
            added = {key: hook for key, hook in table.items() if key not in before}
            # The tables themselves stay: handles for removal refer to them.
            table.clear()
            table.update({**before, **added})


def _tables(module: nn.Module) -> tuple[Any, Any]:
    return module._forward_hooks, module._forward_pre_hooks


def _of_host(hook: Callable[..., Any]) -> bool:
    owner = getattr(_inner(hook), "__module__", None) or ""
    return owner.split(".")[0] in _HOSTS


def _inner(hook: Callable[..., Any]) -> Any:
    """Returns the function a HookPoint was given, which it wraps in functions of its own."""
    names: tuple[str, ...] = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    cells = getattr(hook, "__closure__", None) or ()
    if "hook" in names:
        return cells[names.index("hook")].cell_contents
    if "full_hook" in names:  # that of a backward pass is wrapped twice
        return _inner(cells[names.index("full_hook")].cell_contents)
    return hook
