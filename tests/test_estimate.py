"""What is told of operations and memory beforehand is what is measured afterwards."""

from __future__ import annotations

import functools
import inspect
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import zoo
import zoo_build
from asked import case_of, keywords, view_of
from public import FUNCTIONS
from torch.utils._pytree import tree_leaves
from watched import Watched

import tl_contextmix as cm
from tl_contextmix.core.counters import Memory, Operations
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.engine.registry import methods
from tl_contextmix.methods.decompx import decompx_vectors
from tl_contextmix.results import Estimate

pytestmark = pytest.mark.once

WITHIN = 0.2
PER_METHOD: dict[str, Callable[..., Any]] = {
    "decompose": partial(cm.decompose, layer=[0, 1]),
    "attention_norms": cm.attention_norms,
    "attention_norms small": partial(cm.attention_norms, layer=-1, max_bytes=150_000),
    "attention_norms bfloat16": partial(cm.attention_norms, precision="bfloat16"),
    "attention_norms heads": partial(cm.attention_norms, at=POINTS[0], heads=True),
    "attention_norms points": partial(cm.attention_norms, at=POINTS[1:3]),
    "mixing_ratio": cm.mixing_ratio,
    "value_zeroing": cm.value_zeroing,
    "value_zeroing small": partial(cm.value_zeroing, layer=-1, max_bytes=150_000),
    "attention": cm.attention,
    "attention answer": partial(cm.attention, target=[[5, 6, 7], [8, 9]]),
    "globenc": cm.globenc,
    "alti": cm.alti,
    "alti logits": partial(cm.alti, of="logit", target=5, foil=6),
    "decompx": cm.decompx,
    "decompx logits": partial(cm.decompx, target=5, foil=6),
    "decompx_vectors": decompx_vectors,
    "gradient_x_input": partial(cm.gradient_x_input, pos=-1),
    "integrated_gradients": partial(cm.integrated_gradients, steps=3, pos=-1),
    "log_prob_contributions": partial(cm.log_prob_contributions, pos=-1),
    **{
        f"log_prob_contributions {by}": partial(cm.log_prob_contributions, by=by, pos=-1)
        for by in ("head", "position", "head_position", "ff_neuron", "attn_neuron")
    },
    "log_prob_contributions direction": partial(
        cm.log_prob_contributions, by="head", target=cm.Direction(layer=1, neuron=3), pos=-1
    ),
    "decompose heads": partial(cm.decompose, heads=True),
    "query_contributions": partial(cm.query_contributions, neurons=[(1, 3)], pos=-1),
    "knockout": partial(cm.knockout, heads=[(0, 1)], pos=-1, controls=1),
    "attention_knockout": partial(cm.attention_knockout, pos=-1),
    "attention_knockout heads": partial(
        cm.attention_knockout, target=5, sources=[[0, 3], (4, 6)], to=[7, -1], heads=[[0], [1, 2]]
    ),
    "token_memory": cm.token_memory,
    "ff_memories": cm.ff_memories,
}
# Every family differs in what its host and its blocks do; the method's code is the same.
SOME = ("attention_norms", "value_zeroing", "log_prob_contributions position", "gradient_x_input")
LENS = {
    "decoder_lens": partial(cm.decoder_lens, max_new_tokens=4),
    "decoder_lens teacher_forced": partial(
        cm.decoder_lens, mode="teacher_forced", references=["the cat sat", "a dog ran"]
    ),
}


@functools.lru_cache(maxsize=1)
def model_of(case: zoo.Case) -> Any:
    """A model that no test changes."""
    return zoo.build(case, dtype=torch.float32)


def asked() -> list[Any]:
    """Every method on one family, a few of them on one of every kind."""
    rows = []
    for family in ("gpt2", "bert", "bart", "t5"):
        case = next((case for case in zoo.cases() if case.family == family), None)
        if case is None:
            continue
        # What is beyond the host's passes is the same on every version.
        every = family == "gpt2" and zoo.major() == 4
        table = PER_METHOD if every else {name: PER_METHOD[name] for name in SOME}
        lens = LENS if family == "bart" else {}
        rows += [
            pytest.param(case, method, id=f"{name}-{case}")
            for name, method in (table | lens).items()
        ]
    return rows


@pytest.mark.parametrize(("case", "method"), asked())
def test_what_is_told_is_what_is_measured(case: zoo.Case, method: Callable[..., Any]) -> None:
    model, batch, pos = model_of(case), 2, 14
    two = case.encoder_decoder and "decoder_lens" not in repr(method)
    told = cm.estimate(model, pos, method, batch=batch, n_decoder_tokens=9 if two else None)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, zoo.rows.D_VOCAB, (batch, pos), generator=generator)
    decoder = torch.randint(5, zoo.rows.D_VOCAB, (batch, 9), generator=generator)
    given = zoo.Inputs(tokens, decoder if two else None)
    require_measured(told, lambda: method(model, given.tokens, **keywords(given)))
    assert sum(part.flops for part in told.parts) == told.flops
    assert sum(part.bytes for part in told.parts) == told.peak_bytes


def require_measured(told: Estimate, call: Callable[[], object]) -> None:
    """Holds an estimate against the call itself."""
    with Memory() as memory, Operations() as counter:
        call()
    assert told.flops == pytest.approx(counter.total, rel=WITHIN)
    assert told.peak_bytes == pytest.approx(memory.peak, rel=WITHIN)


AGAIN = ("attention_norms", "value_zeroing", "decompose", "decompx", "ff_memories")


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_what_a_model_keeps_from_its_first_call_is_known(family: str, name: str) -> None:
    model, method = zoo.build(case_of(family), dtype=torch.float32), PER_METHOD[name]
    tokens = torch.randint(5, 50, (2, 14), generator=torch.Generator().manual_seed(1))
    method(model, tokens)
    require_measured(cm.estimate(model, 14, method, batch=2), lambda: method(model, tokens))


@pytest.mark.parametrize("name", ["log_prob_contributions", "gradient_x_input", "attention"])
def test_a_masked_model_is_asked_about_its_mask(name: str) -> None:
    model = model_of(case_of("bert"))
    asked = cm.estimate(model, 9, name)
    whole = {"pos": -1} if name == "gradient_x_input" else {}
    assert asked.flops == cm.estimate(model, 9, partial(getattr(cm, name), **whole)).flops


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_what_a_model_says_is_as_long_as_it_may_be(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ask = model_of(case_of(family)), partial(cm.attention, generate=4)
    tokens = torch.randint(5, 50, (1, 14), generator=torch.Generator().manual_seed(1))
    if hasattr(model, "original_model"):  # which must not end before
        monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", None)
    require_measured(cm.estimate(model, 14, ask), lambda: ask(model, tokens))


def test_as_many_nodes_as_a_graph_may_have_are_estimated() -> None:
    model = model_of(case_of("gpt2"))
    tokens = torch.randint(5, 50, (1, 14), generator=torch.Generator().manual_seed(1))
    for options in ({"k": 60, "share": 1.0}, {"k": 30, "neurons": True, "prune": "influence"}):
        told = cm.estimate(model, 14, partial(cm.flow, **options))
        with Memory() as memory, Operations() as counter:
            cm.flow(model, tokens, **options)
        assert told.flops == pytest.approx(counter.total, rel=WITHIN)
        assert 0.9 * memory.peak < told.peak_bytes < 1.4 * memory.peak


def test_what_leaves_torch_is_estimated_too(middle: Any) -> None:
    told = cm.estimate(middle, 96, lambda *given: cm.attention(*given).to_dataframe())
    assert told.flops == cm.estimate(middle, 96, cm.attention).flops
    assert cm.estimate(middle, 96, cm.attention_flow).flops == told.flops


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_sliding_windows_are_known(family: str) -> None:
    model, tokens = model_of(case_of(family)), torch.arange(60).view(2, 30) % 40 + 15
    windows = [block.attentions[0].window for block in view_of(model).blocks()]
    assert windows == ([4, 4] if family == "mistral" else [4, None])
    ask = partial(cm.attention_norms, at="mlp_out", layer=0)
    told = cm.estimate(model, 30, ask, batch=2)
    with Operations() as counter:
        ask(model, tokens)
    assert told.flops == pytest.approx(counter.total, rel=0.02)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_who_reads_whom_is_known_for_long_inputs(family: str) -> None:
    """DecompX carries tokens to those that can read them."""
    model = model_of(case_of(family))
    tokens = torch.arange(60).view(2, 30) % 40 + 15
    require_measured(cm.estimate(model, 30, cm.decompx, batch=2), lambda: cm.decompx(model, tokens))


def test_every_method_of_a_model_and_tokens_is_measured() -> None:
    """A new one cannot be forgotten."""
    known = {name.split()[0] for name in (*PER_METHOD, *LENS)}
    known |= {name for name, one in methods().items() if not one.estimated}
    for name, function in FUNCTIONS.items():
        parameters = [*inspect.signature(function).parameters][:2]
        assert name in known or parameters != ["model", "input"], name


def test_nothing_of_the_length_is_computed_and_nothing_is_kept(middle: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = cm.estimate(middle, 8192, partial(cm.decompose, at="resid_mid"))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert told.peak_bytes > 2**35
    assert grown < 2**30
    tokens = torch.arange(5, 25)[None]
    again = cm.value_zeroing(middle, tokens)
    cm.estimate(middle, 64, cm.value_zeroing)
    assert torch.equal(cm.value_zeroing(middle, tokens).scores, again.scores)


@pytest.mark.parametrize("name", [*SOME[:2], "decompx", "gradient_x_input"])
def test_an_estimate_is_less_work_than_the_call(name: str, middle: Any) -> None:
    """From 128 tokens on: about as many operators, hardly a number, whatever the length."""
    method, tokens = PER_METHOD[name], torch.randint(5, 500, (1, 128))
    operators, numbers = _work(lambda: method(middle, tokens))
    estimated, computed = _work(lambda: cm.estimate(middle, 128, method))
    longer, _ = _work(lambda: cm.estimate(middle, 512, method))
    assert estimated < 1.5 * operators
    assert computed < numbers / 20
    # Tiles of Value Zeroing fit the cache: a longer input has more of them.
    growth = 2 if name == "value_zeroing" else 1.2
    assert longer < growth * estimated


def _work(work: Callable[[], object]) -> tuple[int, int]:
    """How many operators run, and how many floating-point numbers they really compute."""
    numbers: list[int] = []

    def see(func: Any, args: Any, out: Any) -> None:
        made = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        real = [one for one in made if one.is_floating_point() and one.device.type != "meta"]
        numbers.append(0 if func.is_view else sum(one.numel() for one in real))

    with Watched(see):
        work()
    return len(numbers), sum(numbers)


def test_memories_of_many_neurons_are_estimated() -> None:
    """More values than the numbers of a model that shapes alone stand for."""
    model = random_gpt2(words=2_000, positions=64, neurons=8192)
    told = cm.estimate(model, 16, partial(cm.ff_memories, k=5)).flops
    with Operations() as counter:
        cm.ff_memories(model, torch.arange(5, 21)[None], k=5)
    assert 0.8 <= told / counter.total <= 1.25


def test_told_to_a_reader() -> None:
    model = model_of(case_of("gpt2"))
    told = cm.estimate(model, 6, partial(cm.attention_norms, at="mlp_out"), batch=3)
    assert told.method == "attention_norms(at='mlp_out')"
    assert "3 x 6 tokens" in repr(told)
    assert told.passes == 1
    assert [*told.to_dataframe().columns] == ["name", "flops", "bytes"]
    more = cm.estimate(model, 12, partial(cm.attention_norms, at="mlp_out"), batch=3)
    assert more.flops > 2 * told.flops


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, cm.attention), "this n_tokens"),
        ((5.0, cm.attention), "n_tokens"),
        ((5, "attend"), "method"),
        ((5, int), "unknown method"),
        ((zoo.rows.N_CTX + 1, cm.attention), "longest input of this model"),
        ((5, partial(cm.attention, layer=9)), "no such layer"),
    ],
)
def test_what_cannot_be_estimated_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    model = model_of(case_of("gpt2"))
    with pytest.raises(cm.InvalidInput, match=message):
        cm.estimate(model, *arguments)


# Budgets

BUDGET = 3 * 2**19
BUDGETED = [
    name
    for name, method in PER_METHOD.items()
    if zoo.major() == 4
    and "max_bytes" in inspect.signature(method).parameters
    and name not in ("attention_norms small", "value_zeroing small")
]
# While a result of vectors is put together, one layer of it (chunk by chunk: two) is there twice.
TWICE = {"decompose": 1, "decompose heads": 1, "decompx_vectors": 4}


@pytest.fixture(scope="module")
def middle() -> Any:
    """A model whose workspace does not fit into the budget."""
    return random_gpt2(words=500, positions=8192)


def random_gpt2(words: int, positions: int, neurons: int = 256) -> Any:
    """A random GPT-2 of two layers."""
    options = {
        "vocab_size": words,
        "n_positions": positions,
        "n_ctx": positions,
        "n_embd": 64,
        "n_inner": neurons,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    hf = zoo_build.hugging_face(
        "GPT2LMHeadModel", "GPT2Config", options, dtype=torch.float32, seed=0
    )
    if zoo.major() == 2:
        return zoo_build.hooked(
            hf, "gpt", "HookedTransformer", dtype=torch.float32, processed=False
        )
    return zoo_build.bridge(hf, "gpt", dtype=torch.float32, processed=False)


@pytest.mark.parametrize("name", BUDGETED)
def test_the_budget_is_kept(name: str, middle: Any) -> None:
    """Measured: beside what the pass leaves and the result, max_bytes and a tenth at most."""
    tokens = torch.randint(5, 500, (1, 96))
    told = cm.estimate(middle, 96, PER_METHOD[name])
    kept, result = (part.bytes for part in told.parts[:2])
    with Memory() as memory:
        partial(PER_METHOD[name], max_bytes=BUDGET)(middle, tokens)
    bound = 1.1 * BUDGET + TWICE.get(name, 0) * result / 2
    assert memory.peak - kept - result <= bound


def test_without_a_budget_there_would_be_more(middle: Any) -> None:
    """Or the test above would say nothing."""
    for method in (cm.attention_norms, cm.value_zeroing, cm.decompx):
        told = cm.estimate(middle, 96, method)
        assert told.parts[2].bytes > 1.2 * BUDGET


def test_the_gradient_of_many_logits_counts() -> None:
    """It is as large as the logits, which are most of what a large vocabulary takes."""
    model, tokens = random_gpt2(words=50_000, positions=64), torch.randint(5, 500, (1, 64))
    told = cm.estimate(model, 64, cm.gradient_x_input)
    with Memory() as memory:
        cm.gradient_x_input(model, tokens)
    assert told.peak_bytes == pytest.approx(memory.peak, rel=0.03)
