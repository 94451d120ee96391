"""One pass of the model over what was given, labelled, and the rows of it that are asked about."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tl_contextmix.adapters.inputs.activation_cache import trace_of
from tl_contextmix.adapters.inputs.crops import Crop, crops
from tl_contextmix.adapters.inputs.padding import require_safe_padding
from tl_contextmix.adapters.inputs.tokens import Given, Input, label_sides, read_batch
from tl_contextmix.adapters.questions.asked import Answer, Asked, split_answer
from tl_contextmix.adapters.questions.predictions import Predictions, read_rows
from tl_contextmix.adapters.questions.question import Question, ask
from tl_contextmix.adapters.tokenizers import name_tokens
from tl_contextmix.core.blocks import IDENTITIES, Batch, Block, Identity, Trace
from tl_contextmix.core.finite import why_not_finite
from tl_contextmix.core.model_view import Edit, ModelView, StackName, select_blocks
from tl_contextmix.core.validation import Layers
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import ContextMap, Provenance, Tokens
from tl_contextmix.results.labels import package_version

K = TypeVar("K", bound=str)
_LOGITS = "the logits"


@dataclass(frozen=True)
class Pass:
    """A forward pass and what is asked of it; the model runs when it is looked at.

    Rows of unlike length run in groups (`parts`), so that nothing is computed of padding.

    Attributes:
        view: The model.
        batch: The tokens.
        stack: The stack that was asked for.
        blocks: The blocks that were asked for.
        tokens: Labels of each side: ``"encoder"`` and/or ``"decoder"``.
        run: Runs the model over a batch.
        crops: The groups that it runs in; empty where it runs as a whole.
        crop: What it is of a larger pass, or None.
        asked: The predictions whose rows of a map are asked about; None for all rows.
        held: Whether what is asked for takes the routing of experts as given.
    """

    view: ModelView
    batch: Batch
    stack: StackName
    blocks: tuple[Block, ...]
    tokens: Mapping[str, Tokens]
    run: Callable[[Batch], Trace] = field(repr=False)
    crops: tuple[Crop, ...] = ()
    crop: Crop | None = None
    asked: Predictions | None = None
    held: bool = False

    @property
    def kind(self) -> Literal["self", "cross"]:
        """The kind of attention that was asked for."""
        return "cross" if self.stack == "cross" else "self"

    @functools.cached_property
    def trace(self) -> Trace:
        """Its activations; where it ran in groups, all of it, with zeros at padding."""
        return self._joined(lambda part: part.run(part.batch))

    def rerun(self, names: Sequence[str] = (), edits: Mapping[str, Edit] | None = None) -> Trace:
        """Runs the model once more, without a look at its activations.

        Args:
            names: Activations to keep.
            edits: Functions that replace an activation of the whole batch, number by number.
        """

        def run(part: Pass) -> Trace:
            own = {name: partial(self._edited, part, name, edit) for name, edit in given.items()}
            return self.view.run(part.batch, names, edits=own if self.crops else given)

        given = edits or {}
        return self._joined(run)

    def _joined(self, run: Callable[[Pass], Trace]) -> Trace:
        """Returns the activations of all parts."""
        if not self.crops:
            return run(self)

        def activations(part: Pass) -> dict[str, tuple[str, Tensor]]:
            trace = run(part)
            logits = {} if trace.logits is None else {_LOGITS: trace.logits}
            values = {**trace.values, **logits}
            return {name: (self._axes_of(name), value) for name, value in values.items()}

        values = self.together(activations)
        logits = values.pop(_LOGITS, None)
        return Trace(batch=self.batch, values=values, dtype=self.view.dtype, logits=logits)

    def _edited(self, part: Pass, name: str, edit: Edit, value: Tensor) -> Tensor:
        """Returns a part of an activation as an edit of the whole leaves it."""
        shape, pairs = self._places(self._axes_of(name), part, value)
        whole, result = value.new_zeros(shape), value.clone()
        for to, at in pairs:
            whole[to] = value[at]
        whole = edit(whole)
        for to, at in pairs:
            result[at] = whole[to]
        return result

    @functools.cached_property
    def _activation_axes(self) -> dict[str, str]:
        """The axes of activations by name: batch, heads, and positions of a side."""
        result: dict[str, str] = {}
        for stack, block in self.view.every_block():
            result |= dict.fromkeys(_names(block), f"batch {stack}")
            for attention in block.attentions:
                read = "encoder" if attention.kind == "cross" else stack
                result |= dict.fromkeys((attention.key, attention.value), f"batch {read}")
                result[attention.pattern] = f"batch head {stack} {read}"
                result |= {attention.gate: f"batch {stack}"} if attention.gate else {}
        return result

    def _axes_of(self, name: str) -> str:
        return self._activation_axes.get(name) or f"batch {self.view.base_stack(None)}"

    def parts(self) -> Iterator[Pass]:
        """Yields what it runs in: itself, or groups of rows of like length."""
        if not self.crops:
            yield self
        for crop in self.crops:
            batch = crop.of(self.batch)
            tokens = label_sides(self.view, batch)
            yield replace(self, batch=batch, tokens=tokens, crops=(), crop=crop)

    def together(
        self,
        compute: Callable[[Pass], Mapping[K, tuple[str, Tensor]]],
        rows: Sequence[int] | None = None,
    ) -> dict[K, Tensor]:
        """Returns what is computed of every part, put together.

        Args:
            compute: Returns tensors of a part by name, each with its axes. The first is the batch;
                ``"target"``, ``"encoder"`` and ``"decoder"`` are positions of a stack,
                ``"source:mlp_in"`` what is read up to a point, ``"rows"`` the targets asked for
                that are in this part (`own`). Others, and those that are not named, have one
                length in every part.
            rows: Targets asked for; None: all.

        Returns:
            The tensors of the whole batch, 0 where there is padding.
        """
        result: dict[K, Tensor] = {}
        for part in self.parts():
            for name, (axes, value) in compute(part).items():
                value = part._without_padding(axes, value, part.own(rows))
                if part.crop is None:
                    result[name] = value
                    continue
                shape, pairs = self._places(axes, part, value, rows)
                if name not in result:
                    result[name] = value.new_zeros(shape)
                for to, at in pairs:
                    result[name][to] = value[at]
        return result

    def _without_padding(self, axes: str, value: Tensor, rows: list[int] | None) -> Tensor:
        """Returns what was computed of a part with 0 at its padding."""
        for place, axis in enumerate(axes.split()):
            sides = self._sides_of(axis)
            masks = [self.tokens[side].mask for side in sides]
            if not masks or all(bool(mask.all()) for mask in masks):
                continue
            mask = torch.cat(masks, dim=1)
            mask = mask if axis != "rows" or rows is None else mask[:, rows]
            shape = [len(mask), *[1] * (value.ndim - 1)]
            shape[place] = mask.shape[1]
            value = value.masked_fill(~mask.view(shape).to(value.device), 0)
        return value

    def by_block(
        self,
        what: str,
        axes: str,
        compute: Callable[[Pass, Block], Tensor],
        rows: Sequence[int] | None = None,
        *,
        anew: Callable[[Pass, Block], Tensor] | None = None,
    ) -> Tensor:
        """Returns a tensor of every block, stacked after the batch; without gradients.

        Args:
            what: Name of the method, for the progress bar.
            axes: Names of the axes of the tensor of one block, see `together`.
            compute: Returns it for a block of a part.
            rows: See `together`.
            anew: Computes it again where it has NaN.
        """
        batch, others = axes.split(maxsplit=1)

        def blocks(part: Pass) -> dict[str, tuple[str, Tensor]]:
            found = [compute(part, block) for block in part.progress(what)]
            if anew is not None:
                odd = torch.stack([one.isnan().any() for one in found]).tolist()
                each = zip(found, part.blocks, odd, strict=True)
                found = [anew(part, block) if again else one for one, block, again in each]
            return {what: (f"{batch} layer {others}", torch.stack(found, dim=1))}

        with torch.no_grad():
            return self.together(blocks, rows)[what]

    def own(self, rows: Sequence[int] | None) -> list[int] | None:
        """Returns the positions in this part of some targets of the whole pass; None: all."""
        if rows is None or self.crop is None:
            return None if rows is None else [*rows]
        length = self.target.shape[1]
        return [row - self._start for row in rows if 0 <= row - self._start < length]

    def own_positions(self, targets: Tensor) -> Tensor:
        """Returns a target of each sentence of the whole pass as a position in this part."""
        return (targets if self.crop is None else targets[[*self.crop.rows]]) - self._start

    def own_question(self, question: Question) -> Question:
        """Returns what is asked of the sentences of this part, each asked about once."""
        if self.crop is None:
            return question
        own = question.at([*self.crop.rows])
        each = torch.arange(len(own.rows))
        rows = self.own_positions(question.rows)
        return replace(own, batch=self.batch, sentences=each, rows=rows)

    @property
    def _start(self) -> int:
        """The position of the first target in the whole pass."""
        crop = self.crop
        return 0 if crop is None else crop.columns(self.view.base_stack(self.stack)).start

    def _places(
        self, axes: str, part: Pass, value: Tensor, rows: Sequence[int] | None = None
    ) -> tuple[list[int], list[tuple[Any, Any]]]:
        """Returns the shape of a tensor of all parts, and where what is one's is in both."""
        assert part.crop is not None
        sizes = [len(self.batch.main.ids)]
        pairs: list[list[tuple[Any, Any]]] = [[(row, i) for i, row in enumerate(part.crop.rows)]]
        for axis, size in itertools.zip_longest(axes.split()[1:], value.shape[1:], fillvalue=""):
            whole, stretches = self._stretches(str(axis), int(size), part.crop, rows)
            sizes.append(whole)
            pairs.append(stretches)
        found = (zip(*one, strict=True) for one in itertools.product(*pairs))
        return sizes, [(to, at) for to, at in found]

    def _stretches(
        self, axis: str, size: int, crop: Crop, rows: Sequence[int] | None
    ) -> tuple[int, list[tuple[slice, slice]]]:
        """Returns the length of an axis, and its stretches that are a part's, on both axes."""
        if axis == "rows" and rows is not None:
            columns = crop.columns(self.view.base_stack(self.stack))
            mine = [i for i, row in enumerate(rows) if row in columns]
            return len(rows), [(slice(i, i + 1), slice(n, n + 1)) for n, i in enumerate(mine)]
        length = own = 0
        pairs = []
        for side in self._sides_of(axis):
            columns = crop.columns(side)
            to = slice(length + columns.start, length + columns.stop)
            pairs.append((to, slice(own, own + len(columns))))
            length, own = length + self.tokens[side].shape[1], own + len(columns)
        return (length, pairs) if pairs else (size, [(slice(None), slice(None))])

    def _sides_of(self, axis: str) -> tuple[str, ...]:
        """Returns the sides whose positions an axis is; none where it is something else."""
        if axis in ("target", "rows"):
            return (self.view.base_stack(self.stack),)
        if axis.startswith("source:"):
            return self._sides(axis.removeprefix("source:"))
        return (axis,) if axis in self.tokens else ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that were asked for."""
        return tuple(block.layer for block in self.blocks)

    def progress(self, what: str) -> Iterator[Block]:
        """Yields the blocks, with a progress bar on a terminal once two seconds have passed."""
        # tqdm's own switches: silent without a terminal, and until it has taken `delay` seconds.
        yield from tqdm(self.blocks, desc=what, unit="layer", delay=2, leave=False, disable=None)

    @property
    def target(self) -> Tokens:
        """Labels of the positions that are written."""
        return self.tokens[self.view.base_stack(self.stack)]

    def source(self, point: str) -> Tokens:
        """Returns the labels of the positions that are read, up to a point of the block.

        Past its cross-attention a decoder block has read its own tokens and the encoder's: the
        source axis is then both, the decoder's first.
        """
        first, *more = (self.tokens[side] for side in self._sides(point))
        return first.cat(more[0]) if more else first

    def _sides(self, point: str) -> tuple[str, ...]:
        """Returns the sides that are read, up to a point of the block."""
        if len(self.view.stacks) == 1 or self.stack == "encoder":
            return (self.view.base_stack(self.stack),)
        if self.stack == "decoder" and point in ("attn_out", "resid_mid"):
            return ("decoder",)
        if self.stack == "cross" and point == "attn_out":
            return ("encoder",)
        return ("decoder", "encoder")

    def map(
        self,
        method: str,
        scores: Float[Tensor, "batch layer head target source"],
        at: str,
        unit: str,
        *,
        heads: Sequence[str] = ("all",),
        options: Mapping[str, Any] = MappingProxyType({}),
        **facts: Any,
    ) -> ContextMap:
        """Returns a method's map, labelled.

        Args:
            method: Name of the method.
            scores: Its scores of the blocks that were asked for, 0 at padding (`together`).
            at: The point up to which sources were read, see `source`.
            unit: Of the scores.
            heads: Labels of the heads.
            options: What the method was asked for.
            **facts: Further fields of `ContextMap`, and those that differ.
        """
        mixed = [mixer.out for block in self.blocks for mixer in block.mixers]
        options = {**options, "mixers": mixed} if mixed else options
        fields: dict[str, Any] = {
            "scores": scores,
            "layers": self.layers,
            "heads": tuple(heads),
            "point": at,
            "stack": self.stack,
            "target": self.target,
            "source": self.source(at),
            "unit": unit,
            "includes_residual": True,
            "provenance": self.provenance(method, options),
        }
        result = ContextMap(**{**fields, **facts})
        if self.asked is None:
            return result
        return self.asked.rows_of(result, whole="source" not in facts)

    def provenance(self, method: str, options: Mapping[str, Any], **given: str) -> Provenance:
        """Returns where the results of a method on this pass come from; see `provenance`."""
        if self.held:
            options = {"routing": "held", **options}
        return provenance(self.view, method, options, further=self.batch.further, **given)


def run_pass(
    view: ModelView,
    given: Given,
    *,
    layer: Layers | None = None,
    stack: StackName | None = None,
    also: Callable[[Block], Sequence[str]] | None = None,
    needs: Collection[Identity] = IDENTITIES,
    batch: Batch | None = None,
    whole: bool = False,
    logits: bool = False,
) -> Pass:
    """Returns a pass of the model over what was given (or of the cache), its axes labelled.

    It runs when its trace, or that of a part, is asked for, and once. Hooks of the user's own stay
    on and are part of the pass.

    Args:
        view: The model.
        given: Input, masks and cache.
        layer: Layer or layers; None for all of the stack, negative from the end.
        stack: Which stack; None for the only one, or the decoder of an encoder-decoder.
        also: Names of further activations that the caller needs of each block.
        needs: What the caller needs to hold of each block where hooks edited the pass.
        batch: The tokens, where they are not simply those of the input.
        whole: Whether all rows have to run together, whatever their lengths.
        logits: Whether the model's output is needed, too. Else the pass ends with the last
            activation that is.

    Raises:
        InvalidInput: If something given does not fit the model. When the model runs: if its own
            activations are not finite.
        UnsupportedModel: When the model runs, if the user's hooks edit the pass so that what is
            needed does not hold.
    """
    view = name_tokens(view, given.labels)
    base = view.base_stack(stack)
    blocks = select_blocks(view.stacks[base], layer)
    batch = read_batch(view, given) if batch is None else batch
    names = [name for block in blocks for name in (*block.points(), *(also(block) if also else ()))]

    def run(some: Batch) -> Trace:
        return fresh_trace(view, some, base, blocks, names, needs, logits=logits)

    def read(some: Batch) -> Trace:
        assert given.cache is not None
        trace = trace_of(view, given.cache, some, blocks, names)
        _require_finite(trace, base, blocks)
        return view.follow(trace, base, blocks, frozenset(needs), None)

    groups = ()
    if given.cache is None and not whole and len(batch.main.ids) > 1:
        groups = crops(view, batch)
    if not groups and not bool(batch.main.mask.all()):
        require_safe_padding(view, batch.main, placed="position_ids" in batch.further)
    return Pass(
        view=view,
        batch=batch,
        stack=cast("StackName", base if stack is None else stack),
        blocks=blocks,
        tokens=label_sides(view, batch),
        run=run if given.cache is None else read,
        crops=groups,
        held="activation" in needs
        and any(b.feed_forward and b.feed_forward.routes for b in blocks),
    )


def run_asked(view: ModelView, input: Input, inputs: Mapping[str, Any], **options: Any) -> Pass:
    """Returns a pass over an input and the answer to it, whose maps have the rows asked about.

    Args:
        view: The model.
        input: The input.
        inputs: What `AnswerInputs` has.
        **options: Those of `run_pass`.

    Raises:
        InvalidInput: See `read_rows`.
    """
    if all(inputs.get(name) is None for name in Asked.__annotations__):
        given = {name: value for name, value in inputs.items() if name not in Asked.__annotations__}
        return run_pass(view, Given(input, **given), **options)
    given, answer = split_answer(input, inputs)
    batch, label = read_rows(name_tokens(view, given.labels), given, answer, options.get("stack"))
    forward_pass = run_pass(view, given, batch=batch, **options)
    return replace(forward_pass, asked=label(forward_pass.target))


def ask_in_pass(
    view: ModelView, given: Given, answer: Answer, **options: Any
) -> tuple[Question, Pass]:
    """Returns what is asked, and a pass over the input and the answer.

    Args:
        view: The model.
        given: The input.
        answer: What is asked.
        **options: Those of `run_pass`.
    """
    view = name_tokens(view, given.labels)
    view.readout.require()
    question = ask(view, read_batch(view, given), answer)
    return question, run_pass(view, given, batch=question.batch, **options)


def _names(block: Block) -> Iterator[str]:
    """Yields the names of a block's activations; those of its keys and values are not all its."""
    yield from (block.resid_in, block.resid_out, *block.spared(), *block.checkpoints())


def fresh_trace(
    view: ModelView,
    batch: Batch,
    stack: str,
    blocks: tuple[Block, ...],
    names: Sequence[str],
    needs: Collection[Identity],
    *,
    logits: bool = True,
) -> Trace:
    """Runs the model on a batch, the user's own hooks included.

    Args:
        view: The model.
        batch: The tokens.
        stack: The stack that is asked about.
        blocks: Its blocks that are asked about.
        names: Activations to keep.
        needs: See `run_pass`.
        logits: See `run_pass`.

    Raises:
        InvalidInput: If the model's own activations are not finite.
        UnsupportedModel: If the user's hooks edit the pass so that this does not hold.
    """
    hooked = view.hooked()
    more = [
        name for block in blocks for name in (block.checkpoints() if hooked else block.spared())
    ]
    trace = view.run(batch, [*names, *more], watch=bool(hooked), logits=logits)
    _require_finite(trace, stack, blocks)
    return view.follow(trace, stack, blocks, frozenset(needs), hooked) if hooked else trace


def _require_finite(trace: Trace, stack: str, blocks: tuple[Block, ...]) -> None:
    mask = trace.batch.side(stack).mask
    names = [
        name
        for block in blocks
        for name in (block.resid_in, *(attention.mixed for attention in block.attentions))
        if name in trace.values
    ]
    if not names:
        return
    # Asked once for all of them: a GPU would wait for each answer.
    finite = [trace.values[name].isfinite() for name in names]
    if bool(torch.stack([some.all().to(finite[0].device) for some in finite]).all()):
        return
    real = [(some.flatten(2).all(dim=2) | ~mask.to(some.device)).all() for some in finite]
    name = next((name for name, fine in zip(names, real, strict=True) if not bool(fine)), None)
    if name is None:
        return
    where, dtype = f"{name}, at a real token", trace.values[name].dtype
    raise InvalidInput(why_not_finite(where, dtype, padded=not bool(mask.all())))


def provenance(
    view: ModelView,
    method: str,
    options: Mapping[str, Any],
    *,
    further: Mapping[str, Tensor] = MappingProxyType({}),
    **given: str,
) -> Provenance:
    """Returns where the results of a method on a model come from.

    Warns where the processing of the weights changes them.

    Args:
        view: The model.
        method: Name of the method.
        options: What it was asked for.
        further: What the pass was given of each token besides its id.
        given: What else decides whether processing matters; see `weight_processing.changed_by`.
    """
    if view.processing:
        view.notice(method, {**options, **given})
    return Provenance(
        method=method,
        options={
            **options,
            **{name: _recorded(value) for name, value in further.items()},
            **({"dictionary": list(view.dictionaries)} if view.dictionaries else {}),
        },
        model=view.name,
        host=view.host,
        host_version=view.host_version,
        version=package_version(),
        processing=view.processing,
        fingerprint=view.fingerprint,
    )


def _recorded(value: Tensor) -> Any:
    """Returns what was given of each token; of sound a hash."""
    if not value.is_floating_point():
        return value.tolist()
    return hashlib.sha256(value.detach().cpu().double().numpy().tobytes()).hexdigest()[:16]
