"""Builds the view of a model: its blocks read, settled by the probe, and checked."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.adapters.cache_names import cache_reader
from tl_contextmix.adapters.chats import make_encode_chat
from tl_contextmix.adapters.decoder_prompt import decoder_prompt, make_encode_decoder
from tl_contextmix.adapters.generation import make_generate
from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.host_readout import read_readout
from tl_contextmix.adapters.layouts import find_layouts
from tl_contextmix.adapters.norm_reading import final_norms
from tl_contextmix.adapters.past import make_past
from tl_contextmix.adapters.reading import block_lists, candidates, with_placed_edits
from tl_contextmix.adapters.recognition import Facts, host_version, maths_dtype, token_embedding
from tl_contextmix.adapters.refusals import solu_refusal
from tl_contextmix.adapters.running import (
    arguments_taken,
    lock_of,
    make_hooked,
    make_runner,
    without_hooks,
)
from tl_contextmix.adapters.splices import find_splices
from tl_contextmix.adapters.tokenizers import (
    make_encode,
    make_encode_pair,
    make_pad_id,
    make_pieces,
    make_spaced,
    make_to_source,
    make_to_string,
    make_to_text,
    padding_of,
    special_ids,
    special_tokens,
)
from tl_contextmix.adapters.unseen import find_unseen, with_unseen
from tl_contextmix.adapters.verification import (
    CheckRow,
    IdentityReport,
    Probe,
    check_rows,
    follow,
    hugging_face_rows,
    readout_row,
    run_probe,
    settle_block,
    tolerance_of,
    why_overflown,
)
from tl_contextmix.adapters.weight_processing import (
    Weights,
    find_processing,
    fingerprint,
    make_notice,
)
from tl_contextmix.core.activations import Activation
from tl_contextmix.core.blocks import FOLD_BYTES, Block
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.opaque_feed_forward import OpaqueFeedForward
from tl_contextmix.errors import ContextMixError, UnsupportedModel, four_parts, reason

# What a host raises that is asked for what a model does not have, or that cannot run it.
_FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def build(facts: Facts, weights: Weights) -> tuple[ModelView, IdentityReport]:
    """Returns the view of a model with these weights, and how well it reproduces the model.

    Hooks of the user's own are off meanwhile: the weights are read for what they are, and what
    the hooks do to a pass is checked on that pass.
    """
    model = facts.model
    handle = _handle(facts)
    splices = find_splices(model)
    # A host's own activation may have trained parameters (xIELU).
    with without_hooks(model, splices), _unreadable(facts), torch.no_grad():
        lists = block_lists(model, facts.encoder_only)
        readings = {
            stack: [
                [_calmed(handle, block) for block in candidates(handle, stack, prefix, layer)]
                for layer in range(len(blocks))
            ]
            for stack, (prefix, blocks) in lists.items()
        }
        view = _unsettled(facts, handle, _first(readings), weights, splices)
        view, probe = _settled(handle, view, lists, readings)
        stacks = _with_folds(dict(view.stacks), handle.dtype)
        every = [block for blocks in stacks.values() for block in blocks]
        view = replace(view, stacks=stacks, processing=find_processing(facts, every))
        view, last = _settle_readout(view, probe)
        view = replace(view, limits=_limits(view), notice=make_notice(facts, view))
        rows = (*check_rows(view, probe), *last, *hugging_face_rows(model, probe))
        sound = all(row.ok for row in rows) and not view.readout.refusal
        cause = "" if sound else why_overflown(probe)
    name = f"{view.name} ({view.host})"
    report = IdentityReport(model=name, rows=rows, limits=view.limits, cause=cause)
    return view, report


@contextmanager
def _unreadable(facts: Facts) -> Iterator[None]:
    """Turns shapes that do not fit what a block was taken for into a refusal.

    Hosts, too, raise when asked for heads that their layers do not have (Gemma 4), or to run on
    tokens what reads images, and a module that was put in another's place may lack what that one
    had.
    """
    try:
        yield
    except (ContextMixError, torch.OutOfMemoryError):
        raise
    except _FAILURES as error:
        what = (
            f"the blocks of {_name(facts)} cannot be read",
            "attention with values per head and a dense feed-forward layer",
            "This kind of block is not supported.",
        )
        if not _in_reading(error):
            what = (
                f"{_name(facts)} does not run on token ids",
                f"a {type(facts.model).__name__} that returns the logits of a few tokens",
                "Mend its forward pass, or load it anew; models of images and sound are not "
                "supported.",
            )
        raise UnsupportedModel(what[0], reason(error), *what[1:]) from error


def _in_reading(error: BaseException) -> bool:
    """Whether an error arose in what is recomputed here, not in the model's own forward pass."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    return all(frame.f_globals.get("__name__") != make_runner.__module__ for frame in frames)


def _handle(facts: Facts) -> Handle:
    first = next(facts.model.parameters())
    return Handle(weakref.ref(facts.model), facts.host, maths_dtype(first), first.device)


def _name(facts: Facts) -> str:
    named = getattr(facts.model.cfg, "model_name", None)
    return str(named or facts.architecture or type(facts.model).__name__)


_Readings = dict[str, list[list[Block]]]


def _first(readings: _Readings) -> dict[str, tuple[Block, ...]]:
    return {stack: tuple(some[0] for some in blocks) for stack, blocks in readings.items()}


def _settled(
    handle: Handle, view: ModelView, lists: Mapping[str, tuple[str, Any]], readings: _Readings
) -> tuple[ModelView, Probe]:
    """Returns the view with blocks that reproduce the model's, and the passes that say so.

    A block that is not reproduced neuron by neuron is tried with its feed-forward sublayer as one
    component, in a pass more.
    """

    def settle(readings: _Readings) -> tuple[tuple[ModelView, Probe], dict[str, list[float]]]:
        probe = run_probe(replace(view, stacks=_first(readings)))
        found = {
            stack: [*_settle(handle, lists[stack][0], blocks, probe)]
            for stack, blocks in readings.items()
        }
        stacks = {stack: tuple(block for block, _ in some) for stack, some in found.items()}
        errors = {stack: [error for _, error in some] for stack, some in found.items()}
        return (replace(view, stacks=stacks), probe), errors

    found, errors = settle(
        {stack: [_known(o) or o for o in some] for stack, some in readings.items()}
    )
    wrong = {
        (stack, layer)
        for stack, blocks in readings.items()
        for layer, options in enumerate(blocks)
        if 0 < len(_known(options)) < len(options) and errors[stack][layer] > view.tolerance
    }
    if not wrong:
        return found
    try:
        other, errors = settle(
            {
                stack: [
                    [o for o in options if not _is_known(o)]
                    if (stack, layer) in wrong
                    else _known(options) or options
                    for layer, options in enumerate(blocks)
                ]
                for stack, blocks in readings.items()
            }
        )
    except UnsupportedModel:  # some bridges do not show what a feed-forward sublayer puts out
        return found
    better = all(errors[stack][layer] <= view.tolerance for stack, layer in wrong)
    return other if better else found


def _known(options: list[Block]) -> list[Block]:
    """Returns the readings of a block whose feed-forward sublayer has neurons, or is not there."""
    return [option for option in options if _is_known(option)]


def _is_known(block: Block) -> bool:
    return block.feed_forward is None or block.feed_forward.neurons_known


def _settle(
    handle: Handle, prefix: str, readings: list[list[Block]], probe: Probe
) -> Iterator[tuple[Block, float]]:
    """Yields the reading of each block that is closest to the model, and its error."""
    solu = solu_refusal(handle.get())
    for layer, options in enumerate(readings):
        after = readings[layer + 1][0].resid_in if layer + 1 < len(readings) else None
        own = _host_activation(handle, prefix, layer)
        options = [_refuse_feed_forward(option, solu) for option in options]
        block, error = settle_block(options, probe, after or options[0].resid_out, own)
        yield with_placed_edits(block) if handle.bridge else block, error


def _with_folds(
    stacks: dict[str, tuple[Block, ...]], dtype: torch.dtype
) -> dict[str, tuple[Block, ...]]:
    """Lets blocks keep products of their weights, if those of all of them take little memory.

    All or none: which of them are at hand must not depend on what was asked before, as products
    taken in another order round differently.
    """
    every = [block for blocks in stacks.values() for block in blocks]
    if sum(block.fold_size() for block in every) * dtype.itemsize > FOLD_BYTES:
        return stacks
    return {
        stack: tuple(replace(block, folds={}) for block in blocks)
        for stack, blocks in stacks.items()
    }


def _calmed(handle: Handle, block: Block) -> Block:
    """Returns a block whose opaque module is called without hooks of the user's own.

    What they do there is seen: a pass is then not what the module makes of its input.
    """
    ff = block.feed_forward
    if not isinstance(ff, OpaqueFeedForward):
        return block
    module = ff.module

    def calm(x: Tensor) -> Tensor:
        model = handle.get()
        with lock_of(model), without_hooks(model):
            return module(x)

    return replace(block, feed_forward=replace(ff, module=calm))


def _refuse_feed_forward(block: Block, refusal: str) -> Block:
    if block.feed_forward is None or not refusal:
        return block
    return replace(block, feed_forward=replace(block.feed_forward, refusal=refusal))


def _host_activation(handle: Handle, prefix: str, layer: int) -> Activation | None:
    """Returns the host's own activation function, for those with trained parameters (xIELU)."""
    mlp = handle.get()._modules[prefix][layer]._modules.get("mlp")
    for holder in (mlp, getattr(mlp, "original_component", None)):
        function: Callable[[Tensor], Tensor] | None = getattr(holder, "act_fn", None)
        if callable(function) and (factor := getattr(holder, "gate_multiplier", 1.0)) != 1.0:
            function = partial(_multiplied, function, factor)  # Falcon-H1
        if callable(function) and _elementwise(function, handle):
            return Activation("host", function, kink=True)
    return None


def _multiplied(function: Callable[[Tensor], Tensor], factor: float, x: Tensor) -> Tensor:
    return function(x * factor)


def _elementwise(function: Callable[[Tensor], Tensor], handle: Handle) -> bool:
    """Whether a function gives each element the same alone as among others."""
    line = torch.linspace(-8, 8, 64, device=handle.device, dtype=handle.dtype)
    try:
        with torch.no_grad():
            return torch.allclose(function(line[None, None])[0, 0], function(line[:, None])[:, 0])
    except (RuntimeError, ValueError, IndexError):
        return False  # parameters for each neuron


def _settle_readout(view: ModelView, probe: Probe) -> tuple[ModelView, tuple[CheckRow, ...]]:
    """Keeps a readout that reproduces the logits; another one refuses, the maps stay."""
    if view.readout.refusal:
        return view, ()
    row = readout_row(view, probe)
    if row.ok:
        return view, (row,)
    refusal = why_overflown(probe) or four_parts(
        f"the vocabulary readout of {view.name} is not read correctly",
        f"a relative error of {row.error:.2g} against the model's logits",
        f"at most {row.tolerance:.0e}",
        "Maps of its layers are fine; vocabulary questions are not answered for this model.",
    )
    return replace(view, readout=replace(view.readout, refusal=refusal)), ()


def _limits(view: ModelView) -> tuple[str, ...]:
    """Returns what is not answered for this model: feed-forward blocks, the readout."""
    blocks = [block.feed_forward for _, block in view.every_block()]
    refusals = [ff.refusal for ff in blocks if ff is not None] + [view.readout.refusal]
    return tuple(dict.fromkeys(refusal for refusal in refusals if refusal))


def _unsettled(
    facts: Facts,
    handle: Handle,
    stacks: dict[str, tuple[Block, ...]],
    weights: Weights,
    splices: tuple[str, ...],
) -> ModelView:
    model = facts.model
    tolerance = tolerance_of({weight.dtype for weight in weights.values()}, handle.device)
    text = text_side(handle, facts, pair=len(stacks) == 2)
    layouts, unseen = find_layouts(handle, stacks), find_unseen(handle, stacks)
    return ModelView(
        name=_name(facts),
        host=type(model).__name__,
        host_version=host_version(),
        processing=(),
        fingerprint=fingerprint(weights),
        stacks=stacks,
        readout=read_readout(handle, facts.architecture),
        final_norms=final_norms(handle, stacks),
        dtype=handle.dtype,
        device=handle.device,
        n_ctx=_longest_input(facts),
        # A bridge's config takes it from whatever tokenizer it is given.
        d_vocab=int(token_embedding(model).shape[0]),
        tolerance=tolerance,
        limits=(),
        takes=arguments_taken(facts),
        hooked=make_hooked(handle, splices),
        without_hooks=lambda: without_hooks(handle.get()),
        follow=partial(follow, tolerance),
        cached=cache_reader(handle, facts, stacks, layouts, unseen),
        runner=with_unseen(make_runner(handle, text["pad_id"], splices, layouts), unseen),
        generate=make_generate(handle),
        past=make_past(handle),
        classes=facts.classes,
        answers_at=0 if facts.architecture.endswith("ForSequenceClassification") else None,
        **text,
    )


def _output_names(facts: Facts, to_string: Callable[[int], str]) -> Callable[[int], str]:
    if facts.classes:
        return facts.classes.__getitem__
    outputs = getattr(facts.model.cfg, "d_vocab_out", -1)
    # They may be classes of a toy model's own; a bridge of a Hugging Face model says nothing of it.
    wraps = facts.bridge and facts.hf_config() is not None
    tokens = wraps or outputs in (None, -1, int(token_embedding(facts.model).shape[0]))
    return to_string if tokens else str


def text_side(handle: Handle, facts: Facts, *, pair: bool) -> dict[str, Any]:
    """Returns what a view knows of text, by the names of `ModelView`.

    ``pair`` says whether the model has a decoder side beside the main one.
    """
    to_string = make_to_string(handle)
    return {
        "encode": make_encode(handle, facts),
        "encode_pair": make_encode_pair(handle, facts),
        "encode_chat": make_encode_chat(handle),
        "encode_decoder": make_encode_decoder(handle) if pair else None,
        "prompt_caution": lambda: decoder_prompt(handle.get()).caution,
        "pieces": make_pieces(handle),
        "special_ids": lambda: special_ids(handle.get()),
        "to_string": to_string,
        "to_source": make_to_source(handle) if pair else None,
        "to_output": _output_names(facts, to_string),
        "to_text": make_to_text(handle),
        "spaced": make_spaced(handle),
        "special_tokens": lambda: special_tokens(handle.get()),
        "reads_text": lambda: getattr(handle.get(), "tokenizer", None) is not None,
        "pad_id": make_pad_id(handle, facts),
        "padding": lambda: padding_of(handle.get()),
    }


def _longest_input(facts: Facts) -> int | None:
    bound = getattr(facts.model.cfg, "n_ctx", None)
    if facts.architecture.startswith("Switch"):
        # Of longer texts an expert may leave tokens out, by what else is sent to it.
        return getattr(facts.hf_config(), "expert_capacity", None)
    return None if facts.t5 or not isinstance(bound, int) or bound <= 0 else bound
