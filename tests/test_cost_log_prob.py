"""What contributions cost: operations and bytes, counted; nothing here depends on the machine."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from watched import Watched

pytest.importorskip("meters", reason="the benchmarks are part of the repository only")

import log_prob as benchmark
import memories
from log_prob import Sizes, full_flops, peak
from meters import WithoutProducts, flops

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.core.residual_stream import Neurons
from tl_contextmix.core.token_sums import FrozenNorm
from tl_contextmix.engine import selection
from tl_contextmix.results.components import Grid, join

pytestmark = pytest.mark.once

MIB = 2**20
aten = torch.ops.aten
SHAPE = (6, 512, 64, 5_000)


def best_flops(sizes: Sizes, k: int) -> int:
    """Operations of finding the best neurons."""
    return flops(partial(sizes.best, k), elementwise=False)


@pytest.mark.parametrize("heavy", [0.5, 1.5])
def test_the_best_hundred_cost_a_tenth_of_all(heavy: float) -> None:
    sizes = Sizes(*SHAPE, heavy=heavy)
    layers, neurons, width, vocabulary = SHAPE
    every = full_flops(sizes)
    assert every >= 2 * layers * neurons * width * vocabulary
    assert every <= 1.02 * 2 * layers * neurons * width * vocabulary
    # 3,072 neurons: 128 are evaluated. With ten times as many it is a hundredth.
    assert best_flops(sizes, 100) <= every / 10
    assert best_flops(sizes, 10) <= every / 40


def test_operations_do_not_grow_with_the_neurons_that_are_not_evaluated() -> None:
    layers, neurons, width, vocabulary = SHAPE
    few, many = (Sizes(layers, n, width, vocabulary) for n in (neurons, 4 * neurons))
    assert best_flops(many, 10) <= 1.3 * best_flops(few, 10)


def test_the_best_are_the_best_and_all_the_bound_needs() -> None:
    sizes = Sizes(3, 64, 32, 500)
    found = benchmark.best_components(sizes.vocabulary(), sizes.states[0], sizes.splits, 7, 0)
    whole = sizes.full().flatten()
    torch.testing.assert_close(found.score, whole.topk(7).values, atol=2e-6, rtol=1e-5)
    assert found.evaluated < whole.numel()


@pytest.mark.parametrize("budget", [4 * MIB, 16 * MIB])
def test_the_budget_is_kept(budget: int) -> None:
    sizes = Sizes(2, 512, 64, 20_000)
    held = 20_000 * 4 * 4 + 3 * 512 * 64 * 4  # distributions of single states, neurons' vectors
    for work in (partial(sizes.best, 50, budget), partial(sizes.full, 2, budget)):
        assert peak(work) <= budget + held
    large = peak(partial(sizes.full, 2, 16 * MIB))
    assert peak(partial(sizes.full, 2, 2 * MIB)) < large


def test_all_neurons_take_tiles_that_fit_the_cache() -> None:
    sizes = Sizes(1, 1024, 768, 50_257)
    with WithoutProducts():
        # The layer's vectors and some distributions.
        assert peak(partial(sizes.full, 1, 2**30)) <= 16 * MIB


def test_attention_neurons_never_meet_the_vocabulary_source_by_source() -> None:
    """Rows of W_O are multiplied with W_U once, whatever the number of sources and sentences."""
    sizes = Sizes(1, 256, 64, 5_000)
    vocabulary = sizes.vocabulary(8 * MIB)
    rows = sizes.splits[0].neurons.rows

    def work(sources: int) -> None:
        found = Neurons(lambda: rows, torch.rand(1, sources, 256), FrozenNorm((), torch.ones(1, 1)))
        vocabulary.neuron_gains(sizes.states[:, 1], found.vectors, found.coefficients)

    few, many = (flops(partial(work, count), elementwise=False) for count in (1, 40))
    assert many == few
    # [source, neuron, d_vocab] would be 195 MiB.
    assert peak(partial(work, 40)) <= 9 * MIB


def test_candidates_are_not_listed() -> None:
    """Finding the best attention neurons takes a few numbers each, no table of their labels."""
    model = cm.load_demo("causal-lm")
    tokens = torch.arange(3, 63).expand(4, 60)
    candidates = 4 * 4 * 60 * 128  # sentences, layers, sources, dimensions of all heads

    def work(**options: object) -> int:
        return peak(partial(cm.log_prob_contributions, model, tokens, target=5, **options))

    work(by="layer")
    more = work(by="attn_neuron", k=5) - work(by="layer")
    # Labels are 6 columns of 8 bytes; activations stay, and a bound and its mask for one sentence.
    assert more <= 16 * candidates


def test_a_control_of_a_large_model_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """36 layers of 5,120 neurons, 1,000 chosen: a table of pairs would take 5 GiB."""
    layers = [selection.Sublayer("mlp", layer, 0, 5120, "") for layer in range(36)]
    monkeypatch.setattr(selection, "every_sublayer", lambda view: iter(layers))
    pos, generator = torch.tensor([5]), torch.Generator().manual_seed(0)
    some = torch.randperm(36 * 5120, generator=generator)[None, :1000]
    grids = [Grid("mlp", layer, pos, (("neuron", range(5120)),)) for layer in range(36)]
    chosen = join([grid.table() for grid in grids]).select(some)
    view = as_view(cm.load_demo("causal-lm"))
    controls = selection.Controls(view, chosen, seed=0)
    drawn = []
    assert peak(lambda: drawn.append(controls.draw())) <= 8 * MIB
    numbers = (drawn[0].layer * 5120 + drawn[0].neuron)[0]
    assert len(numbers.unique()) == 1000
    assert not torch.isin(numbers, some).any()


def test_layers_and_heads_are_a_few_products() -> None:
    model = cm.load_demo("causal-lm")
    text = "the capital of france is"

    def ask(**options: object) -> int:
        return flops(partial(cm.log_prob_contributions, model, text, **options), elementwise=False)

    # A forward pass reads W_U five times; 9 states, 8 sublayers and 16 heads are 33 more rows.
    assert ask(by="head") <= 6 * ask(by="layer")
    assert ask(by="ff_neuron", k=10) <= ask(by="ff_neuron") / 8


def test_the_benchmark_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--quick"])
    out = capsys.readouterr().out
    assert out.count("| --- |") >= 4
    for expected in ("log-normal", "the capital of", "log_prob_increase", "random"):
        assert expected in out


@pytest.mark.parametrize(
    ("by", "k"),
    [
        *(("layer", None), ("head", None), ("position", None), ("head_position", None)),
        *(("head", 10), ("position", 10), ("head_position", 10), ("ff_neuron", 10)),
    ],
)
def test_the_unembedding_is_read_once_for_all_layers(by: Any, k: int | None) -> None:
    """By the model, for the states, for vectors, and for bounds where there are some."""
    model = cm.load_demo("causal-lm")
    ask = partial(cm.log_prob_contributions, model, "the keys to the cabinet", by=by, k=k)
    products: list[Any] = []

    def see(func: Any, args: Any, out: Any) -> None:
        known = func._overloadpacket in (aten.mm, aten.addmm, aten.bmm)
        shapes = [arg.shape for arg in args if isinstance(arg, torch.Tensor)]
        if known and any(model.cfg.d_vocab in shape for shape in shapes):
            products.append(func)

    found = ask()
    with Watched(see):
        ask()
    assert len(products) == (3 if k is None else 4)
    tight = ask(max_bytes=2**16)
    torch.testing.assert_close(tight.scores, found.scores, equal_nan=True, rtol=0, atol=1e-6)


def test_the_best_of_heads_and_positions_cost_less_than_half_a_pass() -> None:
    model, tokens = memories.gpt2(4, 128, 2000), torch.arange(64)[None]
    ask = partial(cm.log_prob_contributions, model, tokens, target=5, by="head_position")
    few, every = ask(k=10), ask().top(10)
    assert torch.equal(few.components.numbers(), every.components.numbers())
    torch.testing.assert_close(few.scores, every.scores, rtol=0, atol=1e-6)
    with torch.no_grad():
        once = flops(lambda: model(tokens), elementwise=False)
    assert flops(partial(ask, k=10), elementwise=False) <= 1.4 * once
    assert flops(ask, elementwise=False) >= 2.5 * once


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_products_by_onednn_are_those_of_double_precision() -> None:
    seen: set[str] = set()

    def scores(model: Any) -> torch.Tensor:
        text = "the keys to the cabinet"
        found = cm.log_prob_contributions(model, text, target=" are", by="ff_neuron")
        return found.scores.double()

    model = cm.load_demo("causal-lm")
    with Watched(lambda func, args, out: seen.add(func.name())):
        found = scores(model)
    assert "mkldnn::_linear_pointwise" in seen
    exact = scores(model.to(torch.float64))
    # Rounding in float32: 2e-7 of the largest was measured.
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
