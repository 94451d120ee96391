"""Which step of TransformerLens' weight processing changes which method: measured, and said."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import zoo
import zoo_build
from asked import case_of, relative, told
from torch import Tensor, nn

import tl_contextmix as cm
from tl_contextmix.adapters.weight_processing import _WARNED
from tl_contextmix.engine.log_prob_scores import SPLITS
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.results import LogProbContributions, Memories, ValueReadouts

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


def _values(model: Any, tokens: Tensor, **options: Any) -> ValueReadouts:
    return cm.ff_values(model, **options)


def methods() -> dict[str, Callable[..., Any]]:
    """Every method under every option that processing makes a difference for, by its name."""
    found: dict[str, Callable[..., Any]] = {
        ask.__name__: ask
        for ask in (cm.attention, cm.globenc, cm.alti, cm.decompx, cm.token_memory)
    }
    for at in POINTS:
        found[f"attention_norms {at}"] = partial(cm.attention_norms, at=at)
        found[f"decompose {at}"] = partial(cm.decompose, at=at)
    for at in ("mlp_in", "resid_mid"):
        found[f"mixing_ratio {at}"] = partial(cm.mixing_ratio, at=at)
    for last in (True, False):
        found[f"value_zeroing {last}"] = partial(cm.value_zeroing, final_norm=last)
    for of in ("logit", "log_prob"):
        found[f"gradient_x_input {of}"] = partial(cm.gradient_x_input, of=of)
        found[f"integrated_gradients {of}"] = partial(cm.integrated_gradients, of=of, steps=50)
    for by in SPLITS:
        if by == "expert":
            continue  # this model has none
        found[f"log_prob_contributions {by}"] = partial(cm.log_prob_contributions, by=by, **GOLD)
        found[f"component_readouts {by}"] = lambda m, x, by=by: cm.component_readouts(
            m, x, components=_components(x, by)
        )
        for share in ("exact", "ratio"):
            found[f"query_contributions {by} {share}"] = partial(
                cm.query_contributions, neurons=NEURONS["ff_neuron"], by=by, share=share, **GOLD
            )
    for by in ("layer", "head", "position", "head_position"):
        found[f"query_contributions {by} of an edge"] = partial(
            cm.query_contributions, edge=(1, 2, -1, 1), by=by
        )
    for score in ("coefficient", "norm", "coefficient_norm", "rank"):
        found[f"log_prob_contributions ff_neuron {score}"] = partial(
            cm.log_prob_contributions, by="ff_neuron", score=score, **GOLD
        )
    for cut, chosen in NEURONS.items():
        name = "heads" if cut == "head" else "neurons"
        for instead in ("zero", "mean"):
            found[f"knockout {cut} {instead}"] = partial(
                cm.knockout, **{name: chosen}, replace_with=instead, everywhere=True, **GOLD
            )
    for way, text in (("none", None), ("folded", None), ("frozen", "the cat")):
        found[f"ff_values {way}"] = partial(_values, projection=way, text=text)
    for how in ("none", "model"):
        found[f"ff_memories {how}"] = partial(cm.ff_memories, projection=how)
    return found


# Arrays of results: of several the first counts.
NUMBERS = ("top_logits", "scores", "parts", "values", "shares", "after", "logits", "probability")


def numbers(result: Any) -> Tensor:
    """The numbers of a result, lengths of values beside what these promote."""
    array = getattr(result, next(name for name in NUMBERS if hasattr(result, name)))
    lengths = [result.norm.flatten()] if isinstance(result, (Memories, ValueReadouts)) else []
    return torch.cat([array.flatten(), *lengths]).double().nan_to_num(-7)


@functools.cache
def _unprocessed() -> dict[str, Tensor]:
    """What every method says about the unprocessed model."""
    tokens = zoo.inputs(_case()).tokens[:1]
    return {name: numbers(ask(zoo.shared(_case()), tokens)) for name, ask in methods().items()}


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
        expected = _unprocessed()[name]
        with told() as said:
            found = numbers(method(model, tokens))
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
    with told() as said:
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
    assert [text.split()[0] for text in said] == [
        *("attention_norms", "value_zeroing", "attention_norms")
    ]
    assert "center_writing_weights: " in said[0]
    assert "fold_ln: " in said[2]
    remedies = {
        "HookedTransformer": "from_pretrained_no_processing(",
        "TransformerBridge": "without enable_compatibility_mode()",
    }
    for text in said:
        assert remedies[case.host] in text
        assert "tl_contextmix.load_model" in text
        assert " %" not in text  # no size: it cannot be known


def test_norms_without_gains_from_the_start_are_not_called_changed() -> None:
    case = case_of("ln_pre")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cm.attention_norms(zoo.build(case), zoo.inputs(case).tokens, at="mlp_in")
