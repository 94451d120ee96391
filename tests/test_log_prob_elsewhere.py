"""What others compute: TransformerLens' own tools, and the numbers the authors printed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from asked import case_of, view_of

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.core.tiled_logits import NormRule
from tl_contextmix.engine.log_prob_scores import By, run_question

FOUR = pytest.mark.skipif(zoo.major() < 4, reason="TransformerLens 4 has these tools")


def question(model: Any, tokens: torch.Tensor, norm: NormRule) -> Any:
    """The engine's view of a prediction."""
    asked = run_question(view_of(model), Given(tokens), Answer(target=9, pos=-1))
    return asked.prediction(norm, 2**30)


@FOUR
# It wants weights that are processed, as heads are then warned of.
@pytest.mark.filterwarnings("ignore:log_prob_contributions of")
@pytest.mark.parametrize("wrong", [None, 7])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "opt"])
def test_direct_logit_attribution_agrees(family: str, wrong: int | None) -> None:
    from transformer_lens.tools.analysis import direct_logit_attribution

    case = case_of(family)
    # It wants folded norms, and strings or ids of one token.
    model = zoo.build(case, dtype=torch.float32, processed=True)
    tokens = zoo.inputs(case).tokens[:1]
    view_of(model)
    units: list[tuple[str, By]] = [("component", "layer"), ("head", "head")]
    for unit, by in units:
        if unit == "head" and family == "opt":
            continue  # its bridge shows no results per head
        theirs = direct_logit_attribution(
            model, tokens, answer_tokens=9, incorrect_tokens=wrong, unit=unit
        )
        names = dict(zip(theirs.labels, theirs.attribution.flatten().tolist(), strict=True))
        ours = cm.log_prob_contributions(model, tokens, target=9, foil=wrong, by=by, norm="frozen")
        if wrong is not None:  # no softmax is left: an increase is a difference of logits
            torch.testing.assert_close(ours.scores, ours.logits, atol=1e-5, rtol=0)
        seen = 0
        for place in range(ours.scores.shape[1]):
            one = ours.components.at(0, place)
            label = f"{one['layer']}_{one['kind']}_out"
            if by == "head":
                label = f"L{one['layer']}H{one['head']}"
            if label in names:
                assert float(ours.logits[0, place]) == pytest.approx(names[label], abs=2e-5), label
                seen += 1
        layers = len(view_of(model).blocks())
        assert seen == layers * (2 if by == "layer" else 4)
        if by == "layer":
            start = sum(value for name, value in names.items() if "embed" in name)
            assert float(ours.logits[0, 0]) == pytest.approx(start, abs=2e-5)


@FOUR
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "neox"])
def test_the_logit_lens_agrees(family: str) -> None:
    from transformer_lens.tools.analysis import logit_lens

    case = case_of(family)
    model = zoo.shared(case, dtype=torch.float32)
    tokens = zoo.inputs(case).tokens
    ours = cm.log_prob_contributions(model, tokens, target=9, norm="recompute")
    mid = family in ("gpt2", "llama", "gemma2", "olmo2")
    theirs = logit_lens(model, tokens, targets=9, return_type="log_probs", incl_mid=mid)
    found = ours.trajectory[:, 1:] if mid else ours.trajectory[:, 1::2]
    torch.testing.assert_close(found, theirs.values[..., 0].T, atol=2e-5, rtol=0)


@FOUR
def test_logit_readout_agrees() -> None:
    from transformer_lens.tools.analysis import logit_readout

    case = case_of("gpt2")
    model = zoo.shared(case, dtype=torch.float32)
    tokens = zoo.inputs(case).tokens
    neurons = cm.log_prob_contributions(model, tokens, target=9, by="ff_neuron", k=6)
    ours = cm.component_readouts(model, tokens, components=neurons, k=5)
    asked = question(model, tokens, "frozen")
    view = view_of(model)
    for row in range(2):
        for place in range(6):
            one = neurons.components.at(row, place)
            rows = view.blocks()[one["layer"]].feed_forward.W_out
            vector = float(neurons.coefficients[row, place]) * rows[one["neuron"]]
            vector = asked.vocabulary.direction(vector) / asked.vocabulary.divisor[row]
            theirs = logit_readout(model, vector[None], apply_ln=False).values[0] - model.b_U
            for name, largest in (("top", True), ("bottom", False)):
                found = theirs.topk(5, largest=largest)
                mine = getattr(ours, f"{name}_logits")[row, place]
                torch.testing.assert_close(mine, found.values, atol=1e-5, rtol=1e-5)
                assert torch.equal(getattr(ours, f"{name}_ids")[row, place], found.indices)
            target = ours.top_ids[row, place, 0]
            assert ours.top_words[row][place][0] == view.to_string(int(target))


# Numbers printed in the authors' notebook (2024, GPT2-large), norm scale frozen, no bias.

TEXT, TARGET = "Tim Duncan plays the sport of", " basketball"
LAYERS = {("attn", 21): 0.698, ("attn", 19): 0.471, ("attn", 28): 0.443}
LAYERS |= {("mlp", 27): 0.706, ("mlp", 28): 0.603, ("mlp", 22): 0.566}
HEADS = {"L21H19": 0.6981, "L28H18": 0.4259, "L23H13": 0.3098}
NEURONS = {"L28N29": 0.4481, "L21N983": 0.2473, "L24N4743": 0.2323, "L27N1254": 0.1643}
ATTENTION = {"L21H19N7<-1": 0.0712, "L21H19N5<-1": 0.0559, "L23H13N36<-1": 0.0452}


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "model.safetensors", "tokenizer.json")
    return all(isinstance(try_to_load_from_cache(name, file), str) for file in files)


@pytest.fixture(scope="module")
def gpt2_large() -> Any:
    names = [name for name in ("gpt2-large", "openai-community/gpt2-large") if _cached(name)]
    if not names:
        pytest.skip("gpt2-large is not in the local Hugging Face cache")
    return cm.load_model(names[0])


@pytest.mark.weights
@pytest.mark.slow
def test_the_authors_numbers(gpt2_large: Any) -> None:
    def scores(by: By, **options: Any) -> dict[Any, float]:
        found = cm.log_prob_contributions(
            gpt2_large, TEXT, target=TARGET, by=by, norm="frozen", prepend_bos=False, **options
        )
        return dict(zip(found.labels(), found.scores[0].tolist(), strict=True))

    layers = scores("layer")
    for kind, total in (("attn", 5.586), ("mlp", 4.406)):
        found = sum(value for name, value in layers.items() if name.endswith(kind))
        assert found == pytest.approx(total, abs=5e-3)
    for (kind, layer), value in LAYERS.items():
        assert layers[f"L{layer} {kind}"] == pytest.approx(value, abs=2e-3)
    heads = scores("head")
    assert {name: heads[name] for name in HEADS} == pytest.approx(HEADS, abs=1e-3)
    known: list[tuple[By, Any]] = [("ff_neuron", NEURONS), ("attn_neuron", ATTENTION)]
    for by, expected in known:
        best = scores(by, k=20)
        assert list(best)[: len(expected)] == list(expected)
        assert {name: best[name] for name in expected} == pytest.approx(expected, abs=1e-3)


@pytest.mark.weights
@pytest.mark.slow
def test_the_authors_query_neurons(gpt2_large: Any) -> None:
    given = {"target": TARGET, "norm": "frozen", "prepend_bos": False}
    values = cm.log_prob_contributions(gpt2_large, TEXT, by="ff_neuron", k=30, **given)
    found = cm.query_contributions(
        gpt2_large, TEXT, neurons=values, by="ff_neuron", share="ratio", k=10, **given
    )
    names = [found.components.label(0, place) for place in range(10)]
    scores = dict(zip(names, found.scores[0].tolist(), strict=True))
    expected = {"L27N1254": 0.0682, "L0N1984": 0.0244, "L16N505": 0.0199}
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-3)
