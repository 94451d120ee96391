"""Methods against their literal formulations and against captum: outputs first, then the cost.

What is literal here: the field's tensors (`reference.py`), a forward pass per zeroed value
(`value_zeroing.py`), all neurons (`log_prob.py`), a call per encoder layer (`decoder_lens.py`), and
the papers' equations word by word, with loops, as the tests hold them (`tests/oracles*.py`).
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import decoder_lens
import literal
import log_prob
import reference
import run
import torch
import value_zeroing
from blocks import Sizes, build, with_relu
from memories import gpt2, plain_gpt2
from meters import flops, interleaved
from methods import LAYERS, STEPS, VOCABULARY, words
from torch import Tensor
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import oracles_baselines
import oracles_log_prob

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.engine.parts import Point
from tl_contextmix.evaluation import demo_pairs
from tl_contextmix.results import ContextMap, LogProbContributions

Work = Callable[[], Any]
SAID = 16
_BRIDGE = "theirs runs the bare Hugging Face model, ours the bridge around it"
MAPS: dict[str, Callable[..., ContextMap]] = {
    "attention": cm.attention,
    "attention_norms, mlp_in": partial(cm.attention_norms, at="mlp_in"),
    "attention_norms, block_out": cm.attention_norms,
    "value_zeroing": cm.value_zeroing,
    "globenc": cm.globenc,
    "alti": cm.alti,
    "decompx": cm.decompx,
    "gradient_x_input": cm.gradient_x_input,
}
"""What is asked of many prompts. Integrated gradients and attention flow have work of their own
for each prompt, hundreds of passes and maximum flows, and take nearly as long in one call."""


@dataclass(frozen=True)
class Pair:
    """Two ways to the same numbers.

    Attributes:
        method: Ours.
        other: What it is compared with, in words.
        on: The model and the length.
        ours: Runs ours; returns numbers to be compared.
        theirs: Runs the other.
        bound: The least operations; 0 where nobody has said.
        products: Whether products of matrices alone are counted, as `bound` does.
        note: What has to be known to read the row.
    """

    method: str
    other: str
    on: str
    ours: Work
    theirs: Work
    bound: int = 0
    products: bool = False
    note: str = ""


@dataclass(frozen=True)
class Compared:
    """What two ways took, ours first.

    Attributes:
        method: Ours.
        other: The other.
        on: The model and the length.
        difference: The largest, relative to the largest number; measured before anything else.
        operations: Counted.
        bound: The least there can be; 0 where nobody has said.
        seconds: The processor's, medians of interleaved runs.
        note: What has to be known to read the row.
    """

    method: str
    other: str
    on: str
    difference: float
    operations: tuple[int, int]
    bound: int
    seconds: tuple[float, float]
    note: str = ""


def compared(pair: Pair, runs: int) -> dict[str, Any]:
    """Returns what two ways took.

    Raises:
        AssertionError: If they do not give the same numbers.
    """
    here, there = pair.ours(), pair.theirs()
    assert here.shape == there.shape, (pair.method, here.shape, there.shape)
    apart = float((here - there).abs().max() / there.abs().max().clamp(min=1e-30))
    # Sums of steps are no integral; everything else differs by rounding alone.
    assert apart < (1e-2 if "steps" in pair.other else 1e-3), (pair.method, pair.other, apart)
    ways = (pair.ours, pair.theirs)
    ours, theirs = (flops(way, elementwise=not pair.products) for way in ways)
    one, other = interleaved(ways, runs, time.process_time)
    named = (pair.method, pair.other, pair.on)
    counted, took = (ours, theirs), (one, other)
    return asdict(Compared(*named, apart, counted, pair.bound, took, pair.note))


def blocks_of(sizes: Sizes, steps_at: int) -> Iterator[Pair]:
    """Yields the norms of one block, and Value Zeroing of one."""
    block, trace = build(sizes)
    where = f"a block of d={sizes.d}, n={sizes.n}"
    fields: dict[Point, str] = {
        "mlp_in": "a tensor [head, target, source, d_model]",
        "block_out": "every pair's vector through the block",
    }
    for at, words_for in fields.items():
        yield Pair(
            f"attention_norms, {at}",
            words_for,
            where,
            lambda at=at: run.ours(block, trace, at)[at][0],
            partial(reference.norms, block, trace, at, sizes.causal),
            run.bound(sizes) if at == "block_out" else 0,
        )
    small = Sizes(steps_at, d=sizes.d, heads=sizes.heads, m=sizes.m)
    other = build(small)
    parts = reference.attention_parts(*other, "mlp_in")
    yield Pair(
        "attention_norms, mlp_out",
        f"integrated gradients in {run.STEPS} steps",
        f"a block of d={sizes.d}, n={steps_at}",
        lambda: run.ours(*other, "mlp_out")["mlp_out"][0],
        lambda: reference.integrated_gradients(other[0], *parts, run.STEPS, True).norm(dim=-1),
        run.bound(small),
    )
    layer = value_zeroing.made(sizes.n, True)
    yield Pair(
        "value_zeroing",
        "the block run once per zeroed value",
        f"a block of d={value_zeroing.D}, n={sizes.n}",
        partial(value_zeroing.ours, *layer.view()),
        partial(value_zeroing.loop, layer),
        value_zeroing.bounds(sizes.n, True)[0],
        products=True,
    )


def cheaper_routes(sizes: Sizes) -> Iterator[Pair]:
    """Yields norms through the feed-forward block by a cheaper route against all neurons."""
    block, trace = build(sizes)
    where = f"a block of d={sizes.d}, n={sizes.n}"

    def norms(block: Block, **options: Any) -> Tensor:
        return run.ours(block, trace, "block_out", **options)["block_out"][0]

    yield Pair(
        "attention_norms, block_out, in bfloat16",
        "products in float32",
        where,
        partial(norms, block, precision="bfloat16"),
        partial(norms, block),
    )
    for share in (0.05, 0.1, 0.2):
        sparse = with_relu(block, trace, share)
        yield Pair(
            f"attention_norms, block_out, ReLU, {share:.0%} active",
            "all neurons",
            where,
            partial(norms, sparse),
            run.all_neurons()(partial(norms, sparse)),
            products=True,
        )


def lists(count: int) -> Iterator[Pair]:
    """Yields maps of many short prompts in one call against a call for each."""
    model, by_length = cm.load_demo("causal-lm"), defaultdict(list)
    for pair in demo_pairs(count=20 * count):
        by_length[len(pair.good.split())].append(pair.good)
    texts = sorted(dict.fromkeys(max(by_length.values(), key=len)))[:count]

    def numbers(method: Callable[..., ContextMap], given: list[str]) -> Tensor:
        found = method(model, given)
        real = found.target.real_pairs(found.source)
        each = zip(found.scores.detach(), real, strict=True)
        return torch.cat([scores[..., pairs].flatten() for scores, pairs in each])

    for name, method in MAPS.items():
        yield Pair(
            f"{name}, {count} prompts",
            "a call for each",
            "the embedded model",
            partial(numbers, method, texts),
            lambda method=method: torch.cat([numbers(method, [text]) for text in texts]),
            products=True,
        )


def neurons(shape: tuple[int, int, int, int]) -> Pair:
    """Returns the best neurons against all neurons."""
    sizes = log_prob.Sizes(*shape)
    layers, count, _, vocabulary = shape
    return Pair(
        "log_prob_contributions, best 10 ff_neurons",
        "all neurons, then the best",
        f"{layers * count:,} neurons, V={vocabulary:,}",
        lambda: sizes.best(10).score,
        lambda: sizes.full().flatten().topk(10).values,
        products=True,
    )


def lens(sentences: int) -> Pair:
    """Returns all encoder layers at once against a call for each."""
    length = 20
    ours, theirs = decoder_lens.ways(6, sentences, length)

    def here() -> Tensor:
        found = ours()
        ids = found.ids.masked_fill(~found.mask, 0)
        return functional.pad(ids, (0, length - ids.shape[-1])).double()

    def there() -> Tensor:
        # What follows an answer's end is padding, whose id is 0.
        padded = [functional.pad(ids, (0, length - ids.shape[1])) for ids in theirs()]
        return torch.stack(padded, dim=1).double()

    return Pair(
        "decoder_lens",
        "a generate call per encoder layer",
        f"6 layers, {sentences} sentences, up to {length} tokens",
        here,
        there,
        products=True,
    )


def captum(width: int, n: int) -> Iterator[Pair]:
    """Yields the gradient methods against captum's, on plain Hugging Face weights."""
    from captum.attr import InputXGradient, IntegratedGradients

    model, plain = gpt2(LAYERS, width, VOCABULARY), plain_gpt2(LAYERS, width, VOCABULARY)
    ids = words(n, plain.config.vocab_size)
    x = plain.transformer.wte(ids) + plain.transformer.wpe(torch.arange(n))
    target = int(plain(ids).logits[0, -1].argmax())
    # Positions are in x; adding and subtracting them would round what is close to zero.
    plain.transformer.wpe.weight.data.zero_()

    def logit(x: Tensor) -> Tensor:
        return plain(inputs_embeds=x).logits[:, -1, target]

    where = f"GPT-2's widths, {LAYERS} layers, n={n}"
    yield Pair(
        "gradient_x_input",
        "captum's InputXGradient",
        where,
        lambda: cm.gradient_x_input(model, ids, target=target).scores[0, 0, 0],
        lambda: InputXGradient(logit).attribute(x.clone().requires_grad_()).norm(dim=-1).detach(),
        products=True,
        note=_BRIDGE,
    )
    # Ours walks the path as u^4; captum integrates the same function of u.
    explain = IntegratedGradients(lambda u: logit(x * u**4))
    ones = torch.ones_like(x)

    def integrated() -> Tensor:
        # With what the steps miss, which ours returns as the bias.
        how: dict[str, Any] = {"method": "gausslegendre", "return_convergence_delta": True}
        parts, _ = explain.attribute(ones, ones * 0, n_steps=STEPS, **how)
        return parts.norm(dim=-1).detach()

    yield Pair(
        f"integrated_gradients, {STEPS} steps",
        "captum's IntegratedGradients",
        where,
        lambda: cm.integrated_gradients(model, ids, steps=STEPS, target=target).scores[0, 0, 0],
        integrated,
        products=True,
        note=_BRIDGE,
    )


def transformer_lens(layers: int, width: int, vocabulary: int, n: int) -> Iterator[Pair]:
    """Yields contributions against what TransformerLens has, on its processed weights."""
    model = gpt2(layers, width, vocabulary)
    model.enable_compatibility_mode()
    ids, target, foil = words(n, vocabulary), 7, 9
    where = f"GPT-2's widths, {layers} layers, V={vocabulary:,}, n={n}"

    def of_heads(foil: int | None = None) -> Tensor:
        found = cm.log_prob_contributions(model, ids, target=target, foil=foil, by="head")
        logits = found.logits if foil is None else found.scores
        return logits[0][found.components.of_kind("attn")[0]]

    yield Pair(
        "log_prob_contributions, layer",
        "TransformerLens' decompose_resid, norm and W_U",
        where,
        lambda: cm.log_prob_contributions(model, ids, target=target).scores[0],
        partial(log_prob.decompose_resid, model, ids, target),
        products=True,
        note="ours reads each sublayer's change on its own, for the digits of small increases",
    )
    yield Pair(
        "log_prob_contributions, head",
        "TransformerLens' direct_logit_attribution",
        where,
        of_heads,
        partial(log_prob.logit_attribution, model, ids, target),
        products=True,
        note="theirs stops at logits: ours reads every head as a distribution",
    )
    yield Pair(
        "log_prob_contributions, head, foil",
        "TransformerLens' direct_logit_attribution, a difference of logits",
        where,
        partial(of_heads, foil),
        partial(log_prob.logit_attribution, model, ids, target, foil),
        products=True,
    )


def hand_written(width: int, n: int) -> Iterator[Pair]:
    """Yields methods against what a user would write with hooks."""
    model = gpt2(LAYERS, width, VOCABULARY)
    ids = words(n, VOCABULARY)
    where = f"GPT-2's widths, {LAYERS} layers, n={n}"
    vectors = "every pair's vector"
    target, neuron = 5, 3

    def tops() -> Tensor:
        found = cm.ff_memories(model, ids)
        columns = (found.residual_top, found.ffn_top, found.output_top, found.case)
        return torch.stack(columns, dim=-1)[0].float()

    def before_and_after() -> Tensor:
        found = cm.knockout(model, ids, heads=[(0, 1)], pos=-1, controls=0, target=target)
        return torch.stack([found.before[0, 0], found.after[0, 0]])

    def brought() -> Tensor:
        found = cm.query_contributions(model, ids, neurons=[(1, neuron)], by="ff_neuron")
        return found.inner[0, 0, found.components.of_kind("mlp")[0]]

    said = as_view(model).generate(make_batch(as_view(model), Given(ids)), SAID)
    answer = torch.tensor(said)

    def token_by_token() -> Tensor:
        as_view(model).generate(make_batch(as_view(model), Given(ids)), SAID)
        rows = []
        for step in range(SAID):
            text = torch.cat([ids, answer[:, :step]], dim=1)
            row = cm.value_zeroing(model, text, pos=[-1]).scores[0, :, 0, 0]
            rows.append(functional.pad(row, (0, SAID - step)))
        return torch.stack(rows, dim=1)

    same = "nearly all of both is the pass"
    for method, other, ours, theirs, note in (
        (
            f"value_zeroing, {SAID} generated tokens",
            "a call per token",
            lambda: cm.value_zeroing(model, ids, generate=SAID).scores[0, :, 0],
            token_by_token,
            "",
        ),
        (
            "mixing_ratio",
            vectors,
            lambda: cm.mixing_ratio(model, ids).values[0],
            partial(literal.mixing_ratio, model, ids),
            same,
        ),
        (
            "token_memory",
            f"{vectors}, times W_in",
            lambda: cm.token_memory(model, ids).shares[0],
            partial(literal.token_memory, model, ids),
            "",
        ),
        (
            "ff_memories",
            "the model's readout of each state",
            tops,
            partial(literal.top_tokens, model, ids),
            "ours counts active memories, too",
        ),
        (
            "knockout, one head",
            "a hook that zeroes it",
            before_and_after,
            partial(literal.knockout, model, ids, 0, 1, target),
            same,
        ),
        (
            "attention_knockout, every layer and source",
            "a pass with a masked score for each",
            lambda: cm.attention_knockout(model, ids, pos=-1, target=target).log_probs[0, :, 0],
            partial(literal.edges, model, ids, target),
            "",
        ),
        (
            "query_contributions, ff_neuron",
            "each neuron's vector through the norm",
            brought,
            partial(literal.queries, model, ids, 1, neuron),
            same,
        ),
    ):
        yield Pair(method, other, where, ours, theirs, note=note)


def word_by_word(n: int) -> Iterator[Pair]:
    """Yields methods against the tests' loops over tokens and heads, on the embedded model."""
    model = cm.load_demo("causal-lm")
    view = as_view(model)
    ids = words(n, view.d_vocab)
    traced = partial(literal.traced, view, ids)
    place = f"the embedded model, n={n}"

    def maps(oracle: Callable[..., Tensor]) -> Tensor:
        blocks, trace = traced()
        return torch.stack(
            [
                torch.stack([oracle(block, trace, 0, i, "decoder") for i in range(n)])
                for block in blocks
            ]
        )

    def carried() -> Tensor:
        blocks, trace = traced()
        with torch.enable_grad():
            found = oracles_baselines.decompx(blocks, [], None, trace, 0, run.STEPS, "contributor")
        return torch.stack(
            [torch.stack([torch.stack(row).norm(dim=-1) for row, _ in layer]) for layer in found]
        ).detach()

    def heads() -> Tensor:
        _, trace = traced()
        parts = oracles_log_prob.Parts(view, trace, "decoder", 0, n - 1)
        return _head_scores(view, parts, by_head)

    by_head = partial(cm.log_prob_contributions, model, ids, by="head_position")
    by_words = "its equations word by word"
    for method, oracle in ((cm.globenc, "globenc"), (cm.alti, "alti")):
        theirs = partial(maps, getattr(oracles_baselines, oracle))
        ours = partial(lambda method: method(model, ids).scores[0, :, 0], method)
        yield Pair(oracle, by_words, place, ours, theirs)
    ours = partial(cm.decompx, model, ids, bias="contributor")
    steps = f"{by_words}, {run.STEPS} steps"
    yield Pair("decompx", steps, place, lambda: ours().scores[0, :, 0], carried)
    name = "log_prob_contributions, head_position"
    yield Pair(name, by_words, place, lambda: _attention(by_head()), heads)


def _attention(found: LogProbContributions) -> Tensor:
    """Returns the scores of heads' reads of single positions."""
    return found.scores[0][found.components.of_kind("attn")[0]]


def _head_scores(view: ModelView, parts: oracles_log_prob.Parts, asked: Work) -> Tensor:
    """Returns the same, each from two distributions: before the part is written and after."""
    found = asked()
    target = int(found.target.ids[0])
    vectors, whole = parts.summed((0, 1, 3, 4)), parts.whole()
    before: dict[Any, Tensor] = {}
    so_far = torch.zeros_like(whole)
    for key, part in parts.parts.items():
        before.setdefault(key[:2], so_far.clone())
        so_far = so_far + part
    read = partial(oracles_log_prob.log_probs, view, whole=whole, rule="frozen+beta")
    scores = []
    for place in found.components.of_kind("attn")[0].nonzero()[:, 0].tolist():
        one = found.components.at(0, place)
        key = ("attn", one["layer"], one["head"], one["source"])
        base = before[key[:2]]
        after, start = (read(state)[target] for state in (base + vectors[key], base))
        scores.append(after - start)
    return torch.stack(scores)


def pairs(quick: bool) -> Iterator[Pair]:
    """Yields everything that is compared."""
    width = 192 if quick else 768
    sizes = Sizes(16, d=192, heads=3, m=768) if quick else Sizes(64)
    yield from blocks_of(sizes, 8)
    yield from cheaper_routes(sizes if quick else Sizes(128))
    yield from lists(4 if quick else 32)
    yield neurons((2, 256, 64, 5000) if quick else (LAYERS, 3072, 768, VOCABULARY))
    yield lens(2 if quick else 8)
    yield from hand_written(width, 8 if quick else 32)
    yield from captum(width, 8 if quick else 32)
    yield from transformer_lens(*((2, 192, 2000, 8) if quick else (12, 768, 50257, 64)))
    yield from word_by_word(6)
