"""Slow, literal equations of the papers: what the package must agree with.

Written from the papers, with loops over tokens and heads, and without anything of the engine.
Weights and activations come through the view, which is checked against the host on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tl_contextmix.core.blocks import AttentionSublayer, Block, FeedForward, Trace
from tl_contextmix.core.experts import Experts
from tl_contextmix.core.token_sums import Norm


def frozen(norm: Norm | None, part: Tensor, whole: Tensor) -> Tensor:
    """LayerNorm's linear part on a part, its scale taken from the whole (2021, eq. 7)."""
    if norm is None:
        return part
    centred_part, centred = part, whole
    if norm.kind == "ln":
        centred_part = part - part.mean()
        centred = whole - whole.mean()
    scale = torch.sqrt((centred**2).mean() + norm.eps)
    return centred_part / scale * (1 if norm.weight is None else norm.weight)


def bias_of(bias: Tensor | None, like: Tensor) -> Tensor:
    """A bias, or zeros."""
    return torch.zeros_like(like) if bias is None else bias


class Position:
    """One target position of one block: its parts per source and its bias, point by point."""

    def __init__(self, block: Block, trace: Trace, row: int, target: int, stack: str) -> None:
        self.block, self.trace, self.row, self.target = block, trace, row, target
        self.x = trace.resid_in(block)[row, target]
        self.points: dict[str, tuple[list[Tensor], Tensor]] = {}
        self._attentions("cross" if stack == "cross" else "self")

    def _attention_parts(self, attention: AttentionSublayer) -> tuple[list[Tensor], Tensor]:
        pattern = self.trace.pattern(attention)[self.row]
        value = self.trace.value(attention)[self.row]
        parts = []
        for source in range(pattern.shape[2]):
            part = torch.zeros_like(self.x)
            for head in range(pattern.shape[0]):
                weight = pattern[head, self.target, source]
                part = part + weight * (value[source, head] @ attention.W_O[head])
            parts.append(part)
        bias = bias_of(attention.b_O, self.x)
        whole = sum(parts) + bias
        parts = [frozen(attention.norm_out, part, whole) for part in parts]
        norm = attention.norm_out
        bias = frozen(norm, bias, whole)
        if norm is not None and norm.bias is not None:
            bias = bias + norm.bias
        return parts, bias

    def _attentions(self, kind: str) -> None:
        own, parts, bias = self.x, [], torch.zeros_like(self.x)
        first = True
        for attention in self.block.attentions:
            new, new_bias = self._attention_parts(attention)
            if attention.kind == kind:
                self.points["attn_out"] = (new, new_bias)
            parts, bias = parts + new, bias + new_bias
            if first:
                parts[self.target] = parts[self.target] + own
                first = False
            if attention.kind == kind:
                self.points["resid_mid"] = (parts, bias)
            parts, bias = self._norm(attention.norm_after, parts, bias)
        self.stream = (parts, bias)

    def _norm(
        self, norm: Norm | None, parts: list[Tensor], bias: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        whole = sum(parts) + bias
        out = [frozen(norm, part, whole) for part in parts]
        out_bias = frozen(norm, bias, whole)
        if norm is not None and norm.bias is not None:
            out_bias = out_bias + norm.bias
        return out, out_bias

    def feed_forward(self, steps: int, convention: str) -> None:
        """Fills in the points from ``mlp_in`` on; integrated gradients by a Riemann sum."""
        ff = self.block.feed_forward
        parts, bias = self.stream
        if self.block.parallel:
            parts = [torch.zeros_like(self.x) for _ in parts]
            parts[self.target] = self.x
            bias = torch.zeros_like(self.x)
        read, read_bias = self._norm(ff.norm_in, parts, bias)
        self.points["mlp_in"] = (read, read_bias)
        assert ff is not None
        own = dense(ff, self.trace, self.row, self.target)
        out, out_bias = integrated_gradients(own, read, read_bias, steps, convention)
        self.points["mlp_out"] = self._norm(ff.norm_out, out, out_bias)
        out, out_bias = self.points["mlp_out"]
        stream, stream_bias = self.stream
        summed = [a + b for a, b in zip(out, stream, strict=True)]
        self.points["resid_post"] = (summed, out_bias + stream_bias)
        self.points["block_out"] = self._norm(ff.norm_after, *self.points["resid_post"])


def dense(ff: FeedForward, trace: Trace, row: int, target: int) -> FeedForward:
    """Experts as one position goes through them: all neurons side by side, each with its gain."""
    if not isinstance(ff, Experts):
        return ff
    held = ff.followed(trace, (torch.tensor([row]), torch.tensor([target])))
    return held.select(torch.arange(ff.width)).part(0)


def ff_from_pre(ff: FeedForward, pre: list[Tensor]) -> Tensor:
    """Neurons from the pre-activations of each branch."""
    activation = ff.require_activation()
    found = activation(pre[0]) * pre[1] if ff.gated else activation(pre[0])
    return found if ff.gain is None else found * ff.gain


def integrated_gradients(
    ff: FeedForward, parts: list[Tensor], bias: Tensor, steps: int, convention: str
) -> tuple[list[Tensor], Tensor]:
    """Integrated gradients of the neurons by the midpoint rule, then the output matrix.

    2024, eq. 12: the path scales all parts from zero; biases too ("contributor"), or they stay
    ("fixed").
    """
    shares = [[part @ weight for weight, _ in ff.branches()] for part in parts]
    biases = [bias @ w + bias_of(b, bias @ w) for w, b in ff.branches()]
    moving = [sum(share[k] for share in shares) for k in range(len(biases))]
    gradients = [torch.zeros_like(b) for b in biases]
    for step in range(steps):
        alpha = (step + 0.5) / steps
        grow = alpha if convention == "contributor" else 1.0
        pre = [(alpha * moving[k] + grow * biases[k]).requires_grad_() for k in range(len(biases))]
        found = torch.autograd.grad(ff_from_pre(ff, pre).sum(), pre)
        gradients = [total + grad / steps for total, grad in zip(gradients, found, strict=True)]
    out = [
        torch.stack([s * g for s, g in zip(share, gradients, strict=True)]).sum(0) @ ff.W_out
        for share in shares
    ]
    start = [torch.zeros_like(b) if convention == "contributor" else b for b in biases]
    constant = ff_from_pre(ff, start)
    if convention == "contributor":
        constant = constant + sum(b * g for b, g in zip(biases, gradients, strict=True))
    return out, constant @ ff.W_out + ff.constant()
