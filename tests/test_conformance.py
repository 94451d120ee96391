"""The contract that every method meets on every model of the zoo, on every host."""

from __future__ import annotations

import dataclasses
import functools
import re
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from asked import bound, keywords, relative, shared, stacks, state, told, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.engine.parts import Point
from tl_contextmix.results import (
    AttentionKnockout,
    AttributionGraph,
    ContextMap,
    ContextReliance,
    Decomposition,
    HeadDecomposition,
    Knockout,
    LogProbContributions,
    Memories,
    QueryContributions,
    Scan,
    TokenFigures,
    TokenMemory,
)

CASES = zoo.cases()
_OPEN = "attn_out"  # the only point that every block of the zoo can answer, SoLU's too


@dataclass(frozen=True)
class Method:
    """One public function as the contract sees it.

    Attributes:
        name: Its name.
        ask: Calls it on a model and tokens with further keywords.
        kind: Class of the result.
        array: Name of the tensor of the result that carries the numbers.
        stacked: Whether it is asked about a stack and layers; else about a prediction.
        pointed: Whether it is asked at a point of the block; else it is about the whole block,
            feed-forward sublayer included.
        column: Name of the numbers in its table.
        worded: Whether it is given text, or asked about a mask, which takes a tokenizer.
        linear: Whether it takes logits that are linear in the stream.
        batched: Whether it takes several sentences.
    """

    name: str
    ask: Callable[..., Any]
    kind: type[Any] = ContextMap
    array: str = "scores"
    stacked: bool = False
    pointed: bool = False
    column: str = "score"
    worded: bool = False
    linear: bool = False
    batched: bool = True

    def values(self, result: Any) -> Tensor:
        """The numbers of a result; those of all predictions of a sentence are in its row."""
        found = getattr(result, self.array)
        if self.kind is LogProbContributions:
            found = found.unflatten(0, (len(result.sentence.unique()), -1))
        return found


def queried(
    model: Any, tokens: Tensor, target_ids: int | None = None, **options: Any
) -> QueryContributions:
    """What activates two attention neurons, the same for every sentence."""
    asked = {"by": "attn_neuron", "target": target_ids, "pos": -1}
    found = cm.log_prob_contributions(model, tokens, **asked, **options)
    first = found.components.of_kind("attn") & (found.components.layer == 1)
    index = first[:1].nonzero()[:2, 1].expand(len(tokens), 2)
    names = ("scores", "coefficients", "logits")
    place = index.to(found.scores.device)
    numbers = {name: getattr(found, name).gather(1, place) for name in names}
    some = dataclasses.replace(found, components=found.components.select(index), **numbers)
    return cm.query_contributions(model, tokens, neurons=some, pos=-1, **options)


def answered(model: Any, tokens: Tensor, **options: Any) -> LogProbContributions:
    """Contributions to an answer of two tokens, at masks where a model fills these."""
    view, answer = view_of(model), [[9, 5]] * len(tokens)
    if view.base_stack(None) == "encoder":
        mask = view.special_ids().get("mask")
        if mask is None:
            return cm.log_prob_contributions(model, tokens, target=9, pos=1, **options)
        tokens = torch.cat([torch.full_like(tokens[:, :2], mask), tokens[:, 2:]], dim=1)
    return cm.log_prob_contributions(model, tokens, target=answer, **options)


def toward(model: Any, tokens: Tensor, **options: Any) -> LogProbContributions:
    """Contributions of heads to a direction of the second layer's output."""
    width = view_of(model).blocks()[0].attentions[0].W_O.shape[2]
    target = cm.Direction(torch.linspace(-1, 2, width), layer=1, at="block_out")
    return cm.log_prob_contributions(model, tokens, target=target, pos=-1, by="head", **options)


def worded(model: Any, tokens: Tensor) -> list[str]:
    """Sentences as text."""
    return [model.tokenizer.decode(row.tolist()).strip() for row in tokens]


def scanned(model: Any, tokens: Tensor, **options: Any) -> Scan:
    """A scan with each sentence in a category of its own."""
    del options  # a scan gives a decoder its own beginning
    if view_of(model).base_stack(None) == "encoder":
        mask = torch.full_like(tokens[:, :1], view_of(model).special_ids()["mask"])
        tokens = torch.cat([mask, tokens], dim=1)
    rows = [(row, 9, 7, str(place)) for place, row in enumerate(tokens.tolist())]
    return cm.scan(model, rows, by=("layer", "head"))


def chatted(model: Any, tokens: Tensor, **options: Any) -> LogProbContributions:
    """Contributions to a token in the assistant's turn."""
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text.split()[0]}]
        for text in worded(model, tokens)
    ]
    template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    with unittest.mock.patch.object(model.tokenizer, "chat_template", template):
        return cm.log_prob_contributions(model, chats, by="head", target=9, pos=-1, **options)


def relied(model: Any, tokens: Tensor, **options: Any) -> ContextReliance:
    """What an answer takes from the first sentence."""
    view, (context, *_) = view_of(model), worded(model, tokens)
    prompt = " ".join(context.split()[:2])
    if view.base_stack(None) == "encoder":
        prompt = f"{prompt} {model.tokenizer.mask_token}"
    first = {name: value[:1] for name, value in options.items()}
    return cm.context_reliance(model, context, prompt, target=9, **first)


def graphed(ask: Callable[..., Any], model: Any, tokens: Tensor, **options: Any) -> Any:
    """A graph of the first sentence."""
    first = {name: value[:1] for name, value in options.items()}
    return ask(model, tokens[:1], pos=-1, **first)


ON_POINTS: dict[str, Any] = {"stacked": True, "pointed": True}
METHODS = [
    Method("decompose", cm.decompose, Decomposition, "parts", **ON_POINTS),
    Method("attention_norms", cm.attention_norms, **ON_POINTS),
    Method("mixing_ratio", cm.mixing_ratio, TokenFigures, "values", column="value", **ON_POINTS),
    *(
        Method(ask.__name__, ask, stacked=True)
        for ask in (cm.value_zeroing, cm.attention, cm.globenc, cm.alti, cm.decompx)
    ),
    Method(
        "log_prob_contributions",
        partial(cm.log_prob_contributions, by="position", pos=-1),
        LogProbContributions,
    ),
    Method("query_contributions", queried, QueryContributions),
    Method(
        "knockout",
        partial(cm.knockout, heads=[(0, 1)], pos=-1, controls=0),
        Knockout,
        "after",
        column="after",
    ),
    Method(
        "attention_knockout",
        partial(cm.attention_knockout, sources=[-2, -1], pos=-1),
        AttentionKnockout,
        "log_probs",
        column="log_prob",
    ),
    Method("attention_flow", cm.attention_flow),
    Method("gradient_x_input", partial(cm.gradient_x_input, pos=-1)),
    Method("integrated_gradients", partial(cm.integrated_gradients, steps=4, pos=-1)),
    Method("ff_memories", cm.ff_memories, Memories, "probability", column="probability"),
    Method("token_memory", cm.token_memory, TokenMemory, "shares", stacked=True),
]


# The same methods with other options: one family of each kind is enough.
QUESTIONS = [
    Method(
        "decompose, heads",
        partial(cm.decompose, heads=True),
        HeadDecomposition,
        "parts",
        **ON_POINTS,
    ),
    *(
        Method(f"log_prob_contributions, {name}", ask, LogProbContributions)
        for name, ask in {
            "foil": partial(
                cm.log_prob_contributions, by="head", pos=-1, target={9, 5}, foil={7, 8}
            ),
            "several tokens": answered,
            "all positions": partial(cm.log_prob_contributions, by="head", pos="all"),
            "direction": toward,
        }.items()
    ),
]


# What the methods above say of a text, or have added up: the contract holds for it too.
FURTHER = [
    *(
        Method(
            f"{ask.__name__}, logit",
            partial(ask, of="logit", target=9, foil=7, pos=-1),
            linear=True,
        )
        for ask in (cm.alti, cm.decompx)
    ),
    Method("scan", scanned, Scan, "mean", column="mean", worded=True),
    Method("chats", chatted, LogProbContributions, worded=True),
    Method("context_reliance", relied, ContextReliance, worded=True, batched=False),
    *(
        Method(ask.func.__name__, partial(graphed, ask), AttributionGraph, batched=False)
        for ask in (
            partial(cm.flow, target=9, foil=7, k=12),
            partial(cm.information_flow_routes, threshold=0.1),
        )
    ),
]


def answers(method: Method, family: str) -> bool:
    """Whether a method has an answer about the models of a family."""
    if method.worded and family not in zoo.hf_families():
        return False  # without a tokenizer
    if method.linear and family in zoo.CURVED_READOUT:
        return False  # refused by name, see test_alti_logit.py
    if family == "attn_only":
        return not method.name.endswith(("_memory", "_memories"))
    return method.pointed or not method.stacked or family not in zoo.OPAQUE_FEED_FORWARD


PAIRS = [
    (method, case)
    for case in CASES
    for method in (METHODS + QUESTIONS if case in zoo.kinds() else METHODS)
    if answers(method, case.family)
]
ASKED = [pytest.param(method, case, id=f"{method.name}-{case}") for method, case in PAIRS]
STACKED = [param for param, (method, _) in zip(ASKED, PAIRS, strict=True) if method.stacked]
MORE = [(m, case) for case in zoo.kinds() for m in FURTHER if answers(m, case.family)]
EVERY = ASKED + [pytest.param(method, case, id=f"{method.name}-{case}") for method, case in MORE]
BATCHED = [p for p, (m, _) in zip(EVERY, PAIRS + MORE, strict=True) if m.batched]


def last_point(case: zoo.Case) -> str:
    """The furthest point that a case can be asked about."""
    return "mlp_in" if case.family in zoo.OPAQUE_FEED_FORWARD else "block_out"


def ask(method: Method, model: Any, case: zoo.Case, given: zoo.Inputs, **options: Any) -> Any:
    """Calls a method at the furthest point, whatever was done to the weights."""
    view_of(model)
    options = {"at": last_point(case), **options} if method.pointed else options
    return method.ask(model, given.tokens, **keywords(given), **options)


@functools.cache
def answer(method: Method, case: zoo.Case) -> Any:
    """What a method says about the words for a case, with the defaults of everything."""
    return ask(method, zoo.shared(case), case, zoo.inputs(case))


@pytest.mark.parametrize(("method", "case"), STACKED)
def test_shapes_labels_and_dtype(method: Method, case: zoo.Case) -> None:
    model, given = shared(case)
    for stack in stacks(case):
        named = stack is not None
        found: Any = ask(method, model, case, given, stack=stack) if named else answer(method, case)
        values = method.values(found)
        blocks = view_of(model).blocks(stack)
        decoder = None if stack == "encoder" else given.decoder_tokens
        targets = given.tokens if decoder is None else decoder
        assert type(found) is method.kind
        assert values.dtype == torch.float64
        assert found.layers == tuple(range(len(blocks)))
        assert values.shape[:2] == (2, len(blocks))
        labels = found.tokens if method.name == "mixing_ratio" else found.target
        assert torch.equal(labels.ids, targets)
        assert bool(torch.isfinite(values).all())
        one = ask(method, model, case, given, stack=stack, layer=-1)
        assert one.layers == (len(blocks) - 1,)
        assert torch.equal(method.values(one)[:, 0], values[:, -1])


@pytest.mark.parametrize(("method", "case"), BATCHED)
def test_a_batch_equals_its_rows_and_twice_is_the_same(method: Method, case: zoo.Case) -> None:
    model, given = shared(case)
    whole = method.values(answer(method, case))
    assert torch.equal(whole, method.values(ask(method, model, case, given)))
    for row in range(2):
        decoder = None if given.decoder_tokens is None else given.decoder_tokens[row : row + 1]
        single = zoo.Inputs(given.tokens[row : row + 1], decoder)
        found = method.values(ask(method, model, case, single))
        assert relative(found, whole[row : row + 1]) <= bound(case)


@pytest.mark.parametrize(("method", "case"), EVERY)
def test_the_model_is_left_as_it_was(method: Method, case: zoo.Case) -> None:
    model, given = shared(case)
    # TransformerLens leaves hooks of its own behind the first time a bridge runs.
    answer(method, case)
    before = state(model)
    ask(method, model, case, given)
    assert state(model) == before

    def interrupt(tensor: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    last = view_of(model).blocks()[-1].attentions[0].value
    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[(last, interrupt)]):
        ask(method, model, case, given)
    assert state(model) == before


@pytest.mark.parametrize(("method", "case"), EVERY)
def test_saved_loaded_tabulated_and_shown(method: Method, case: zoo.Case, tmp_path: Path) -> None:
    found = answer(method, case)
    again = method.kind.load(found.save(tmp_path / "result.safetensors"))
    assert torch.equal(method.values(again), method.values(found))
    assert again.provenance == found.provenance
    frame = found.to_dataframe()
    numbers = method.values(found)
    numbers = numbers.norm(dim=-1) if "decompose" in method.name else numbers
    assert frame[method.column].sum() == pytest.approx(float(numbers.sum()), rel=1e-9)
    page = found.show()._repr_html_()
    assert "<" in page
    # The CircuitsVis library carries the addresses of XML namespaces and of its licences.
    own = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']?https?:", own)


PROCESSED = [case for case in CASES if zoo.processable(case)]


@pytest.mark.parametrize("case", PROCESSED, ids=str)
def test_processed_weights_are_detected_and_named_once(case: zoo.Case) -> None:
    model, given = zoo.build(case, processed=True), zoo.inputs(case)
    with told() as said:
        first = cm.attention_norms(model, given.tokens, at=_OPEN, **keywords(given))
        again = cm.attention_norms(model, given.tokens, at=_OPEN, **keywords(given))
    processing = first.provenance.processing
    changes_norms = {"center_writing_weights", "fold_value_biases"} & set(processing)
    assert again.provenance.processing == processing
    assert len(said) == bool(changes_norms)
    for step in changes_norms:
        assert step in said[0]
        assert "no_processing" in said[0]
    raw = cm.attention_norms(zoo.shared(case), given.tokens, at=_OPEN, **keywords(given))
    assert raw.provenance.processing == ()
    # What is called processed changes the map, and what changes the map is called processed.
    changed = relative(first.scores, raw.scores) > 1e-4
    assert changed == bool(changes_norms)


# Only HookedTransformer folds norms alone, where there are some.
FOLDABLE = [c for c in PROCESSED if c.host == "HookedTransformer" and c.family != "no_norm"]


@pytest.mark.parametrize("case", FOLDABLE, ids=str)
def test_folding_norms_alone_changes_no_map_but_mlp_in(
    case: zoo.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    points: list[Point] = ["attn_out", "resid_mid"]
    if case.family not in zoo.OPAQUE_FEED_FORWARD and case.family != "attn_only":
        points.extend(["mlp_out", "resid_post"])
    before = cm.attention_norms(model, given.tokens, at=points)
    # process_weights_ has no switch for value biases and folds them too.
    load = partial(model.load_and_process_state_dict, fold_value_biases=False)
    monkeypatch.setattr(model, "load_and_process_state_dict", load)
    model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    after = cm.attention_norms(model, given.tokens, at=points)
    assert after[points[0]].provenance.processing in ((), ("fold_ln",))
    for point in points:
        # TransformerLens 3 folds in float32: 1e-6 off in a float64 model.
        assert relative(after[point].scores, before[point].scores) <= 5e-6, point
