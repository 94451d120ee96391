"""Attention knockout does what masking the host's own scores does, one edge after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from asked import bound, case_of, keywords, shared, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.blocks import AttentionSublayer, Batch
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.results import AttentionKnockout
from tl_contextmix.results.token_groups import find_groups

Edge = tuple[int, list[int], list[int]]  # head, readers, sources


def sublayers(view: ModelView, stack: Any) -> list[AttentionSublayer]:
    kind = "cross" if stack == "cross" else "self"
    return [next(a for a in b.attentions if a.kind == kind) for b in view.blocks(stack)]


def literal(
    view: ModelView, given: zoo.Inputs, stack: Any, layers: list[int], edges: list[Edge]
) -> Tensor:
    """Logits with edges cut, layer by layer: each pattern is read, cut, and mixed by hand."""
    batch = make_batch(view, Given(given.tokens, **keywords(given)))
    fixed: dict[str, Any] = {}
    for attention in [sublayers(view, stack)[layer] for layer in sorted(layers)]:
        trace = view.run(batch, [attention.pattern, attention.value, attention.mixed], edits=fixed)
        pattern = trace[attention.pattern].clone()
        for head, readers, sources in edges:
            for reader in readers:
                for source in sources:
                    pattern[:, head, reader, source] = 0
        pattern = pattern / pattern.sum(-1, keepdim=True)
        z = torch.einsum("bhts,bshd->bthd", pattern.nan_to_num(0), trace.value(attention))
        fixed[attention.mixed] = lambda old, z=z: z.to(old)
    logits = view.run(batch, [], edits=fixed).logits
    assert logits is not None
    return logits


STACKS: list[tuple[zoo.Case, Any]] = [
    (case, stack)
    for case in zoo.spread()
    for stack in (["encoder", "decoder", "cross"] if case.encoder_decoder else [None])
]


@pytest.mark.parametrize(("case", "stack"), STACKS, ids=str)
def test_edges_are_cut_in_a_window_of_layers(case: zoo.Case, stack: Any) -> None:
    model, given = shared(case)
    view = view_of(model)
    count = len(view.blocks(stack))
    options: dict[str, Any] = {"target": 9, "pos": [-2, -1], "stack": stack, **keywords(given)}
    found = cm.attention_knockout(
        model,
        given.tokens,
        sources={"a": [0, 2], "b": 1},
        to=[2, -1],
        window=2,
        heads=[[1], [0, 2]],
        **options,
    )
    assert found.windows == tuple(
        tuple(range(max(0, layer - 1), layer + 1)) for layer in range(count)
    )
    own = zoo.logits(model, given)[:, -2:].log_softmax(dim=-1)[..., 9].flatten()
    torch.testing.assert_close(found.log_prob, own.to(found.log_prob))
    reads = given.decoder_tokens if stack in ("decoder", "cross") else given.tokens
    readers = [2, reads.shape[1] - 1]
    limit = max(1e-9, 10 * bound(case))
    changed = 0.0
    for layer, heads, group in ((0, 0, 1), (count - 1, 1, 0), (count - 1, 0, 1)):
        sources = [[0, 2], [1]][group]
        edges = [(head, readers, sources) for head in [[1], [0, 2]][heads]]
        expected = literal(view, given, stack, [*found.windows[layer]], edges)
        expected = expected[:, -2:].log_softmax(dim=-1)[..., 9].flatten()
        value = found.log_probs[:, layer, heads, group]
        torch.testing.assert_close(value, expected.to(value), atol=limit, rtol=0)
        changed = max(changed, float(found.changes[:, layer, heads, group].abs().max()))
    assert changed > 1e-6
    torch.testing.assert_close(found.probs, found.log_probs.exp())


@pytest.mark.parametrize("case", zoo.spread(), ids=str)
def test_a_hook_on_the_scores_does_the_same(case: zoo.Case) -> None:
    """As the paper has it, wherever the host computes with its scores."""
    model, given = shared(case)
    view = view_of(model)
    stack: Any = "cross" if case.encoder_decoder else None
    names = [
        one.pattern.replace("hook_pattern", "hook_attn_scores") for one in sublayers(view, stack)
    ]
    path = names[0].rpartition(".")[0]
    if type(model.get_submodule(path)).forward.__qualname__ == "AttentionBridge.forward":
        pytest.skip("Hugging Face's module computes the scores")

    def mask(scores: Tensor, hook: Any) -> Tensor:
        scores[:, :, -1, 1:3] = -torch.inf
        return scores

    with torch.no_grad():
        logits = model.run_with_hooks(
            given.tokens,
            fwd_hooks=[(name, mask) for name in names],
            **keywords(given),
        )
    found = cm.attention_knockout(
        model,
        given.tokens,
        sources=(1, 3),
        window=None,
        target=9,
        pos=-1,
        stack=stack,
        to=-1,
        **keywords(given),
    )
    expected = logits[:, -1].log_softmax(dim=-1)[:, 9]
    limit = max(1e-10, 10 * bound(case))
    torch.testing.assert_close(
        found.log_probs.flatten(), expected.to(found.log_probs), atol=limit, rtol=0
    )


@pytest.mark.parametrize("family", ["opt", "bert"])
def test_a_mask_in_hugging_face_does_the_same(family: str) -> None:
    model, given = shared(case_of(family))
    hf = zoo.hf_model(family)
    layers = hf.model.decoder.layers if family == "opt" else hf.bert.encoder.layer
    last = [len(layers) - 2, len(layers) - 1]
    cut = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    cut[:, :, 4, [1, 3]] = -torch.inf

    def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        known = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": cut if known is None else known + cut}

    for layer in last:
        attention = layers[layer].self_attn if family == "opt" else layers[layer].attention.self
        attention.register_forward_pre_hook(mask, with_kwargs=True)
    with torch.no_grad():
        expected = hf(given.tokens, attention_mask=torch.ones_like(given.tokens)).logits
    found = cm.attention_knockout(
        model, given.tokens, sources=[[1, 3]], layer=last, window=None, target=9, pos=4
    )
    expected = expected[:, 4].log_softmax(-1)[:, 9]
    torch.testing.assert_close(found.log_probs.flatten(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_a_row_without_sources_attends_to_nothing(family: str) -> None:
    model, given = shared(case_of(family))
    view = view_of(model)
    reads = given.tokens if given.decoder_tokens is None else given.decoder_tokens
    every = [(0, reads.shape[1])]
    found = cm.attention_knockout(
        model, given.tokens, sources=every, to=3, layer=1, target=9, pos=-1, **keywords(given)
    )

    def nothing(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, 3] = 0
        return z

    batch = make_batch(view, Given(given.tokens, **keywords(given)))
    logits = view.run(batch, [], edits={sublayers(view, None)[1].mixed: nothing}).logits
    expected = logits[:, -1].log_softmax(dim=-1)[:, 9]
    torch.testing.assert_close(found.log_probs.flatten(), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_a_sweep_is_one_run_or_many(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = shared(case_of(family))
    view_of(model)
    ran = shapes_of_runs(monkeypatch)
    options: dict[str, Any] = {"target": 9, "pos": -1, **keywords(given)}
    whole = cm.attention_knockout(model, given.tokens, **options)
    at_once = [*ran]
    parts = cm.attention_knockout(model, given.tokens, max_bytes=1, **options)
    cuts = whole.changes[0].numel()
    before = [tuple(given.tokens.shape)]
    last = before[0]
    if family == "gpt2":  # what stays, and the last position without a cut
        before, last = [(2, 6), (2, 5), (2, 1)], (2, 1)
    assert at_once == [*before, (2 * cuts, last[1])]
    assert ran[len(at_once) :] == [*before, *[last] * cuts]
    torch.testing.assert_close(whole.log_probs, parts.log_probs)
    each = [
        cm.attention_knockout(model, given.tokens, sources=source, layer=layer, **options).changes
        for layer, source in ((0, 1), (1, 0))
    ]
    torch.testing.assert_close(each[0][:, 0, 0, 0], whole.changes[:, 0, 0, 1])
    torch.testing.assert_close(each[1][:, 0, 0, 0], whole.changes[:, 1, 0, 0])
    assert float(whole.changes.abs().amax()) > 1e-3


def shapes_of_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Numbers of sentences and of positions of each run of a model, as they come."""
    ran, plain = [], ModelView.run

    def counted(view: ModelView, batch: Batch, *args: Any, **options: Any) -> Any:
        ran.append(tuple(batch.main.ids.shape))
        return plain(view, batch, *args, **options)

    monkeypatch.setattr(ModelView, "run", counted)
    return ran


CAUSAL = [case for case in zoo.cases() if not (case.encoder_decoder or case.both_ways)]


@pytest.mark.parametrize("case", CAUSAL, ids=str)
@pytest.mark.parametrize(("pos", "to", "runs"), [([-2, -1], [3, -1], 3), ([2, 3], [2, 4], 2)])
def test_only_what_a_cut_reaches_runs_again(
    case: zoo.Case, pos: Any, to: Any, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first position that reads something else to the last prediction."""
    model, given = shared(case)
    options: dict[str, Any] = {"target": 9, "foil": 5, "pos": pos, "to": to, "window": 2}
    view_of(model)
    ran = shapes_of_runs(monkeypatch)
    found = cm.attention_knockout(model, given.tokens, heads=[[0], [1]], **options)
    cuts = 2 * found.changes[0].numel()
    assert ran == [(2, 6), (2, to[0]), (2, runs), (cuts, runs)]
    monkeypatch.setattr("tl_contextmix.engine.copied_runs._stretches", nothing)
    whole = cm.attention_knockout(model, given.tokens, heads=[[0], [1]], **options)
    assert ran[-1] == (cuts, 6)
    limit = max(1e-10, bound(case))
    torch.testing.assert_close(found.changes, whole.changes, atol=limit, rtol=0)
    torch.testing.assert_close(found.probs, whole.probs, atol=limit, rtol=0)


def nothing(*_: object) -> list[object]:
    """Returns no stretch that could run alone."""
    return []


@pytest.mark.once
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_one_length_run_together(
    side: Any, causal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the keys to the cabinet", "the key", "the books on the shelf", "the man"]
    targets = [" are", " is", " are", " is"]
    options: dict[str, Any] = {"sources": [-1, -2], "window": None, "padding_side": side}
    ran = shapes_of_runs(monkeypatch)
    found = cm.attention_knockout(causal, texts, target=targets, **options)
    assert ran.count((4, 1)) == 2, "two texts of each length, two cuts of each"
    for row, (text, target) in enumerate(zip(texts, targets, strict=True)):
        one = cm.attention_knockout(causal, text, target=target, **options)
        torch.testing.assert_close(found.changes[row], one.changes[0], atol=1e-5, rtol=0)
        assert float(one.changes.abs().max()) > 1e-3


@pytest.mark.once
@pytest.mark.parametrize("how", ["another text", "an error", "no memory"])
def test_a_host_that_keeps_the_wrong_keys_runs_whole(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = shared(case_of("gpt2"))
    options: dict[str, Any] = {"target": 9, "pos": -1, "sources": [1, 2]}
    expected = cm.attention_knockout(model, given.tokens, **options)
    plain = ModelView.run

    def run(view: ModelView, batch: Batch, *args: Any, **others: Any) -> Any:
        if batch.past is not None and how == "an error":
            raise TypeError("got an unexpected keyword argument 'past_key_values'")
        if batch.past is not None and how == "no memory":
            raise torch.OutOfMemoryError
        if batch.past is not None and batch.main.ids.shape[1] > 1:
            batch = replace(batch, main=batch.main.each(lambda ids: ids.flip(1)))
        return plain(view, batch, *args, **others)

    monkeypatch.setattr(ModelView, "run", run)
    if how == "no memory":
        with pytest.raises(torch.OutOfMemoryError):
            cm.attention_knockout(model, given.tokens, **options)
        return
    found = cm.attention_knockout(model, given.tokens, **options)
    torch.testing.assert_close(found.changes, expected.changes, atol=1e-12, rtol=0)


@pytest.mark.once
def test_one_text_whose_keys_are_wrong_runs_all_whole(
    causal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the keys to the cabinet", "the key"]
    options: dict[str, Any] = {"target": " is", "sources": [1, 2]}
    expected = cm.attention_knockout(causal, texts, **options)
    plain = ModelView.run

    def run(view: ModelView, batch: Batch, *args: Any, **others: Any) -> Any:
        if batch.past is not None and batch.main.ids.shape[1] == 2:
            batch = replace(batch, main=batch.main.each(lambda ids: ids.flip(1)))
        return plain(view, batch, *args, **others)

    monkeypatch.setattr(ModelView, "run", run)
    ran = shapes_of_runs(monkeypatch)
    found = cm.attention_knockout(causal, texts, **options)
    cuts = found.changes[0].numel()
    first = ran.index((1, 5))
    assert ran[first:] == [(1, 5), (1, 1), (cuts, 1), (1, 2), (1, 1), (2 * cuts, 6)]
    torch.testing.assert_close(found.changes, expected.changes, atol=1e-5, rtol=0)


@pytest.mark.once
def test_a_cut_is_compared_with_a_run_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = shared(case_of("gpt2"))
    plain = ModelView.run

    def run(view: ModelView, batch: Batch, *args: Any, **options: Any) -> Any:
        trace = plain(view, batch, *args, **options)
        if batch.past is None or trace.logits is None:
            return trace
        return replace(trace, logits=trace.logits * (1 + 1e-6))  # rounded in another way

    monkeypatch.setattr(ModelView, "run", run)
    options: dict[str, Any] = {"target": 9, "pos": [-2, -1], "to": 3}
    found = cm.attention_knockout(model, given.tokens, **options)
    assert float(found.changes.abs().max()) > 1e-3
    behind = found.changes[..., 4:]
    torch.testing.assert_close(behind, torch.zeros_like(behind), atol=1e-12, rtol=0)


@pytest.mark.once
def test_a_source_is_a_position_of_each_text(causal: Any) -> None:
    texts = ["the keys to the cabinet", "the key"]
    nouns = cm.attention_knockout(causal, texts, sources=2, target=" is", foil=" are")
    assert nouns.source.strings == ((" keys",), (" key",))


@pytest.mark.once
def test_answers_of_several_tokens_and_generated_ones() -> None:
    model = cm.load_demo("causal-lm")
    said = cm.attention_knockout(model, "the keys to the", generate=3, sources=" keys", window=None)
    assert [said.asked(row) for row in range(3)] == ["' red'", "' books'", "' are'"]
    assert said.sentence.tolist() == [0, 0, 0]
    answer = cm.attention_knockout(
        model, "the keys to the", target=" red books are", sources=" keys", window=None
    )
    torch.testing.assert_close(answer.changes, said.changes)
    # All positions that predict are cut together: what is said next cannot be a way around.
    whole = cm.attention_knockout(
        model,
        "the keys to the red books",
        target=" are",
        to=[4, 5, 6],
        sources=" keys",
        window=None,
    )
    torch.testing.assert_close(answer.changes[2:], whole.changes, atol=1e-4, rtol=0)


@pytest.mark.once
@pytest.mark.parametrize(("kind", "least"), [("agreement", 3.0), ("fact", 8.0), ("name", 10.0)])
def test_what_the_demo_model_knows_hangs_on_the_right_words(kind: str, least: float) -> None:
    """Subjects decide verbs, countries their capitals; nouns that tempt do not."""
    import attention_knockout as benchmark

    found = benchmark.changes(cm.load_demo("causal-lm"), kind, 10)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    assert means["deciding"] < -least
    if kind != "fact":
        assert means["tempting"] > means["deciding"] + least


@pytest.mark.once
def test_hooks_of_your_own_stay_on() -> None:
    model, given = shared(case_of("gpt2"))
    name = view_of(model).blocks()[1].attentions[0].mixed

    def ablate(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 0] = 0
        return z

    options: dict[str, Any] = {"target": 9, "layer": 1, "heads": [[0], [1]]}
    with model.hooks(fwd_hooks=[(name, ablate)]):
        found = cm.attention_knockout(model, given.tokens, **options)
    assert float(found.changes[:, :, 0].abs().max()) < 1e-12
    assert float(found.changes[:, :, 1].abs().max()) > 1e-6


@pytest.mark.once
def test_groups_of_tokens() -> None:
    model = cm.load_demo("causal-lm")
    text = "the keys to the old keys"
    found = cm.attention_knockout(
        model,
        text,
        sources={"both": " keys", "a": [0, (2, 4)], "end": -1, "words": " to the"},
        target=" are",
    )
    assert found.source.strings[0] == ("both", "a", "end", "words")
    listed = cm.attention_knockout(
        model, text, sources=[" keys", [0, (2, 4)], -1, " to the"], target=" are"
    )
    assert listed.source.strings[0] == (
        " keys … keys",
        "<|endoftext|> … keys to",
        " keys",
        " to the",
    )
    assert torch.equal(found.changes, listed.changes)
    members = find_groups("sources", cm.value_zeroing(model, text).source, {"x": [" keys", 0]})
    assert members.members[0, 0].nonzero()[:, 0].tolist() == [0, 2, 6]
    with pytest.raises(cm.InvalidInput, match=r"not stretches .* got 'x', at \[0, 2, 6\]"):
        members.spans(0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a text that is not there": ({"sources": " key"}, r"sources names .* got ' key' in row 0"),
    "a position too far": ({"sources": 9}, "sources names tokens that are not there: got 9"),
    "a stretch of nothing": ({"sources": [(2, 2)]}, "this span covers no token"),
    "no group": ({"sources": []}, "sources names no group"),
    "no group with a name": ({"sources": {}}, "sources names no group"),
    "neither text nor number": ({"sources": 1.5}, "sources names tokens that are not there"),
    "no such reader": ({"to": 40}, "to names tokens that are not there: got 40"),
    "no such layer": ({"layer": 4}, "there is no such layer"),
    "no such head": ({"heads": [9]}, "head"),
    "no window": ({"window": 0}, "window"),
    "no such stack": ({"stack": "encoder"}, "has no such stack"),
}


@pytest.mark.once
@pytest.mark.parametrize("why", WRONG)
def test_what_cannot_be_cut(why: str) -> None:
    options, words = WRONG[why]
    with pytest.raises(cm.InvalidInput, match=words):
        cm.attention_knockout(cm.load_demo("causal-lm"), "the keys to the cabinet", **options)


@pytest.mark.once
def test_what_it_shows() -> None:
    model = cm.load_demo("causal-lm")
    options: dict[str, Any] = {
        "target": " are",
        "sources": {"subject": " keys", "rest": [0, (3, 6)]},
    }
    found = cm.attention_knockout(model, "the keys to the cabinet", window=3, heads=True, **options)
    assert isinstance(found, AttentionKnockout)
    curves: Any = found.panels()
    assert [panel.title[-6:] for panel in curves] == ["head 0", "head 1", "head 2", "head 3"]
    assert curves[0].labels[:2] == ("layers 0-1", "layers 0-2")
    assert curves[0].unit == "change of probability, %"
    value = 100 * (found.probs[0, 2, 1, 0] - found.prob[0]) / found.prob[0]
    assert curves[1].series[0][1][2] == pytest.approx(float(value))
    once = cm.attention_knockout(
        model, "the keys to the cabinet", window=None, foil=" is", **options
    )
    panels: Any = once.panels()
    (panel,) = panels
    assert (panel.rows, panel.columns) == (("layers 0-3",), ("subject", "rest"))
    assert "lowers the log-odds of ' are' rather than ' is' most" in repr(once)
    frame = found.to_dataframe()
    assert [*frame.columns][-3:] == ["change", "log_prob", "prob"]
    assert len(frame) == 4 * 4 * 2
    part = found.select(layer=2, head=1, source="subject")
    assert part.windows == ((1, 2, 3),)
    assert float(part.changes) == float(found.changes[0, 2, 1, 0])
    options["sources"] = {"subject": " key", "rest": [0, (3, 6)]}
    both = cm.attention_knockout(model, "the key to the cabinet", window=3, heads=True, **options)
    difference = found - both
    torch.testing.assert_close(difference.changes, found.changes - both.changes)
    first: Any = difference.panels()[0]
    assert first.unit == "change of log-probability, nats"
