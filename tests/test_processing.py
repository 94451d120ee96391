"""Which step of TransformerLens' weight processing changes which method: measured, and said."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
import zoo_build
from asked import case_of, relative
from torch import Tensor, nn

import tl_contextmix as cm
from tl_contextmix.adapters.weight_processing import _WARNED
from tl_contextmix.engine.log_prob_scores import SPLITS
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.errors import ContextMixWarning
from tl_contextmix.results import LogProbContributions

STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
GOLD: dict[str, Any] = {"target": 9}
NEURONS: dict[str, Any] = {
    "ff_neuron": [(1, 3), (1, 5)],
    "attn_neuron": [(1, 0, 2), (1, 1, 3)],
    "head": [(0, 1), (1, 0)],
}
Method = Callable[[Any, Tensor], Tensor]


def methods() -> dict[str, Method]:
    """Every method under every option that processing makes a difference for, by its name."""
    found: dict[str, Method] = {
        "attention": lambda m, x: cm.attention(m, x).scores,
        "globenc": lambda m, x: cm.globenc(m, x).scores,
        "alti": lambda m, x: cm.alti(m, x).scores,
        "decompx": lambda m, x: cm.decompx(m, x).scores,
        "token_memory": lambda m, x: cm.token_memory(m, x).shares,
    }
    for at in POINTS:
        found[f"attention_norms {at}"] = lambda m, x, at=at: cm.attention_norms(m, x, at=at).scores
        found[f"decompose {at}"] = lambda m, x, at=at: cm.decompose(m, x, at=at).parts
    for at in ("mlp_in", "resid_mid"):
        found[f"mixing_ratio {at}"] = lambda m, x, at=at: cm.mixing_ratio(m, x, at=at).values
    for last in (True, False):
        found[f"value_zeroing {last}"] = lambda m, x, last=last: (
            cm.value_zeroing(m, x, final_norm=last).scores
        )
    for of in ("logit", "log_prob"):
        found[f"gradient_x_input {of}"] = lambda m, x, of=of: (
            cm.gradient_x_input(m, x, of=of).scores
        )
        found[f"integrated_gradients {of}"] = lambda m, x, of=of: (
            cm.integrated_gradients(m, x, of=of, steps=50).scores
        )
    for by in SPLITS:
        if by == "expert":
            continue  # this model has none
        found[f"log_prob_contributions {by}"] = lambda m, x, by=by: (
            cm.log_prob_contributions(m, x, by=by, **GOLD).scores
        )
        found[f"component_readouts {by}"] = lambda m, x, by=by: (
            cm.component_readouts(m, x, components=_components(x, by)).top_logits
        )
        for share in ("exact", "ratio"):
            found[f"query_contributions {by} {share}"] = lambda m, x, by=by, share=share: (
                cm.query_contributions(
                    m, x, neurons=NEURONS["ff_neuron"], by=by, share=share, **GOLD
                ).scores
            )
    for by in ("layer", "head", "position", "head_position"):
        found[f"query_contributions {by} of an edge"] = lambda m, x, by=by: (
            cm.query_contributions(m, x, edge=(1, 2, -1, 1), by=by).scores
        )
    for score in ("coefficient", "norm", "coefficient_norm", "rank"):
        found[f"log_prob_contributions ff_neuron {score}"] = lambda m, x, score=score: (
            cm.log_prob_contributions(m, x, by="ff_neuron", score=score, **GOLD).scores
        )
    for cut, chosen in NEURONS.items():
        name = "heads" if cut == "head" else "neurons"
        for instead in ("zero", "mean"):
            found[f"knockout {cut} {instead}"] = lambda m, x, n=name, c=chosen, i=instead: (
                cm.knockout(m, x, **{n: c}, replace_with=i, everywhere=True, **GOLD).after
            )
    for projection in ("none", "folded", "frozen"):
        text = "the cat" if projection == "frozen" else None
        found[f"ff_values {projection}"] = lambda m, x, p=projection, t=text: torch.cat(
            [(v := cm.ff_values(m, projection=p, text=t)).logits.flatten(), v.norm]
        )
    for projection in ("none", "model"):
        found[f"ff_memories {projection}"] = lambda m, x, p=projection: torch.cat(
            [(v := cm.ff_memories(m, x, projection=p)).probability.flatten(), v.norm.flatten()]
        )
    return found


@functools.cache
def _unprocessed() -> dict[str, Tensor]:
    """What every method says about the unprocessed model."""
    tokens = zoo.inputs(_case()).tokens[:1]
    return {name: method(zoo.shared(_case()), tokens) for name, method in methods().items()}


def _components(tokens: Tensor, by: Any) -> LogProbContributions:
    """The same components for every model, found by the unprocessed one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cm.log_prob_contributions(zoo.shared(_case()), tokens, by=by, **GOLD).top(6)


def _case() -> zoo.Case:
    return case_of("gpt2", host="TransformerBridge")


@pytest.mark.parametrize("step", STEPS)
def test_a_method_speaks_up_where_its_numbers_change_and_nowhere_else(step: str) -> None:
    model = zoo.build(_case())
    with zoo_build.quiet():
        model.enable_compatibility_mode(**{name: name == step for name in STEPS})
    nn.Module.to(model, torch.float64)
    tokens = zoo.inputs(_case()).tokens[:1]
    wrong = {}
    for name, method in methods().items():
        expected = _unprocessed()[name].double().nan_to_num(-7)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = method(model, tokens).double().nan_to_num(-7)
        said = [str(one.message) for one in caught if one.category is ContextMixWarning]
        # Processing is in float32: 1e-6 where it changes nothing.
        change = relative(found, expected)
        heard = " ".join(text for text in said if text.startswith(f"{name.split()[0]} of "))
        named = {one for one in STEPS if f"{one}:" in heard}
        # Refactoring folds value biases as well, and alone names other neurons.
        expected = {step} if change > 1e-4 else set()
        if step == "refactor_factored_attn_matrices" and expected:
            expected = {"fold_value_biases", *(expected if "attn_neuron" in name else ())}
            expected -= {"fold_value_biases"} if "mean" in name else set()
        if named != expected:
            wrong[name] = (change, said)
        _WARNED[model].clear()
    assert not wrong


def test_it_speaks_up_once_for_each_method_and_says_what_to_do() -> None:
    case = case_of("gpt2")
    model, tokens = zoo.build(case, processed=True), zoo.inputs(case).tokens
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cm.check(model)
        cm.attention(model, tokens)
        cm.estimate(model, 4, method=cm.value_zeroing)
        for _ in range(2):
            cm.attention_norms(model, tokens, at="attn_out")
            cm.value_zeroing(model, tokens, final_norm=False)
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        cm.attention_norms(model, tokens, at="resid_mid")
        cm.attention_norms(model, tokens, at="mlp_in")
    told = [str(one.message) for one in caught if one.category is ContextMixWarning]
    assert [text.split()[0] for text in told] == [
        *("attention_norms", "value_zeroing", "attention_norms")
    ]
    assert "center_writing_weights: " in told[0]
    assert "fold_ln: " in told[2]
    remedies = {
        "HookedTransformer": "from_pretrained_no_processing(",
        "TransformerBridge": "without enable_compatibility_mode()",
    }
    for text in told:
        assert remedies[case.host] in text
        assert "tl_contextmix.load_model" in text
        assert " %" not in text  # no size: it cannot be known


def test_norms_without_gains_from_the_start_are_not_called_changed() -> None:
    case = case_of("ln_pre")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cm.attention_norms(zoo.build(case), zoo.inputs(case).tokens, at="mlp_in")
