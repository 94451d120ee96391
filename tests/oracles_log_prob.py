"""The residual stream of one position, part by part, and what Yu and Ananiadou ask of it.

Written from the paper with plain loops: every part is carried through every norm it meets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from oracles import bias_of, frozen
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, FeedForward, Trace
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.token_sums import Norm

Key = tuple[object, ...]


class Parts:
    """Everything that was written to the stream at one position, as it is there now."""

    def __init__(self, view: ModelView, trace: Trace, stack: str, row: int, pos: int) -> None:
        self.trace, self.row, self.pos = trace, row, pos
        blocks = view.stacks[stack]
        start = trace.resid_in(blocks[0])[row, pos]
        self.parts: dict[Key, Tensor] = {("embed",): start}
        for block in blocks:
            for attention in block.attentions:
                kind = "attn" if attention.kind == "self" else "cross_attn"
                self._add((kind, block.layer), dict(self._attention(attention)), attention)
            if block.feed_forward is not None:
                ff = block.feed_forward
                self._add(("mlp", block.layer), dict(self._feed_forward(ff)), ff)

    def whole(self) -> Tensor:
        """The stream."""
        return sum(self.parts.values(), torch.zeros_like(next(iter(self.parts.values()))))

    def _attention(self, attention: AttentionSublayer) -> Iterator[tuple[Key, Tensor]]:
        pattern = self.trace.pattern(attention)[self.row]
        value, W_O = self.trace.value(attention)[self.row], attention.W_O
        for head in range(W_O.shape[0]):
            for source in range(value.shape[0]):
                weight = pattern[head, self.pos, source]
                for k in range(W_O.shape[1]):
                    yield ("h", head, source, k), weight * value[source, head, k] * W_O[head, k]
        yield ("bias",), bias_of(attention.b_O, W_O[0, 0])

    def _feed_forward(self, ff: FeedForward) -> Iterator[tuple[Key, Tensor]]:
        post, W_out = self.trace[ff.post][self.row, self.pos], ff.W_out
        b_post = bias_of(ff.weights("b_post"), post)
        for k in range(W_out.shape[0]):
            yield ("n", k), (post[k] - b_post[k]) * W_out[k]
        yield ("bias",), bias_of(ff.weights("b_out"), W_out[0]) + b_post @ W_out

    def _add(
        self, name: Key, own: dict[Key, Tensor], sublayer: AttentionSublayer | FeedForward
    ) -> None:
        output = sum(own.values(), torch.zeros_like(next(iter(own.values()))))
        if sublayer.norm_out is not None:
            own = self._normed(own, sublayer.norm_out, output, ("bias",))
        self.parts |= {(*name, *key): part for key, part in own.items()}
        if sublayer.norm_after is not None:
            bias = (*name, "bias")
            self.parts = self._normed(self.parts, sublayer.norm_after, self.whole(), bias)

    @staticmethod
    def _normed(parts: dict[Key, Tensor], norm: Norm, whole: Tensor, bias: Key) -> dict:
        found = {key: frozen(norm, part, whole) for key, part in parts.items()}
        found[bias] = found[bias] + bias_of(norm.bias, found[bias])
        return found

    def summed(self, keep: tuple[int, ...]) -> dict[Key, Tensor]:
        """The parts added up over all places of their keys but some; biases stay as they are."""
        found: dict[Key, Tensor] = {}
        for key, part in self.parts.items():
            short = key if "bias" in key else tuple(key[i] for i in keep if i < len(key))
            found[short] = found.get(short, torch.zeros_like(part)) + part
        return found


def log_probs(view: ModelView, state: Tensor, whole: Tensor, rule: str) -> Tensor:
    """The distribution that a state of the stream gives, under a rule for the final norm."""
    readout = view.readout
    norm, W_U, b_U = readout.norm, readout.weights("W_U"), readout.weights("b_U")
    if readout.head is not None:
        hidden = readout.head(state)
    elif norm is None:
        hidden = state
    elif rule == "recompute":
        hidden = frozen(norm, state, state) + bias_of(norm.bias, state)
    else:
        hidden = frozen(norm, state, whole)
        if rule == "frozen+beta":
            hidden = hidden + bias_of(norm.bias, state)
    assert W_U is not None
    logits = hidden * readout.scale @ W_U
    if rule != "frozen":
        logits = logits + bias_of(b_U, logits)
    if readout.soft_cap is not None:
        logits = readout.soft_cap * torch.tanh(logits / readout.soft_cap)
    return logits - logits.exp().sum().log()
