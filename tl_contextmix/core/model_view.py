"""One shape for every model: its stacks of blocks, its readout, and how it is run.

`hosts` builds a view; nothing here knows a host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.blocks import (
    Batch,
    Block,
    Identity,
    Side,
    Trace,
    Weights,
    affine,
    require_weight,
)
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.core.validation import Layers
from tl_contextmix.errors import InvalidInput, UnsupportedModel

StackName = Literal["encoder", "decoder", "cross"]
Edit = Callable[[Tensor], Tensor]
Hooks = Sequence[tuple[str, Edit | None]]
PassOutput = tuple[Tensor | None, dict[str, Tensor], dict[str, Tensor]]
Runner = Callable[[Batch, Hooks, bool, bool, bool], PassOutput]
Follow = Callable[[Trace, str, Sequence[Block], frozenset[Identity], Sequence[str] | None], Trace]
Notice = Callable[[str, Mapping[str, Any]], None]


class NeedsModel(Exception):
    """A view was given where the model itself is needed."""


@dataclass(frozen=True)
class CacheReader:
    """How an ActivationCache of a host holds activations.

    Attributes:
        other_names: Returns the other names under which an activation may be kept.
        embedded: By side (``"main"``, ``"decoder"``): names of the token embeddings, best first;
            by ``"token_type_ids"`` and ``"position_ids"``, those of the embeddings of segments and
            of positions.
        embedding: Returns the embeddings of token ids, or of those of a further argument.
        first_position: The position of a text's first token.
        read: Returns an activation, given its name, with the axes that `Trace` has it with.
        made: Of activations that no hook shows, by name: what they are made of, and how, given
            token ids and these.
    """

    other_names: Callable[[str], tuple[str, ...]]
    embedded: Mapping[str, tuple[str, ...]]
    embedding: Callable[..., Tensor]
    first_position: int = 0
    read: Callable[[str, Tensor], Tensor] = field(default=lambda name, value: value, repr=False)
    made: Mapping[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = field(
        default_factory=dict, repr=False
    )


@dataclass(frozen=True)
class Padding:
    """How a tokenizer pads.

    Attributes:
        token: Id of the padding.
        side: ``"right"`` or ``"left"``.
        begins: Whether a text may begin with the same token (GPT-2's is BOS, too).
        ends: Whether a text may end with it (what pads is often EOS).
    """

    token: int
    side: str
    begins: bool
    ends: bool


@dataclass(frozen=True)
class Readout:
    """How the last residual stream becomes logits.

    ``cap * tanh(((head(norm(x)) * scale) @ W_U + b_U) / cap)``, each step where there is one.

    Attributes:
        norm: Final norm, or None (post-LN models without one).
        head: Dense layer, activation and norm of a masked-LM head, or None.
        weights: Reads ``W_U`` and ``b_U``.
        scale: Factor before the unembedding (tied T5: d_model ** -0.5; Cohere's on logits).
        soft_cap: Soft cap of the logits, or None.
        refusal: Why there are no logits to read; empty where there are.
    """

    norm: Norm | None
    head: Callable[[Tensor], Tensor] | None = field(repr=False)
    weights: Weights = field(repr=False)
    scale: float = 1.0
    soft_cap: float | None = None
    refusal: str = ""

    def require(self) -> None:
        """Checks that there are logits to read.

        Raises:
            UnsupportedModel: If this model has no trained vocabulary readout.
        """
        if self.refusal:
            raise UnsupportedModel(self.refusal)

    @property
    def outputs(self) -> int | None:
        """How many tokens, or classes, there are logits of; None where there are no logits."""
        return None if self.refusal else len(require_weight(self.weights, "b_U"))

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Returns the logits of a residual stream.

        Raises:
            UnsupportedModel: If this model has no trained vocabulary readout.
        """
        self.require()
        x = x if self.norm is None else self.norm(x)
        x = x if self.head is None else self.head(x)
        logits = affine(x * self.scale, require_weight(self.weights, "W_U"), self.weights("b_U"))
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)


@dataclass(frozen=True)
class ModelView:
    """A model in one shape, whatever class holds it.

    Attributes:
        name: The model's name.
        host: Class of the model object.
        host_version: Version of TransformerLens.
        processing: Weight processing that was found; empty for weights as published.
        fingerprint: Hash over a sample of every weight.
        stacks: Blocks by stack: ``"decoder"``, ``"encoder"`` or both.
        readout: From the last residual stream to logits.
        final_norms: Norm after the last block of each stack that has one.
        dtype: Dtype of the maths.
        device: Where the first weights are.
        n_ctx: Longest input, or None where there is no bound.
        d_vocab: Number of token ids.
        tolerance: Largest relative error that counts as equal, by the model's own precision.
        limits: What is not answered for this model, each with its reason.
        takes: What the model's own forward takes of each token besides its id, by the argument's
            name (``token_type_ids``), each with the number of values there are, or None.
        encode: Text to token ids of the main side.
        encode_pair: Two texts to the ids of one row, and its segments where the tokenizer has any.
        encode_chat: Messages to the ids of one row, and the role of each, see `adapters.chats`.
        encode_decoder: Text, and the target language where it is named, to token ids of the decoder
            side, its prompt first; or None.
        prompt_caution: Returns what a user should know of that prompt; empty for nothing.
        pieces: A word to token ids, without special tokens, as the model predicts them.
        special_ids: Returns the ids of the ``"mask"`` and of ``"unknown"`` words, and of the
            ``"separator"`` of segments, where there are.
        to_string: A token id as text; parts of characters as bytes, see `core.pieces`.
        to_source: The same of what an encoder-decoder's encoder reads; None where it is no other.
        to_output: What the model predicts as text, by its id: a token, or a class where its
            outputs are not its tokens.
        to_text: Token ids as one text, special tokens included.
        spaced: Returns whether words begin with their space, see `Tokens.spaced`.
        special_tokens: Returns the ids of special tokens, except that of unknown words.
        reads_text: Returns whether there is a tokenizer.
        pad_id: Returns the id that pads; a tokenizer may be given to the model at any time.
        padding: Returns how the model's tokenizer pads; None without one.
        hooked: Returns where the model carries hooks of the user's own; with ``backward=True``
            those of backward passes, too.
        without_hooks: Takes them off, within a ``with`` block.
        follow: Returns a pass that hooks may have edited (trace, stack, blocks, what has to hold
            of it, where hooks are, or None for a cache), knowing which heads they changed; raises
            where what has to hold does not.
        cached: How an ActivationCache of this host holds activations.
        runner: Runs the model; see `run`.
        generate: Continues each text of a batch by at most so many tokens, as the model does.
        notice: Warns, once, where the processing of the weights changes a method with its options.
        labelled: Whether tokens have names of the user's own.
        classes: Names of what a classifier predicts; empty for a language model.
        answers_at: Where a classifier of texts gives its answer; None where each token has one.
        dictionaries: The dictionaries that stand in it, each with a hash of it.
        hears: Returns sound as frames, and what the model is given of it; None for text.
        past: Begins to keep the keys and values of some rows, see `adapters.past`; None where the
            class cannot.
    """

    name: str
    host: str
    host_version: str
    processing: tuple[str, ...]
    fingerprint: str
    stacks: Mapping[str, tuple[Block, ...]]
    readout: Readout
    final_norms: Mapping[str, Norm]
    dtype: torch.dtype
    device: torch.device
    n_ctx: int | None
    d_vocab: int
    tolerance: float
    limits: tuple[str, ...]
    takes: Mapping[str, int | None]
    encode: Callable[[str, bool | None], list[int]] = field(repr=False)
    encode_pair: Callable[[str, str], tuple[list[int], list[int] | None]] = field(repr=False)
    encode_chat: Callable[[Sequence[Mapping[str, Any]], bool], tuple[list[int], list[int]]] = field(
        repr=False
    )
    encode_decoder: Callable[..., list[int]] | None = field(repr=False)
    prompt_caution: Callable[[], str] = field(repr=False)
    pieces: Callable[[str], list[int]] = field(repr=False)
    special_ids: Callable[[], dict[str, int]] = field(repr=False)
    to_string: Callable[[int], str] = field(repr=False)
    to_output: Callable[[int], str] = field(repr=False)
    to_text: Callable[[Sequence[int]], str] = field(repr=False)
    spaced: Callable[[], bool] = field(repr=False)
    special_tokens: Callable[[], frozenset[int]] = field(repr=False)
    reads_text: Callable[[], bool] = field(repr=False)
    pad_id: Callable[[], int] = field(repr=False)
    padding: Callable[[], Padding | None] = field(repr=False)
    hooked: Callable[..., tuple[str, ...]] = field(repr=False)
    without_hooks: Callable[[], AbstractContextManager[None]] = field(repr=False)
    follow: Follow = field(repr=False)
    cached: CacheReader = field(repr=False)
    runner: Runner = field(repr=False)
    generate: Callable[[Batch, int], list[list[int]]] = field(repr=False)
    notice: Notice = field(default=lambda method, options: None, repr=False, compare=False)
    labelled: bool = False
    classes: tuple[str, ...] = ()
    answers_at: int | None = None
    dictionaries: tuple[str, ...] = ()
    to_source: Callable[[int], str] | None = field(default=None, repr=False)
    hears: Callable[[Any], tuple[Side, dict[str, Tensor]]] | None = field(default=None, repr=False)
    past: Callable[[int], Callable[[int], Mapping[str, Any]]] | None = field(
        default=None, repr=False
    )
    # Facts measured when first asked for, such as whether padding on the left is safe.
    facts: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    # What depends on weights alone and is small: the view is made anew when a weight changes.
    tables: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def run(
        self,
        batch: Batch,
        names: Sequence[str],
        *,
        edits: Mapping[str, Edit] | None = None,
        grad: bool = False,
        watch: bool = False,
        logits: bool = True,
    ) -> Trace:
        """Runs the model once and returns what was asked for.

        Args:
            batch: The tokens.
            names: Activations to keep.
            edits: Functions that replace an activation as it is computed, by name; an edited
                activation that is also asked for is kept as edited.
            grad: Whether to record gradients.
            watch: Whether to record what hooks of the user's own add.
            logits: Whether logits are needed, too. Else the pass ends with the last activation.
        """
        edits = edits or {}
        wanted = dict.fromkeys([*names, *edits])
        hooks = [(name, edits.get(name)) for name in wanted]
        output, values, added = self.runner(batch, hooks, grad, watch, logits)
        return Trace(batch, values, self.dtype, output, added)

    def blocks(self, stack: StackName | None = None) -> tuple[Block, ...]:
        """Returns the blocks of a stack; None picks the only one, or the decoder of two.

        Raises:
            InvalidInput: If the model has no such stack.
        """
        return self.stacks[self.base_stack(stack)]

    def base_stack(self, stack: StackName | None) -> str:
        """Returns the name under which a stack's blocks are kept (``"cross"``: the decoder's)."""
        has_cross = len(self.stacks) == 2
        if stack is None:
            return "decoder" if "decoder" in self.stacks else "encoder"
        known = [*self.stacks, *(["cross"] if has_cross else [])]
        if stack not in known:
            raise InvalidInput(
                f"{self.name} has no such stack",
                repr(stack),
                f"one of {known}",
                "Leave `stack` out for the stack that writes the answer.",
            )
        return "decoder" if stack == "cross" else stack

    def every_block(self) -> Iterator[tuple[str, Block]]:
        """Yields all blocks with the name of their stack."""
        for stack, blocks in self.stacks.items():
            for block in blocks:
                yield stack, block


def select_blocks(blocks: tuple[Block, ...], layer: Layers | None) -> tuple[Block, ...]:
    """Returns the blocks of the layers asked for, in the order asked.

    Raises:
        InvalidInput: If there is no such layer.
    """
    if layer is None:
        return blocks
    asked = [layer] if isinstance(layer, int) else [*layer]
    if not asked:
        raise InvalidInput(
            "no layer was asked for",
            "an empty list",
            "a layer or several",
            "Leave `layer` out for all of them.",
        )
    return tuple(blocks[_layer_number(number, len(blocks))] for number in asked)


def _layer_number(number: int, count: int) -> int:
    if not -count <= number < count:
        raise InvalidInput(
            "there is no such layer",
            repr(number),
            f"an integer from {-count} to {count - 1}",
            f"This stack has {count} layers; the first is 0.",
        )
    return number
