"""What the tests ask of a zoo model: stacks, inputs as keywords, and the host's own activations."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.blocks import Block, FeedForward, Trace
from tl_contextmix.core.experts import Experts
from tl_contextmix.core.model_view import ModelView, StackName
from tl_contextmix.engine.parts import POINTS, Point
from tl_contextmix.errors import ContextMixWarning

# Relative to the largest entry. Where a float64 host computes in float32 inside (see
# zoo.FLOAT32_INSIDE), what is recomputed in float64 is up to 2e-7 off; elsewhere up to 1e-14.
EXACT, FLOAT32_INSIDE = 1e-10, 1e-6


def case_of(*families: str, host: str | None = None) -> zoo.Case:
    """The first case of these families, on a class if one is named; skips if there is none."""
    every = [case for case in zoo.cases() if host in (None, case.host)]
    found = [case for family in families for case in every if case.family == family]
    if not found:
        pytest.skip(f"none of {families} loads on {host or 'any class'} of this version")
    return found[0]


@contextmanager
def told() -> Iterator[list[str]]:
    """What the package warns of meanwhile."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if issubclass(one.category, ContextMixWarning)]


def shared(case: zoo.Case) -> tuple[Any, zoo.Inputs]:
    """A model that no test changes, and words for it."""
    return zoo.shared(case), zoo.inputs(case)


def words(length: int) -> Tensor:
    """Two rows of random words."""
    generator = torch.Generator().manual_seed(0)
    first, shape = zoo.rows.FIRST_WORD_ID, (2, length)
    return torch.randint(first, zoo.rows.D_VOCAB, shape, generator=generator)


def state(model: Any) -> dict[str, Any]:
    """Everything of a model that a call could leave changed, hooks in their order."""
    return {
        "hooks": [
            (name, [id(hook) for hook in table.values()])
            for name, module in model.named_modules()
            for table in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ],
        "records": [
            (name, len(module.fwd_hooks), len(module.bwd_hooks))
            for name, module in model.named_modules()
            if hasattr(module, "fwd_hooks")
        ],
        "weights": [
            (
                *(name, id(weight), weight.data_ptr(), weight._version),
                *(weight.requires_grad, weight.grad is None),
            )
            for name, weight in model.named_parameters()
        ],
        "training": [module.training for module in model.modules()],
        "config": repr(model.cfg),
        "grad": torch.is_grad_enabled(),
    }


def in_threads(work: Callable[[Any], Any], each: Sequence[Any]) -> list[Any]:
    """What a function returns of each, in as many threads at once; what one raises is raised."""
    together = threading.Barrier(len(each))

    def run(one: Any) -> Any:
        together.wait()
        return work(one)

    with ThreadPoolExecutor(len(each)) as pool:
        return [*pool.map(run, each)]


def bound(case: zoo.Case) -> float:
    """The bound that the issue sets for a host's own activation."""
    inside = (case.family, case.host) in zoo.FLOAT32_INSIDE
    return FLOAT32_INSIDE if inside else EXACT


def keywords(given: zoo.Inputs) -> dict[str, Any]:
    """The decoder side as keyword arguments."""
    return {} if given.decoder_tokens is None else {"decoder_input": given.decoder_tokens}


def first_of(given: zoo.Inputs) -> dict[str, Any]:
    """The first sentence of an input as keyword arguments."""
    return {"input": given.tokens[:1], **{n: ids[:1] for n, ids in keywords(given).items()}}


def stacks(case: zoo.Case) -> list[StackName | None]:
    """Every stack there is to ask about."""
    return ["encoder", "decoder", "cross"] if case.encoder_decoder else [None]


def points(block: Block) -> list[Point]:
    """Every point of a block that has an answer."""
    ff = block.feed_forward
    if ff is None:
        return [point for point in POINTS if not point.startswith("mlp")]
    return ["attn_out", "resid_mid", "mlp_in"] if ff.refusal else list(POINTS)


def view_of(model: Any) -> ModelView:
    """The view, whatever was done to the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextMixWarning)
        return as_view(model)


def host_trace(
    view: ModelView,
    given: zoo.Inputs,
    stack: StackName | None,
    attention_mask: Tensor | None = None,
) -> tuple[Trace, list[Block]]:
    """The host's own activations of a stack, every hook there is."""
    blocks = list(view.blocks(stack))
    names = []
    for block in blocks:
        names += [*block.points(), *block.spared(), block.resid_out]
        ff = block.feed_forward
        if ff is not None:
            names += ff.shown()
    batch = make_batch(view, Given(given.tokens, attention_mask, **keywords(given)))
    return view.run(batch, names), blocks


def recorded(
    model: Any, given: zoo.Inputs, names: Sequence[str], edits: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """What the host shows at hook points, behind the hooks that are on it, and these edits."""
    kept: dict[str, Tensor] = {}

    def change(edit: Any) -> Any:
        return lambda tensor, hook: edit(tensor)

    def keep(name: str) -> tuple[str, Any]:
        return name, lambda x, hook: kept.update({name: x.detach().clone()})

    hooks = [(name, change(edit)) for name, edit in (edits or {}).items()]
    with torch.no_grad():
        model.run_with_hooks(given.tokens, fwd_hooks=[*hooks, *map(keep, names)], **keywords(given))
    return kept


def host_value(block: Block, trace: Trace, point: str, kind: str) -> Tensor:
    """A point of a block from the host's z, neurons and residual streams, without the engine."""
    outs, stream = [], trace.resid_in(block)
    for attention in block.attentions:
        z = trace[attention.mixed]
        out = torch.einsum("bthd,hdm->btm", z, attention.W_O)
        out = out if attention.b_O is None else out + attention.b_O
        out = out if attention.norm_out is None else attention.norm_out(out)
        stream = stream + out
        outs.append(out)
        if attention.kind == kind and point == "resid_mid":
            return stream
        if attention.kind == kind and point == "attn_out":
            return out
        stream = stream if attention.norm_after is None else attention.norm_after(stream)
    ff = block.feed_forward
    if ff is None:
        return trace[block.resid_out]
    if point == "mlp_in":
        x = trace.resid_in(block) if block.parallel else stream
        return x if ff.norm_in is None else ff.norm_in(x)
    if isinstance(ff, Experts):
        own = trace[ff.written]
        mlp_out = own if ff.norm_out is None else ff.norm_out(own)
    else:
        mlp_out = ff.project(trace[ff.post])
    if point == "mlp_out":
        return mlp_out
    return stream + mlp_out if point == "resid_post" else trace[block.resid_out]


def post_of(ff: FeedForward, trace: Trace) -> Tensor:
    """What W_out multiplies; of experts, which no host shows, as `test_experts.py` checks it."""
    return ff.coefficients(trace) if isinstance(ff, Experts) else trace[ff.post]


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry of what is expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
