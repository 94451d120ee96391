"""Puts dictionaries into the view of a model: features where neurons were, or in the stream.

A hook point's name says in which block a dictionary stands. Which of the block's quantities it
shows differs between classes and versions (a norm's output before or after its gain, an output
before or after a norm of it), so that is read off the numbers of a pass over four tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tl_contextmix.adapters.dictionaries import Dictionaries, Dictionary
from tl_contextmix.adapters.verification import probe_batch, relative_error
from tl_contextmix.core.blocks import Batch, Block, EditPoints, FeedForward, Rewrite, Trace, affine
from tl_contextmix.core.model_view import Hooks, ModelView, PassOutput, Runner
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.errors import InvalidInput, UnsupportedModel


def with_dictionaries(view: ModelView, given: Dictionaries) -> ModelView:
    """Returns the view with dictionaries in the place of what they stand for.

    A pass then has their features as well, and what they miss; the model itself runs as it is.

    Args:
        view: The model.
        given: A `Dictionary`, several, or None.

    Raises:
        InvalidInput: If one does not fit the model, or two stand at one place.
    """
    some = (given,) if isinstance(given, Dictionary) else tuple(given or ())
    if not some:
        return view
    stacks = {name: [*blocks] for name, blocks in view.stacks.items()}
    placed = []
    for dictionary in some:
        stack, block = _block_of(view, dictionary)
        one = _place(view, dictionary, block)
        before = stacks[stack][block.layer]
        occupied = before.rewrite if one.written is not None else before.feed_forward
        if isinstance(occupied, Rewrite) or (occupied is not None and occupied.point):
            raise InvalidInput(
                "two dictionaries stand at one place",
                f"another one at {dictionary.hook_name}",
                "one for each feed-forward block, and one in each block's stream",
                "Ask about them one by one.",
            )
        stacks[stack][block.layer] = one.into(before)
        placed.append(one)
    return replace(
        view,
        stacks={name: tuple(blocks) for name, blocks in stacks.items()},
        runner=_runner(view, placed),
        dictionaries=tuple(f"{one!r}, {one.fingerprint}" for one in some),
        facts={},
        tables={},
    )


def layers_of(view: ModelView, stack: str) -> list[int]:
    """Returns the layers of a stack in which dictionaries stand."""
    return [block.layer for block in view.stacks[stack] if block.made()]


@dataclass(frozen=True)
class _Placed:
    """A dictionary in a block.

    Attributes:
        dictionary: The dictionary.
        features: Its features as a feed-forward sublayer.
        written: Of one in the stream: how many of the block's sublayers have written by then.
    """

    dictionary: Dictionary
    features: FeedForward
    written: int | None

    def into(self, block: Block) -> Block:
        """Returns a block with it."""
        if self.written is None:
            return replace(block, feed_forward=self.features, folds=None)
        return replace(block, rewrite=Rewrite(self.written, self.features))

    def activations(self, values: dict[str, Tensor], view: ModelView) -> dict[str, Tensor]:
        """Returns its activations by name, given those of the hook points."""
        found = [values[name].to(view.dtype) for name in self.dictionary.hooks]
        ff = self.features
        (pre,) = ff.pre_activations(found[0])
        post = ff.activate([pre])
        made = affine(post, ff.W_out, ff.weights("b_out"))
        return {ff.pre: pre, ff.post: post, ff.missing: found[-1] - made}


def _runner(view: ModelView, placed: Sequence[_Placed]) -> Runner:
    """Returns a runner of the model that also has the activations of dictionaries."""
    own = {name: one for one in placed for name in _made(one.features)}

    def run(batch: Batch, hooks: Hooks, grad: bool, watch: bool, logits: bool) -> PassOutput:
        asked = [one for one in placed if any(own.get(name) is one for name, _ in hooks)]
        more = {name: None for one in asked for name in one.dictionary.hooks}
        wanted: dict[str, Any] = more | {n: edit for n, edit in hooks if n not in own}
        output, values, added = view.runner(batch, [*wanted.items()], grad, watch, logits)
        for one in asked:
            values |= one.activations(values, view)
        return output, values, added

    return run


def _made(ff: FeedForward) -> tuple[str, str, str]:
    return ff.pre, ff.post, ff.missing


def _prefix(block: Block) -> str:
    return block.resid_in.rpartition(".")[0]


def _block_of(view: ModelView, dictionary: Dictionary) -> tuple[str, Block]:
    """Returns the stack and the block whose hook points a dictionary names."""
    for stack, block in view.every_block():
        start = f"{_prefix(block)}."
        if all(name.startswith(start) for name in dictionary.hooks):
            return stack, block
    raise InvalidInput(
        f"{view.name} has no block for this dictionary",
        repr(dictionary),
        f"hook points of one block, such as {view.blocks()[0].resid_in}",
        "Transcoders that write to several layers are not supported.",
    )


def _place(view: ModelView, dictionary: Dictionary, block: Block) -> _Placed:
    names = [*block.points(), *block.checkpoints(), *dictionary.hooks]
    try:
        with view.without_hooks():
            trace = view.run(probe_batch(view), list(dict.fromkeys(names)))
    except UnsupportedModel as error:
        raise InvalidInput(
            f"{view.name} does not show what this dictionary reads or stands for",
            repr(dictionary),
            "hook points of this class of TransformerLens that fire",
            "Name the same place as this model does; model.hook_dict lists its hook points.",
        ) from error
    if dictionary.hook_name_out:
        return _transcoder(view, dictionary, block, trace)
    return _in_stream(view, dictionary, block, trace)


def _transcoder(view: ModelView, dictionary: Dictionary, block: Block, trace: Trace) -> _Placed:
    """Returns a dictionary in the place of a feed-forward block's neurons."""
    ff = block.feed_forward
    if ff is None:
        raise _not_there(view, dictionary, "a block without a feed-forward sublayer")
    stream, norm = block.feed_forward_input(trace), ff.norm_in
    inputs: list[Norm | None] = [None]
    inputs += [] if norm is None else [norm, replace(norm, weight=None, bias=None)]
    read = trace[dictionary.hook_name]
    errors = [relative_error(stream if n is None else n(stream), read) for n in inputs]
    raw = replace(ff, norm_out=None).project(trace[ff.post])
    outputs = [(ff.norm_out, raw)]
    outputs += [] if ff.norm_out is None else [(None, ff.norm_out(raw))]
    written = trace[dictionary.hook_name_out]
    misses = [relative_error(made, written) for _, made in outputs]
    _require_fit(view, dictionary, (min(errors), min(misses)), (read, written))
    features = replace(
        _features(view, dictionary, block, "mlp"),
        norm_in=inputs[errors.index(min(errors))],
        norm_out=outputs[misses.index(min(misses))][0],
        norm_after=ff.norm_after,
        edits=EditPoints(stream=ff.edits.stream),
    )
    return _Placed(dictionary, features, None)


def _in_stream(view: ModelView, dictionary: Dictionary, block: Block, trace: Trace) -> _Placed:
    """Returns a dictionary in the residual stream of a block."""
    read = trace[dictionary.hook_name]
    points = [*_points(block, trace)]
    errors = [relative_error(stream, read) for _, stream in points]
    best = min(range(len(points)), key=lambda place: (not errors[place] >= 0, errors[place]))
    _require_fit(view, dictionary, (errors[best],), (read, read))
    return _Placed(dictionary, _features(view, dictionary, block, points[best][0]), best)


def _points(block: Block, trace: Trace) -> Iterator[tuple[str, Tensor]]:
    """Yields the points of a block's stream and what they are, one after each sublayer."""
    stream = trace.resid_in(block)
    yield "resid_pre", stream
    if block.parallel or any(sublayer.norm_after is not None for sublayer in block.sublayers):
        return  # between the sublayers there is no one stream, or a norm stands on it
    for attention in block.attentions:
        stream = stream + attention.output(trace)
        yield "resid_mid" if attention.kind == "self" else "resid_mid_cross", stream
    if block.feed_forward is not None:
        yield "resid_post", trace[block.resid_out]


def _features(view: ModelView, dictionary: Dictionary, block: Block, point: str) -> FeedForward:
    """Returns the features of a dictionary as the neurons of a feed-forward sublayer."""
    names = {"W_in": "W_enc", "b_in": "b_enc", "W_out": "W_dec", "b_out": "b_dec"}
    weights = {
        name: getattr(dictionary, own).to(view.device, view.dtype) for name, own in names.items()
    }
    base = f"{_prefix(block)} {point}"
    return FeedForward(
        pre=f"{base} pre-activations of features",
        post=f"{base} features",
        pre_linear=None,
        weights=weights.get,
        activation=dictionary.activation_function(),
        point=point,
        missing=f"{base} error",
    )


def _require_fit(
    view: ModelView,
    dictionary: Dictionary,
    errors: tuple[float, ...],
    shown: tuple[Tensor, Tensor],
) -> None:
    """Raises InvalidInput unless a dictionary reads, and stands for, what is known of its block."""
    sizes = [tensor.shape[-1] for tensor in shown]
    expected = [dictionary.W_enc.shape[0], dictionary.W_dec.shape[1]]
    if sizes != expected:
        raise _not_there(view, dictionary, f"hook points of width {sizes} for {expected}")
    if not all(error <= view.tolerance for error in errors):
        raise _not_there(view, dictionary, f"a relative error of {max(errors):.2g}")


def _not_there(view: ModelView, dictionary: Dictionary, why: str) -> InvalidInput:
    return InvalidInput(
        f"this dictionary has no place in {view.name}",
        f"{dictionary!r}: {why}",
        "the residual stream in front of, between or after sublayers (a post-LN or parallel block: "
        "in front of it), or the input and the output of a feed-forward block",
        "Dictionaries at other hook points are not supported.",
    )
