"""What every method takes against the length of its input: operations, bytes, seconds, exponents.

The models: GPT-2's widths with a sixth of its layers and words; GPT-2 small's own, for what grows
with both; the embedded encoder-decoder's shape in six layers, for DecoderLens. Their weights are
random. `all.py` prints and stores what is found here; `counts` is what `tests/test_cost_counts.py`
repeats on the embedded models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy
import torch
import value_zeroing
from blocks import Sizes
from decoder_lens import bridged, plain
from memories import documents_of, gpt2, miner_of
from meters import Memory, Operations, interleaved
from run import bound as bound_behind_the_activation
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, make_batch

Work = Callable[[], object]
Kind = Literal["causal-lm", "GPT-2 small", "encoder-decoder"]
STEPS, ANSWER, SHARD = 10, 20, 32
# A sixth of GPT-2's layers and words: passes are made of blocks and of the readout as in GPT-2.
LAYERS, VOCABULARY = 2, 8376
SMALL_LAYERS, SMALL_VOCABULARY = 12, 50_257


@dataclass(frozen=True)
class Method:
    """A question about a model and token ids.

    Attributes:
        make: Returns what asks it.
        passes: How many forward passes nothing can do without; None where nobody has said.
        own: The least operations beyond them for a number of tokens, in a model of its kind.
        kind: Of the model.
    """

    make: Callable[[Any, Tensor], Work]
    passes: int | None = None
    own: Callable[[int], int] = field(default=lambda n: 0)
    kind: Kind = "causal-lm"


def _call(function: Callable[..., object], **options: Any) -> Callable[[Any, Tensor], Work]:
    return lambda model, ids: partial(function, model, ids, **options)


def _mining(model: Any, ids: Tensor) -> Work:
    view = as_view(model)
    miner, tops = miner_of(view, len(ids))
    return partial(miner.take, tops, documents_of(view, ids))


def _scanning(model: Any, ids: Tensor) -> Work:
    return partial(cm.scan, model, [{"prompt": ids[0].tolist(), "target": 3, "foil": 4}])


def _scanning_many(model: Any, ids: Tensor) -> Work:
    """Returns what scans as many prompts as there are tokens."""
    prompts = [ids[0].roll(place)[:12].tolist() for place in range(ids.shape[1])]
    rows = [{"prompt": prompt, "target": 3, "foil": 4} for prompt in prompts]
    return partial(cm.scan, model, rows, shard_size=SHARD)


def _contributions(components: Callable[[int], int] | None = None, **options: Any) -> Method:
    """Returns contributions in GPT-2 small, some components read as distributions, 2 d V each."""
    return Method(
        _call(cm.log_prob_contributions, **options),
        1,
        lambda n: 2 * components(n) * 768 * SMALL_VOCABULARY if components else 0,
        "GPT-2 small",
    )


def _pairs(n: int) -> int:
    """Returns how many pairs of target and source there are in a causal model."""
    return n * (n + 1) // 2


def _carried(d: int = 768) -> int:
    """Returns the operations of carrying one vector through all layers.

    W_out in each; W_in, W_V and W_O in all but the first, whose input is one vector per token.
    """
    return LAYERS * 2 * 4 * d * d + (LAYERS - 1) * (2 * 4 * d * d + 4 * d * d)


METHODS: dict[str, Method] = {
    "attention": Method(_call(cm.attention), 1),
    "attention_norms, attn_out": Method(_call(cm.attention_norms, at="attn_out"), 1),
    "attention_norms, mlp_in": Method(_call(cm.attention_norms, at="mlp_in"), 1),
    "attention_norms, mlp_out": Method(
        _call(cm.attention_norms, at="mlp_out"),
        1,
        lambda n: LAYERS * bound_behind_the_activation(Sizes(n)),
    ),
    "attention_norms, block_out": Method(
        _call(cm.attention_norms, at="block_out"),
        1,
        lambda n: LAYERS * bound_behind_the_activation(Sizes(n)),
    ),
    "mixing_ratio": Method(_call(cm.mixing_ratio), 1),
    "decompose, resid_post of the last layer": Method(
        _call(cm.decompose, at="resid_post", layer=-1),
        1,
        lambda n: bound_behind_the_activation(Sizes(n)),
    ),
    "value_zeroing": Method(
        _call(cm.value_zeroing), 1, lambda n: LAYERS * value_zeroing.bounds(n, True)[0]
    ),
    "globenc": Method(_call(cm.globenc), 1),
    "alti": Method(_call(cm.alti), 1),
    "alti, logit": Method(_call(cm.alti, of="logit"), 1),
    "decompx": Method(_call(cm.decompx), 1, lambda n: _pairs(n) * _carried()),
    "gradient_x_input": Method(_call(cm.gradient_x_input), 2),
    f"integrated_gradients, {STEPS} steps": Method(
        _call(cm.integrated_gradients, steps=STEPS), 2 * STEPS
    ),
    "log_prob_contributions, layer": _contributions(lambda n: 2 * SMALL_LAYERS + 1),
    "log_prob_contributions, head": _contributions(lambda n: 12 * SMALL_LAYERS, by="head"),
    "log_prob_contributions, position": _contributions(lambda n: n * SMALL_LAYERS, by="position"),
    "log_prob_contributions, head_position": _contributions(
        lambda n: 12 * n * SMALL_LAYERS, by="head_position"
    ),
    "log_prob_contributions, best 10 head_position": _contributions(by="head_position", k=10),
    "log_prob_contributions, best 10 ff_neurons": _contributions(by="ff_neuron", k=10),
    "log_prob_contributions, best 10 attn_neurons": _contributions(by="attn_neuron", k=10),
    "log_prob_contributions, head, foil": _contributions(by="head", target=5, foil=7),
    "log_prob_contributions, head, two tokens": _contributions(by="head", target=[[5, 7]]),
    "log_prob_contributions, layer, all positions": _contributions(
        lambda n: n * (2 * SMALL_LAYERS + 1), pos="all"
    ),
    "log_prob_contributions, head, direction": _contributions(
        by="head", target=cm.Direction(layer=-1, neuron=3)
    ),
    "decompose, heads at resid_mid of the last layer": Method(
        _call(cm.decompose, at="resid_mid", heads=True, layer=-1), 1
    ),
    "query_contributions, head": Method(
        _call(cm.query_contributions, neurons=[(1, 3)], by="head"), 1
    ),
    "query_contributions, ff_neuron": Method(
        _call(cm.query_contributions, neurons=[(1, 3)], by="ff_neuron"), 1
    ),
    "knockout, one head and one control": Method(
        _call(cm.knockout, heads=[(0, 1)], pos=-1, controls=1), 3
    ),
    "attention_knockout, one source in all layers": Method(
        _call(cm.attention_knockout, sources=0, pos=-1, window=None), 2
    ),
    "attention_knockout, every layer and source": Method(_call(cm.attention_knockout, pos=-1)),
    "flow, 50 nodes": Method(_call(cm.flow, pos=-1, k=50), 2),
    "information_flow_routes": Method(_call(cm.information_flow_routes, pos=-1), 2),
    "scan, one prompt by layer and head": Method(_scanning, 1),
    "scan, n prompts of 12 tokens": Method(_scanning_many),
    "value_zeroing, 8 generated tokens": Method(_call(cm.value_zeroing, generate=8)),
    "ff_memories": Method(
        _call(cm.ff_memories), 1, lambda n: (3 * LAYERS - 1) * n * 2 * 768 * VOCABULARY
    ),
    "token_memory": Method(
        _call(cm.token_memory), 1, lambda n: LAYERS * _pairs(n) * 2 * 12 * 4 * 768
    ),
    "mine_triggers, one sentence": Method(_mining, 1),
    f"decoder_lens, {ANSWER} tokens": Method(
        _call(cm.decoder_lens, max_new_tokens=ANSWER), kind="encoder-decoder"
    ),
}


@dataclass
class Growth:
    """What one method took.

    Attributes:
        kind: Of its model.
        lengths: Tokens.
        operations: Products of matrices, for each length.
        bytes: The most that were alive at once, beside weights.
        bound: The least operations; empty where nobody has said.
        seconds: The processor's, median, at the last length.
        own_exponent: Of the operations beyond a forward pass, over the length; None where those
            are less than a hundredth of the pass, or shrink (a pass that ends early reads no
            logits).
        bytes_exponent: Of the bytes.
    """

    kind: Kind
    lengths: list[int]
    operations: list[int]
    bytes: list[int]
    bound: list[int]
    seconds: float
    own_exponent: float | None
    bytes_exponent: float


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Returns the slope of the straight line through the logarithms (least squares)."""
    return float(numpy.polyfit(numpy.log(lengths), numpy.log(values), 1)[0])


def count(work: Work) -> tuple[int, int]:
    """Returns operations and most bytes of what was done before, so that nothing is made anew."""
    with Memory() as memory, Operations() as operations:
        work()
    return operations.total, memory.peak


def forward(model: Any, ids: Tensor) -> Work:
    """Returns what runs the model once: all logits, or an encoder's and decoder's pass."""
    view = as_view(model)
    return partial(view.run, make_batch(view, Given(ids)), [])


def words(length: int, d_vocab: int) -> Tensor:
    """Returns random token ids [1 pos]."""
    return torch.randint(3, d_vocab, (1, length), generator=torch.Generator().manual_seed(length))


def growth(
    lengths: Sequence[int], runs: int, *, width: int = 768, names: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Returns what every method takes, the forward pass of each model first.

    Args:
        lengths: Numbers of tokens.
        runs: How many times each is timed, at the largest length.
        width: Of the causal models; bounds are known for 768.
        names: Methods, None for all.
    """
    models = {
        "causal-lm": gpt2(LAYERS, width, VOCABULARY),
        "GPT-2 small": gpt2(SMALL_LAYERS, width, SMALL_VOCABULARY),
        "encoder-decoder": bridged(plain(6)),
    }
    every = {f"forward pass, {kind}": Method(forward, 1, kind=kind) for kind in models} | METHODS  # type: ignore[arg-type]
    asked = {
        name: method
        for name, method in every.items()
        if names is None or name in names or name not in METHODS
    }
    found: dict[str, tuple[list[int], list[int]]] = {}
    works: list[Work] = []
    for name, method in asked.items():
        model = models[method.kind]
        d_vocab = as_view(model).d_vocab
        made = [method.make(model, words(n, d_vocab)) for n in lengths]
        made[0]()
        operations, held = zip(*map(count, made), strict=True)
        found[name] = ([*operations], [*held])
        works.append(made[-1])
    seconds = dict(zip(found, interleaved(works, runs, time.process_time), strict=True))
    return {
        name: asdict(_grown(method, [*lengths], found, name, seconds[name], width == 768))
        for name, method in asked.items()
        if names is None or name in names
    }


def _grown(
    method: Method,
    lengths: list[int],
    found: dict[str, tuple[list[int], list[int]]],
    name: str,
    seconds: float,
    bounded: bool,
) -> Growth:
    operations, held = found[name]
    passes = found[f"forward pass, {method.kind}"][0]
    own = [a - b for a, b in zip(operations, passes, strict=True)]
    least = [(method.passes or 0) * p + method.own(n) for p, n in zip(passes, lengths, strict=True)]
    matters = all(a > 0.01 * b for a, b in zip(own, passes, strict=True)) and own[0] <= own[-1]
    return Growth(
        method.kind,
        lengths,
        operations,
        held,
        least if method.passes and bounded else [],
        seconds,
        exponent(lengths, own) if matters else None,
        exponent(lengths, held),
    )


def counts(length: int = 12) -> dict[str, int]:
    """Returns the operations of every method on so many tokens, of the embedded models."""
    models = {kind: cm.load_demo(kind) for kind in ("causal-lm", "encoder-decoder")}
    models["GPT-2 small"] = models["causal-lm"]
    found: dict[str, int] = {}
    for name, method in METHODS.items():
        model = models[method.kind]
        work = method.make(model, words(length, as_view(model).d_vocab))
        work()  # what a model keeps is made by the first question
        with Operations() as counter:
            work()
        found[name] = counter.total
    return found


def more(counted: Mapping[str, int], stored: Mapping[str, int]) -> list[str]:
    """Returns what takes more operations than it did, in words."""
    return [
        f"{name}: {now:,} operations, {stored[name]:,} before"
        for name, now in counted.items()
        if now > stored[name]
    ]
