"""The same weights give the same numbers on every host and version: stored ones, of every method.

``python tests/test_goldens.py`` adds what is missing, under any version of TransformerLens. Numbers
that are there already are never replaced: delete what is meant to change.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from asked import keywords, points, view_of
from public import FUNCTIONS
from test_conformance import queried, toward
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.methods.decompx import decompx_vectors
from tl_contextmix.results import ContextMap, LayerFigures, LogProbContributions

GOLDENS = Path(__file__).parent / "goldens.json"
# Relative to the sum of what is added up. Hosts with float32 inside are up to 1e-6 off per entry,
# and a few methods divide by what is small.
BOUND = 1e-5

Ask = Callable[..., Tensor]


def _maps(ask: Callable[..., ContextMap]) -> Ask:
    return lambda model, tokens, **given: ask(model, tokens, **given).scores


def _by(by: Any, **asked: Any) -> Ask:
    def ask(model: Any, tokens: Tensor, **given: Any) -> Tensor:
        return cm.log_prob_contributions(model, tokens, by=by, pos=-1, **asked, **given).scores

    return ask


def _heads(model: Any, tokens: Tensor, **given: Any) -> LogProbContributions:
    found = cm.log_prob_contributions(model, tokens, by="head", pos=-1, **given)
    return found.top(2)


def _own_stack(given: dict[str, Any]) -> dict[str, Any]:
    """Where both axes are the same tokens."""
    return given | {"stack": "encoder"} if given else {}


def _points(model: Any, tokens: Tensor, **given: Any) -> dict[Any, ContextMap]:
    given = _own_stack(given)
    every = points(view_of(model).blocks(given.get("stack"))[0])
    return cm.attention_norms(model, tokens, at=every, **given)


def _pairs(model: Any, tokens: Tensor, **given: Any) -> Tensor:
    maps = _points(model, tokens, **given)
    found = cm.amplified_pairs(maps["resid_mid"], maps["block_out"], k=3)
    return torch.tensor(
        [pair.after - pair.before for pair in (*found.amplified, *found.suppressed)]
    )


def _lens(model: Any, tokens: Tensor, **given: Any) -> Tensor:
    said = cm.decoder_lens(model, tokens, max_new_tokens=4, **given)
    judged = cm.decoder_lens(model, tokens, mode="teacher_forced", max_new_tokens=4, **given)
    return torch.cat([said.log_probs.flatten(), judged.kl.flatten(), judged.log_probs.flatten()])


def _memories(model: Any, tokens: Tensor, **given: Any) -> Tensor:
    found = cm.ff_memories(model, tokens, **given)
    return torch.cat([found.coefficients.flatten(), found.probability.flatten()])


def _values(model: Any, tokens: Tensor, **given: Any) -> Tensor:
    return cm.ff_values(model, layer=1, neurons=[0, 3], k=3).logits


def _figures(ask: Callable[..., LayerFigures]) -> Ask:
    # There is no figure of a component that a parallel block does not have: NaN.
    return lambda model, tokens, **given: torch.nan_to_num(
        ask(_points(model, tokens, **given)).values, nan=-1.0
    )


# Every method, by what it is about: the columns of README's table of support.
METHODS: dict[str, dict[str, Ask]] = {
    "maps": {
        "decompose": lambda model, tokens, **given: cm.decompose(model, tokens, **given).parts,
        "decompose by head": lambda model, tokens, **given: (
            cm.decompose(model, tokens, at="resid_mid", heads=True, **given).parts
        ),
        "attention_norms": _maps(cm.attention_norms),
        "mixing_ratio": lambda model, tokens, **given: (
            cm.mixing_ratio(model, tokens, at="resid_mid", **given).values
        ),
        "rollout": lambda model, tokens, **given: (
            cm.attention_norms(model, tokens, **_own_stack(given)).rollout().scores
        ),
        "amplified_pairs": _pairs,
        "value_zeroing": _maps(cm.value_zeroing),
        "attention": _maps(cm.attention),
        "attention_flow": lambda model, tokens, **given: (
            cm.attention_flow(model, tokens, **_own_stack(given)).scores
        ),
        "globenc": _maps(cm.globenc),
        "alti": _maps(cm.alti),
        "alti to a logit": _maps(functools.partial(cm.alti, of="logit", target=9, foil=7, pos=-1)),
        "decompx": _maps(cm.decompx),
        "decompx_vectors": lambda model, tokens, **given: (
            decompx_vectors(model, tokens, **given).parts
        ),
        "gradient_x_input": _maps(functools.partial(cm.gradient_x_input, pos=-1)),
        "integrated_gradients": lambda model, tokens, **given: (
            cm.integrated_gradients(model, tokens, steps=4, pos=-1, **given).scores
        ),
    },
    "FF maps": {
        "contextualization_change": _figures(cm.contextualization_change),
        "cancellation": _figures(cm.cancellation),
    },
    "memories": {
        "ff_memories": _memories,
        "ff_values": _values,
        "token_memory": lambda model, tokens, **given: (
            cm.token_memory(model, tokens, **given).shares
        ),
    },
    "log-prob": {
        "log_prob_contributions by layer": _by("layer"),
        "log_prob_contributions by head": _by("head"),
        "log_prob_contributions by position": _by("position"),
        "log_prob_contributions by ff_neuron": _by("ff_neuron"),
        "log_prob_contributions with a foil": _by("head", target=9, foil=7),
        "log_prob_contributions to a direction": lambda model, tokens, **given: (
            toward(model, tokens, **given).scores
        ),
        "query_contributions": lambda model, tokens, **given: (
            queried(model, tokens, **given).scores
        ),
        "knockout": lambda model, tokens, **given: (
            cm.knockout(model, tokens, heads=[(0, 1)], pos=-1, controls=0, **given).after
        ),
        "attention_knockout": lambda model, tokens, **given: (
            cm.attention_knockout(model, tokens, pos=-1, window=2, **given).log_probs
        ),
        "component_readouts": lambda model, tokens, **given: (
            cm.component_readouts(
                model, tokens, components=_heads(model, tokens, **given), k=3, **given
            ).top_logits
        ),
    },
    "DecoderLens": {"decoder_lens": _lens},
}
CASES = [case for case in zoo.cases() if case.family not in zoo.OPAQUE_FEED_FORWARD]


def asked(case: zoo.Case) -> dict[str, Ask]:
    """The methods that have an answer about a case."""
    without: set[str] = set() if case.encoder_decoder else {"DecoderLens"}
    if case.family in zoo.CURVED_READOUT:
        without |= {"alti to a logit"}
    if case.family == "attn_only":
        without |= {"FF maps", "memories", "log_prob_contributions by ff_neuron"}
    return {
        name: ask
        for column, methods in METHODS.items()
        for name, ask in methods.items()
        if not without & {column, name}
    }


def fingerprint(values: Tensor) -> list[float]:
    """A weighted sum of the numbers, which sees them change places, and the sum of their sizes."""
    values = values.double().flatten()
    assert bool(values.isfinite().all())
    weights = torch.linspace(1, 2, len(values), dtype=torch.float64)
    return [float(f"{number:.9g}") for number in (values @ weights, values.abs() @ weights)]


def fingerprints(case: zoo.Case, names: set[str] | None = None) -> dict[str, list[float]]:
    """The fingerprints of some methods' answers about a case."""
    model, given = zoo.shared(case), zoo.inputs(case)
    return {
        name: fingerprint(ask(model, given.tokens, **_keywords(name, given)))
        for name, ask in asked(case).items()
        if names is None or name in names
    }


def _keywords(name: str, given: zoo.Inputs) -> dict[str, Any]:
    # What the decoder said is what is asked for, but it may only begin with one token.
    return {} if name == "decoder_lens" else keywords(given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_host_and_version_gives_the_same_numbers(case: zoo.Case) -> None:
    goldens = json.loads(GOLDENS.read_text())[case.family]
    found = fingerprints(case)
    assert set(found) == set(goldens)
    for name, (number, size) in found.items():
        golden, golden_size = goldens[name]
        assert size == pytest.approx(golden_size, rel=BOUND), name
        assert abs(number - golden) <= BOUND * golden_size, name


def test_every_method_has_goldens() -> None:
    """Every public function that asks a model something, by its first argument."""
    named = {name.partition(" ")[0] for methods in METHODS.values() for name in methods}
    other = {
        "check": "a report on identities, which hold or not",
        "compare": "a table of the methods here",
        "cue_alignment": "a figure of maps",
        "agreement": "a figure of maps",
        "faithfulness": "a figure of maps",
        "context_reliance": "two texts; its passes and maps are of methods here",
        "composition": "sums of ff_memories over a corpus",
        "mine_triggers": "a search through coefficients of ff_memories",
        "mine_on_ray": "the same search",
        "report": "a page",
        "probe": "trained on activations, which are held against decompose on every kind of block",
        "scan": "means of log_prob_contributions",
        "flow": "a graph of one prediction; its sums are checked on every family",
        "flow_knockout": "runs of the model, compared with hooks of one's own",
        "information_flow_routes": "a graph of one prediction, compared with the full graph",
        "estimate": "operations and bytes",
        "hook_names": "names of activations",
    }
    for name, function in FUNCTIONS.items():
        first = next(iter(inspect.signature(function).parameters), "")
        assert first not in ("model", "maps", "map", "before") or name in named | set(other), name


if __name__ == "__main__":
    known = json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {}
    for one in CASES:
        family = known.setdefault(one.family, {})
        missing = set(asked(one)) - set(family)
        if missing:
            family |= fingerprints(one, missing)
    lines = [
        f' "{family}": {{\n'
        + ",\n".join(f'  "{name}": {json.dumps(found)}' for name, found in sorted(methods.items()))
        + "\n }"
        for family, methods in sorted(known.items())
    ]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
