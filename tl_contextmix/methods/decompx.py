"""DecompX: vectors of the input tokens carried through all layers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Input, Inputs
from tl_contextmix.adapters.passes import Pass, run_asked, run_pass
from tl_contextmix.adapters.questions import AnswerInputs
from tl_contextmix.core.blocks import IDENTITIES, Block
from tl_contextmix.core.first_block import first_parts, parts_of
from tl_contextmix.core.frozen_blocks import FrozenStack, causal, freeze_stack, own_parts
from tl_contextmix.core.model_view import ModelView, StackName, select_blocks
from tl_contextmix.core.neuron_routes import Costs
from tl_contextmix.core.token_sums import beside, blocks
from tl_contextmix.core.validation import Layers, Positive, checked
from tl_contextmix.engine.logit_maps import LogitReader, logit_map
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES, Bias
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput, UnsupportedModel
from tl_contextmix.results import ContextMap, Decomposition

# Of targets, where all tokens are carried at once: so many leave 1/32 of the work for nothing.
_STRETCHES = 32
# Largest relative error of the sums, by the model's own dtype: rounding over all layers.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@method(cites=("modarressi2023decompx",), compared=True)
def decompx(
    model: object,
    input: Input,
    *,
    layer: Layers | None = None,
    stack: StackName | None = None,
    of: Literal["norm", "logit"] | None = None,
    bias: Bias = "contributor",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[AnswerInputs],
) -> ContextMap:
    r"""Returns the norm of what each input token contributes to each position, through all layers.

    .. math:: C^l_{ik} = || x^l_{i \leftarrow k} ||_2, \qquad
              x^l_i = \sum_k x^l_{i \leftarrow k} + b^l_i

    (Modarressi et al. 2023, "DecompX"). Unlike a rollout of one-layer maps, vectors are carried:
    contributions that cancel do cancel. Values are decomposed with frozen patterns
    (:math:`\sum_j A_{hij}\, x_{j \leftarrow k} W_V W_O`), norms with frozen scales, the
    feed-forward block by the slope from zero to its pre-activation (eq. 10; gated: see
    `tl_contextmix.decompose`). The first layer's input belongs to its tokens, position embeddings
    included. Biases are carried on their own and belong to no token (the paper's variant without
    biases; it also describes dividing them among tokens, which is not done here). Those of values
    and of the norm before them are among them, while in `decompose` they travel with their token:
    the first layer of this map differs from the one-layer map in that alone. The published code
    lets the value bias of the first layer alone travel with its token: its maps differ from these
    by 2e-3 where that bias is not zero (5e-7, rounding in float32, where it is).

    To a prediction (``of="logit"``, the paper's classification head) the vectors go on through the
    final norm, its scale frozen, and the unembedding:

    .. math:: l_w - l_f = \sum_k (x^L_{i \leftarrow k} \to w) - (x^L_{i \leftarrow k} \to f) + b

    with :math:`l` the model's own logits. A score then has a sign, and the scores of a row and its
    bias add up to the difference, without a foil to the target's logit. Of a set the logits' mean
    is meant, each token as likely as the model finds it among them.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        layer: Layer or layers to return; None for all. All layers below are passed anyway.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` of an encoder-decoder. Both names of the
            decoder mean the same: the sources are the decoder's input tokens followed by the
            encoder's, carried through the encoder and its final norm too.
        of: ``"norm"`` of the vectors or the ``"logit"`` of a prediction; None: the logit where a
            target or a foil is given or the model generates.
        bias: ``"contributor"`` (the paper) or ``"fixed"``, see `decompose`.
        max_bytes: Workspace: so many input tokens are carried at a time, at least one.
        **inputs: ``target``, ``foil``, ``pos`` and ``generate``, see `Asked`; mask, padding and the
            like, see `Inputs`.

    Returns:
        A `ContextMap` [batch layer 1 target source] at ``"block_out"``: norms in units of the
        residual stream after each layer, the source axis being the *input* tokens; `bias` is the
        norm of what belongs to none. Each layer's map reaches back to the input, so it is marked
        as rolled out, and `rollout` refuses to do it twice. Of logits: one signed map, a row for
        each prediction.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong; among them those whose
            vectors do not add up to the model's own residual stream, and for logits those that cap
            them or have a masked-LM head, which is not linear.

    Cost per layer: ``2 n^3 d + n^2 (4 d^2 + 4 d d_mlp)`` operations, of the first one
    ``2 n^2 (d_mlp + H) d``; little more than half of it for more than a hundred tokens of which
    none reads a later one. Where a token has many parts at once (`neuron_routes` counts), its
    slopes are folded into the weights: ``2 d^2 (d_mlp + n)`` for its feed-forward block. That takes
    ``max_bytes`` for all tokens, ``8 n^2 d`` bytes in float32: of the few that fit into less, each
    would need matrices of its own.
    """
    view, names = as_view(model), ("target", "foil", "generate")
    wanted = any(inputs.get(name) is not None for name in names)
    if of == "logit" or (of is None and wanted):
        return _to_prediction(view, input, inputs, layer, stack, bias, max_bytes)
    forward_pass = run_asked(view, input, inputs, **_needed(view, stack))
    asked = replace(forward_pass, blocks=select_blocks(forward_pass.blocks, layer))

    def norms(part: Pass) -> dict[str, tuple[str, Tensor]]:
        carried = _carry(part, asked.blocks, bias, max_bytes)
        scores = carried.norms(max_bytes)
        return {
            "scores": ("batch layer target source:block_out", scores),
            "bias": ("batch layer target", carried.bias().norm(dim=-1)),
        }

    found = forward_pass.together(norms)
    return asked.map(
        "decompx",
        found["scores"][:, :, None],
        "block_out",
        "norm, from the input",
        options={"bias": bias},
        bias=found["bias"][:, :, None],
        from_input=True,
    )


def _to_prediction(
    view: ModelView,
    input: Input,
    inputs: AnswerInputs,
    layer: Layers | None,
    stack: StackName | None,
    bias: Bias,
    max_bytes: int,
) -> ContextMap:
    """Returns what each input token brings to the logits asked about."""
    if layer is not None:
        raise InvalidInput(
            "a prediction is read after the last layer",
            f"layer={layer}",
            "all layers",
            "Leave layer out, or ask with of='norm'.",
        )

    def logits(part: Pass, read: Sequence[LogitReader]) -> Tensor:
        def of_some(first: int, parts: Tensor) -> Tensor:
            return torch.stack([_at_row(one, first, parts) for one in read], dim=1)

        (found,) = _carry(part, part.blocks[-1:], bias, max_bytes).collect(of_some)
        return torch.cat(found, dim=2)[:, :, None]

    return logit_map(
        "decompx",
        view,
        input,
        inputs,
        logits,
        max_bytes=max_bytes,
        options={"bias": bias},
        **_needed(view, stack),
    )


def _at_row(read: LogitReader, first: int, parts: Tensor) -> Float[Tensor, "batch part"]:
    """Returns the logits of parts of the stream from a position on; before it they are zero."""
    place = (read.rows - first).to(parts.device)
    each = torch.arange(len(place), device=parts.device)
    found = read.vocabulary.target_logits(parts[each, place.clamp(min=0)])
    return found * (place >= 0)[:, None]


@checked
@method(cites=("modarressi2023decompx",))
def decompx_vectors(
    model: object,
    input: Input,
    *,
    layer: Layers | None = None,
    stack: StackName | None = None,
    bias: Bias = "contributor",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[Inputs],
) -> Decomposition:
    r"""Returns what each input token contributes to each position through all layers, as vectors.

    .. math:: x^l_i = \sum_k x^l_{i \leftarrow k} + b^l_i

    exactly (to rounding: 1e-10 in float64), after every layer. Arguments and errors are those of
    `decompx`.

    Args:
        model: Any TransformerLens model.
        input: A text, several, or token ids [batch, pos].
        layer: Layer or layers to return; None for all.
        stack: See `decompx`.
        bias: See `decompx`.
        max_bytes: Workspace besides the result.
        **inputs: Mask, padding and the like, see `Inputs`.

    Returns:
        A `Decomposition` at ``"block_out"``: ``parts`` [batch layer target source d_model], the
        source axis being the input tokens. Rows of padding are not the model's.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost: that of `decompx`, and ``n^2 d_model`` numbers per layer for the result.
    """
    view = as_view(model)
    forward_pass = run_pass(view, Given(input, **inputs), **_needed(view, stack))
    asked = replace(forward_pass, blocks=select_blocks(forward_pass.blocks, layer))

    def vectors(part: Pass) -> dict[str, tuple[str, Tensor]]:
        carried = _carry(part, asked.blocks, bias, max_bytes)
        found = carried.collect(_after_zeros)
        parts = torch.stack([torch.cat(some, dim=2) for some in found], dim=1)
        return {
            "parts": ("batch layer target source:block_out", parts),
            "bias": ("batch layer target", carried.bias()),
        }

    return Decomposition(
        **forward_pass.together(vectors),
        layers=asked.layers,
        point="block_out",
        stack=asked.stack,
        target=asked.target,
        source=asked.source("block_out"),
        provenance=asked.provenance("decompx", {"bias": bias}),
    )


@dataclass(frozen=True)
class _Carried:
    """A pass whose input tokens can be carried through its layers, a few at a time.

    Attributes:
        done: The pass.
        asked: Blocks of the layers to return.
        own: Frozen blocks of the stack, up to the last layer asked for.
        encoder: Frozen encoder that the stack reads, or None.
        size: Number of tokens to carry at a time.
    """

    done: Pass
    asked: tuple[Block, ...]
    own: FrozenStack
    encoder: FrozenStack | None
    size: int

    def bias(self) -> Tensor:
        """Returns what belongs to no token [batch layer target d_model]."""
        return torch.stack([self.own.biases[block.layer] for block in self.asked], dim=1)

    def collect(self, read: Callable[[int, Tensor], Tensor]) -> list[list[Tensor]]:
        """Returns what is read per layer asked for and chunk of sources, and checks the sums.

        Args:
            read: Reads parts [batch target part d_model], given the first of their targets.
        """
        result: list[list[Tensor]] = [[] for _ in self.asked]
        totals = list(self.bias().unbind(dim=1))
        with torch.no_grad():
            for first, parts, memory, entered in self._starts():
                for layer, block in enumerate(self.own.blocks):
                    parts = block.since(first)(parts, memory, entered) if layer else parts
                    for index, asked in enumerate(self.asked):
                        if asked.layer == layer:
                            result[index].append(read(first, parts))
                            totals[index][:, first:] += parts.sum(dim=2)
        _require_complete(self.done, self.asked, totals)
        return result

    def norms(self, max_bytes: int) -> Float[Tensor, "batch layer target source"]:
        """Returns the norms of the parts after each layer asked for."""
        if self._long(max_bytes):
            return self._norms_of_all()
        found = self.collect(lambda first, parts: _after_zeros(first, parts.norm(dim=-1)))
        return torch.stack([torch.cat(some, dim=2) for some in found], dim=1)

    def _long(self, max_bytes: int) -> bool:
        """Returns whether all tokens fit at once, and folding slopes for that many is cheaper."""
        x = self.done.trace.resid_in(self.own.blocks[0].block)
        ff, (batch, count, width) = self.own.blocks[0].block.feed_forward, x.shape
        # Triangles of the stream, of values and of both once more while they are replaced, and of
        # what later blocks read again.
        triangles = 4 + sum(one.lends for one in self.own.blocks)
        targets = batch * count * (count + count // _STRETCHES) // 2
        held = triangles * targets * width * x.element_size()
        if self.encoder is not None or ff is None or ff.routes or held > max_bytes:
            return False
        own = all(a.sublayer.kind == "self" for one in self.own.blocks for a in one.attentions)
        sizes = Costs.of_parts(ff.width, width, width, 1 + ff.gated)
        return own and sizes.route(count, 1) == "folded" and causal(self.own.blocks)

    def _norms_of_all(self) -> Float[Tensor, "batch layer target source"]:
        """Returns the same with all tokens carried at once, a triangle of targets and sources."""
        x = self.done.trace.resid_in(self.own.blocks[0].block)
        rows = [*blocks(x.shape[1], -(-x.shape[1] // _STRETCHES))]
        result = x.new_zeros(len(x), len(self.asked), x.shape[1], x.shape[1])
        totals = list(self.bias().unbind(dim=1))
        with torch.no_grad():
            first, begun = self.own.blocks[0], first_parts(self.own.blocks[0], x)
            parts = [parts_of(begun, some, slice(0, some.stop)) for some in rows]
            entered: dict[int, list[Tensor]] = {}
            if first.lends:
                entered[0] = [own_parts(x, slice(0, some.stop), some) for some in rows]
            for layer, block in enumerate(self.own.blocks):
                parts = block.triangle(parts, rows, entered) if layer else parts
                for index, asked in enumerate(self.asked):
                    for some, part in zip(rows, parts, strict=True):
                        if asked.layer == layer:
                            result[:, index, some, : some.stop] = part.norm(dim=-1)
                            totals[index][:, some] += part.sum(dim=2)
        _require_complete(self.done, self.asked, totals)
        return result

    def _starts(self) -> Iterator[tuple[int, Tensor, Tensor | None, dict[int, Tensor]]]:
        """Yields the first block's output and the encoder's as parts of a few input tokens.

        Before them the first target that these tokens reach: in front of it, parts are zero. After
        them the parts of the block's input, where later blocks use its values.
        """
        trace, block = self.done.trace, self.own.blocks[0]
        x, no_later = trace.resid_in(block.block), causal(self.own.blocks)
        begun = first_parts(block, x)
        # Where only later tokens are reached, an eighth at a time leaves 56 % of the work; fewer
        # than 16 leave less, and take longer.
        size = min(self.size, max(16, -(-x.shape[1] // 8))) if no_later else self.size
        for chunk in blocks(x.shape[1], size):
            first = chunk.start if no_later else 0
            entered = {0: own_parts(x, chunk)[:, first:]} if block.lends else {}
            yield first, parts_of(begun, slice(first, x.shape[1]), chunk), None, entered
        if self.encoder is None:
            return
        source = trace.resid_in(self.encoder.blocks[0].block)
        begun = first_parts(self.encoder.blocks[0], source)
        for chunk in blocks(source.shape[1], self.size):
            memory = self.encoder.memory(parts_of(begun, slice(0, source.shape[1]), chunk))
            entered = dict[int, Tensor]()
            nothing = x.new_zeros(*x.shape[:2], *memory.shape[2:])
            yield 0, block(nothing, memory, entered), memory, entered


def _after_zeros(first: int, rows: Tensor) -> Tensor:
    """Returns rows [batch target ...] after those before the first target."""
    if first == 0:
        return rows
    return torch.cat([rows.new_zeros(len(rows), first, *rows.shape[2:]), rows], dim=1)


def _needed(view: ModelView, stack: StackName | None) -> dict[str, Any]:
    """Returns the options of a pass whose input tokens can be carried through all layers."""
    encoder = _encoder(view, stack)

    def also(block: Block) -> list[str]:
        names = [block.resid_out]
        if block.layer == 0:
            names += [name for one in encoder for name in (*one.points(), one.resid_out)]
        return names

    return {"stack": stack, "also": also, "needs": IDENTITIES - {"pattern", "z"}}


def _encoder(view: ModelView, stack: StackName | None) -> tuple[Block, ...]:
    """Returns the blocks of the encoder that a stack reads."""
    return view.stacks.get("encoder", ()) if view.base_stack(stack) == "decoder" else ()


def _carry(forward_pass: Pass, asked: tuple[Block, ...], bias: Bias, max_bytes: int) -> _Carried:
    encoder = _encoder(forward_pass.view, forward_pass.stack)
    last = max(block.layer for block in asked)
    with torch.no_grad():
        frozen = None
        if encoder:
            norm = forward_pass.view.final_norms.get("encoder")
            frozen = freeze_stack(encoder, forward_pass.trace, bias == "fixed", final_norm=norm)
        own = freeze_stack(
            forward_pass.blocks[: last + 1], forward_pass.trace, bias == "fixed", encoder=frozen
        )
    size = _size(forward_pass, (*encoder, *forward_pass.blocks), max_bytes)
    return _Carried(forward_pass, asked, own, frozen, size)


def _size(forward_pass: Pass, every: tuple[Block, ...], max_bytes: int) -> int:
    """Returns how many tokens fit: neurons of each branch twice, and eight streams per position.

    And one for each layer whose values are used again. About as much as one token takes is held of
    all of them in the first block.
    """
    x = max((forward_pass.trace.resid_in(block) for block in every), key=lambda x: x.shape[1])
    ff = every[0].feed_forward
    neurons = 0 if ff is None else 2 * ff.width * (1 + ff.gated)
    lenders = {attention.lender for block in every for attention in block.attentions} - {None}
    streams = (8 + len(lenders)) * x.shape[2]
    per_token = x.shape[0] * x.shape[1] * (neurons + streams) * x.element_size()
    return max(1, max_bytes // per_token - 1)


def _require_complete(forward_pass: Pass, asked: tuple[Block, ...], totals: list[Tensor]) -> None:
    """Raises UnsupportedModel unless the vectors add up to the model's own residual streams."""
    errors = []
    for block, total in zip(asked, totals, strict=True):
        padding = beside(total, ~forward_pass.target.mask)[..., None]
        expected = forward_pass.trace[block.resid_out]
        off = (total - expected).masked_fill(padding, 0).abs().max()
        size = expected.masked_fill(padding, 0).abs().max()
        errors.append((off / size.clamp(min=1e-30)).to(totals[0].device))
    # Of all layers at once: a GPU is waited for.
    for block, error in zip(asked, torch.stack(errors).tolist(), strict=True):
        tolerance = _TOLERANCE.get(forward_pass.trace.values[block.resid_out].dtype, 1e-4)
        if error <= tolerance:
            continue
        raise UnsupportedModel(
            f"the vectors of {forward_pass.view.name} do not add up at layer {block.layer}",
            f"a relative error of {error:.2g} against the model's own residual stream",
            f"at most {tolerance:.0e}",
            "Its values or its norms are not the plain ones, or hooks of your own edit them; "
            "one-layer maps (attention_norms) do not need W_V and still hold.",
        )
