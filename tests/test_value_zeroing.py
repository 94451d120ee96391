"""Value Zeroing equals what its name says: the host run with values set to zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from asked import (
    FLOAT32_INSIDE,
    bound,
    case_of,
    host_trace,
    keywords,
    relative,
    shared,
    stacks,
    view_of,
)
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.model_view import StackName
from tl_contextmix.methods.value_zeroing import SpanRows
from tl_contextmix.results import ContextMap

CASES = [case for case in zoo.spread() if case.family not in zoo.OPAQUE_FEED_FORWARD]


def limit(case: zoo.Case) -> float:
    """Relative to the largest score."""
    return FLOAT32_INSIDE if bound(case) == FLOAT32_INSIDE else 1e-11


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """One less the cosine: half the squared distance of unit vectors."""
    unit = torch.nn.functional.normalize
    return (unit(a, dim=-1) - unit(b, dim=-1)).square().sum(-1) / 2


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Length of the difference."""
    return (a - b).norm(dim=-1)


def zeroing(places: Sequence[int], heads: Sequence[int] | None) -> Callable[[Tensor], Tensor]:
    """Sets values [batch pos head d_head] to zero."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        for head in range(value.shape[2]) if heads is None else heads:
            value[:, list(places), head] = 0
        return value

    return edit


def norm_behind(model: Any, stack: StackName | None) -> Callable[[Tensor], Tensor] | None:
    """The host's own module behind a stack's last block, by its name."""
    modules = dict(model.named_children())
    if "mlm_head" in modules:  # what is called ln_final is in the head
        return modules.get("encoder_ln_final")
    side = "encoder_" if stack == "encoder" else "decoder_" if stack else ""
    names = (f"{side}ln_final", f"{side}final_ln")
    return next((modules[name] for name in names if name in modules), None)


def literal(
    model: Any,
    given: zoo.Inputs,
    stack: StackName | None = None,
    *,
    zeroed: Sequence[Sequence[int]] | None = None,
    kv_heads: Sequence[int] | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] = cosine,
) -> tuple[Tensor, Tensor]:
    """Distances [batch layer target source], from one run of the host per layer and source.

    Those before the final norm, and those in which the last layer's are behind it. ``zeroed``:
    positions zeroed together, one column each; None for each alone. ``kv_heads``: heads of
    hook_v that are zeroed; None for all.
    """
    view = view_of(model)
    trace, blocks = host_trace(view, given, stack)
    batch = make_batch(view, Given(given.tokens, decoder_input=given.decoder_tokens))
    last = view.stacks[view.base_stack(stack)][-1]
    norm = norm_behind(model, stack)
    raw, normed = [], []
    for block in blocks:
        kind = "cross" if stack == "cross" else "self"
        attention = next(a for a in block.attentions if a.kind == kind)
        length = trace[attention.value].shape[1]
        outputs = []
        for places in zeroed or [[place] for place in range(length)]:
            edits = {attention.value: zeroing(places, kv_heads)}
            outputs.append(view.run(batch, [block.resid_out], edits=edits)[block.resid_out])
        whole = trace[block.resid_out]
        raw.append(torch.stack([distance(output, whole) for output in outputs], dim=-1))
        if norm is not None and block is last:
            with torch.no_grad():
                outputs, whole = [norm(output) for output in outputs], norm(whole)
        normed.append(torch.stack([distance(output, whole) for output in outputs], dim=-1))
    return torch.stack(raw, dim=1), torch.stack(normed, dim=1)


def query_heads(model: Any, given: zoo.Inputs, stack: StackName | None) -> tuple[int, int]:
    """How many query heads there are, and how many share a value."""
    trace, blocks = host_trace(view_of(model), given, stack)
    attention = blocks[0].attentions[-1 if stack == "cross" else 0]
    heads = trace[attention.pattern].shape[1]
    return heads, heads // trace[attention.value].shape[2]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_zeroing_hook_v(case: zoo.Case) -> None:
    """Also where W_in is folded into the terms, which pays when pairs are gone through often."""
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        everything = list(range(query_heads(model, given, stack)[0]))
        for final_norm, expected in enumerate(literal(model, given, stack)):
            kwargs = {"stack": stack, "final_norm": bool(final_norm), **keywords(given)}
            found = cm.value_zeroing(model, given.tokens, **kwargs)
            assert relative(found.scores[:, :, 0], expected) <= limit(case), stack
            if case in zoo.kinds():
                often = cm.value_zeroing(model, given.tokens, heads=[everything] * 40, **kwargs)
                assert relative(often.scores[:, :, 39], expected) <= limit(case), stack


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_heads_equal_zeroing_these_heads(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    stack = stacks(case)[-1]
    heads, share = query_heads(model, given, stack)
    kwargs = {"stack": stack, "final_norm": False, **keywords(given)}
    kv = heads // share
    groups = [[0], [kv - 1], sorted({0, kv - 1})]
    asked = [[h * share + i for h in group for i in range(share)] for group in groups]
    found = cm.value_zeroing(model, given.tokens, heads=asked, **kwargs)
    assert found.heads == tuple("+".join(map(str, group)) for group in asked)
    for index, group in enumerate(groups):
        expected, _ = literal(model, given, stack, kv_heads=group)
        assert relative(found.scores[:, :, index], expected) <= limit(case), group


def test_ways_to_ask_for_heads() -> None:
    model, given = shared(case_of("gpt2"))
    each = cm.value_zeroing(model, given.tokens, heads=True)
    count = each.scores.shape[2]
    assert each.heads == tuple(map(str, range(count)))
    for asked, label, one in ((1, "1", 1), (-1, str(count - 1), -1), ([0], "0", 0)):
        alone = cm.value_zeroing(model, given.tokens, heads=asked)
        assert alone.heads == (label,)
        assert relative(alone.scores[:, :, 0], each.scores[:, :, one]) <= 1e-11
    together = cm.value_zeroing(model, given.tokens, heads=list(range(count)))
    every = cm.value_zeroing(model, given.tokens)
    assert together.heads == ("+".join(map(str, range(count))),)
    assert every.heads == ("all",)
    assert relative(together.scores, every.scores) <= 1e-11


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_spans_equal_zeroing_their_positions_together(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        length = given.tokens if stack in (None, "encoder", "cross") else given.decoder_tokens
        spans = [(0, 1), (1, 3), (2, length.shape[1])]
        zeroed = [list(range(*span)) for span in spans]
        expected, _ = literal(model, given, stack, zeroed=zeroed)
        for heads in (False, [list(range(query_heads(model, given, stack)[0]))] * 40):
            found = cm.value_zeroing(
                model,
                given.tokens,
                spans=spans,
                heads=heads,
                stack=stack,
                final_norm=False,
                **keywords(given),
            )
            assert relative(found.scores[:, :, -1], expected) <= limit(case), stack


def test_spans_of_single_tokens_are_the_map_and_labels_are_joined() -> None:
    model, given = shared(case_of("gpt2"))
    plain = cm.value_zeroing(model, given.tokens)
    single = cm.value_zeroing(model, given.tokens, spans=[(i, i + 1) for i in range(6)])
    assert relative(single.scores, plain.scores) <= 1e-11
    assert single.source.equals(plain.source)
    found = cm.value_zeroing(model, given.tokens, spans=[(0, 2), (2, 6)])
    words = plain.source.strings[1]
    assert found.source.strings[1] == (" ".join(words[:2]), " ".join(words[2:]))
    assert found.source.ids[1].tolist() == given.tokens[1, [0, 2]].tolist()
    assert found.target.equals(plain.target)


def test_rows_of_spans_by_hand_without_padding() -> None:
    case = case_of("gpt2", "bert")
    model, tokens = zoo.shared(case), zoo.inputs(case).tokens
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    spans = [(0, 1), (1, 3), (3, 6)]
    kwargs = {"spans": spans, "attention_mask": mask}
    kept = cm.value_zeroing(model, tokens, **kwargs).scores
    ways: dict[SpanRows, Callable[[Tensor], Tensor]] = {
        "mean": lambda x: x.mean(2),
        "max": lambda x: x.amax(2),
    }
    for how, reduce in ways.items():
        found = cm.value_zeroing(model, tokens, span_rows=how, **kwargs)
        for row, length in ((0, 6), (1, 4)):
            expected = [reduce(kept[row, :, :, start : min(stop, length)]) for start, stop in spans]
            torch.testing.assert_close(found.scores[row], torch.stack(expected, dim=2))
        assert found.target.equals(found.source)
        # Padding is no part of a word.
        assert found.source.strings[1][2] == found.source.strings[1][2].strip()
        sums = found.normalize().rollout().scores.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_span_of_padding_is_padding() -> None:
    case = case_of("gpt2", "bert")
    model, tokens = zoo.shared(case), zoo.inputs(case).tokens
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    for how in ("keep", "mean", "max"):
        found = cm.value_zeroing(
            model, tokens, attention_mask=mask, spans=[(0, 4), (4, 6)], span_rows=how
        )
        assert found.source.mask.tolist() == [[True, True], [True, False]]
        assert not bool(found.scores[1, ..., 1].any())
        assert bool(torch.isfinite(found.scores).all())


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_targets_are_rows_of_the_whole_map(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        whole = cm.value_zeroing(model, given.tokens, stack=stack, **keywords(given))
        for targets, rows in (([-1], [-1]), ([3, 1, 3], [3, 1, 3]), (2, [2])):
            part = cm.value_zeroing(
                model, given.tokens, pos=targets, stack=stack, **keywords(given)
            )
            expected = whole.scores[:, :, :, rows]
            assert float((part.scores - expected).abs().max()) <= 1e-12
            assert torch.equal(part.target.ids, whole.target.ids[:, rows])
            assert part.source.equals(whole.source)


def test_metrics_equal_their_formulas() -> None:
    model, given = shared(case_of("gpt2"))
    found = cm.value_zeroing(model, given.tokens, metric="euclidean", final_norm=False)
    assert relative(found.scores[:, :, 0], literal(model, given, distance=euclidean)[0]) <= 1e-11
    assert found.unit == "euclidean distance"
    assert cm.value_zeroing(model, given.tokens).unit == "cosine distance"


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_the_future_is_exactly_zero_in_causal_stacks(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    stack = "decoder" if case.encoder_decoder else None
    found = cm.value_zeroing(model, given.tokens, stack=stack, **keywords(given))
    assert found.causal != case.both_ways
    sums = found.normalize().rollout().scores.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("max_bytes", [1, 30_000, 300_000])
@pytest.mark.parametrize("families", [("gpt2",), ("gemma2",), ("bert",), ("t5", "bart")], ids=str)
def test_a_small_budget_changes_nothing_but_the_order_of_sums(
    families: tuple[str, ...], max_bytes: int
) -> None:
    case = case_of(*families)
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        kwargs = {"stack": stack, **keywords(given)}
        for heads, spans in ((False, None), (True, None), (False, [(0, 2), (1, 4)])):
            whole = cm.value_zeroing(model, given.tokens, heads=heads, spans=spans, **kwargs)
            small = cm.value_zeroing(
                model, given.tokens, heads=heads, spans=spans, max_bytes=max_bytes, **kwargs
            )
            assert relative(small.scores, whole.scores) <= 1e-11


def test_ready_cache_gives_the_same_map_and_missing_keys_are_named() -> None:
    case = case_of("bart", "t5", "gpt2")
    model, given = zoo.shared(case), zoo.inputs(case)
    view = view_of(model)
    for stack in stacks(case):
        trace, blocks = host_trace(view, given, stack)
        cache = dict(trace.values)
        if stack == "decoder":
            key = blocks[0].attentions[1].key
            with pytest.raises(cm.InvalidInput, match=f"the cache lacks .*{key}"):
                cm.value_zeroing(model, given.tokens, stack=stack, cache=cache, **keywords(given))
            batch = make_batch(view, Given(given.tokens, decoder_input=given.decoder_tokens))
            keys = [block.attentions[1].key for block in blocks]
            cache |= dict(view.run(batch, keys).values)
        kwargs = {"stack": stack, **keywords(given)}
        fresh = cm.value_zeroing(model, given.tokens, **kwargs)
        found = cm.value_zeroing(model, given.tokens, cache=cache, **kwargs)
        assert torch.equal(found.scores, fresh.scores)


BAD = {
    "no such head": ({"heads": 99}, r"head axis: got 99; expected an integer from -\d to \d"),
    "no such head in a group": ({"heads": [[0], [1, 99]]}, r"head axis: got 99"),
    "no heads": ({"heads": []}, r"head axis: got '?an empty list"),
    "an empty group": ({"heads": [[0], []]}, r"head axis: got '?an empty list"),
    "truth values as heads": ({"heads": [True, False]}, r"this heads: got \[True, False\]"),
    "a head twice": (
        {"heads": [0, 0]},
        r"a head cannot be in a group twice: got \[0, 0\]; expected",
    ),
    "no such target": (
        {"pos": [6]},
        r"such position: got 6; expected an integer from -6 to 5",
    ),
    "no targets": ({"pos": []}, r"there is no such position: got \[\]"),
    "a truth value as target": ({"pos": [True]}, r"such position: got True"),
    "no such layer": ({"layer": 9}, r"there is no such layer: got 9; expected"),
    "empty span": ({"spans": [(2, 2)]}, r"covers no token: got \(2, 2\); expected two integers"),
    "span beyond the end": ({"spans": [(0, 7)]}, r"covers no token: got \(0, 7\); expected"),
    "span from the end": ({"spans": [(-2, 0)]}, r"covers no token: got \(-2, 0\); expected"),
    "a truth value in a span": ({"spans": [(False, 2)]}, r"this spans: got \[\(False, 2\)\]"),
    "no spans": ({"spans": []}, r"no spans were given: got \[\]; expected"),
    "rows without spans": ({"span_rows": "mean"}, r"rows cannot be merged: got span_rows='mean'"),
    "rows and targets": (
        {"span_rows": "max", "spans": [(0, 2)], "pos": [1]},
        r"rows cannot be merged",
    ),
    "no cross-attention": ({"stack": "cross"}, r"has no such stack: got 'cross'; expected"),
    "no budget": ({"max_bytes": 0}, r"max_bytes: got 0; expected an integer from 1"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    case = case_of("gpt2")
    with pytest.raises(cm.InvalidInput, match=message) as raised:
        cm.value_zeroing(zoo.shared(case), zoo.inputs(case).tokens, **options)
    assert str(raised.value).endswith(".")


# The annotations refuse these already where they are checked, as they are in tests.
@pytest.mark.parametrize(
    "options",
    [{"metric": "l1"}, {"span_rows": "sum"}, {"spans": [(1,)]}, {"heads": "0"}, {"heads": 0.5}],
    ids=str,
)
def test_what_the_annotations_exclude_is_refused(options: dict[str, Any]) -> None:
    case = case_of("gpt2")
    ask: Any = cm.value_zeroing
    with pytest.raises(cm.InvalidInput, match=r"got "):
        ask(zoo.shared(case), zoo.inputs(case).tokens, **options)


def test_an_activation_that_is_not_elementwise_is_refused() -> None:
    cases = [case for case in zoo.cases() if case.family in zoo.OPAQUE_FEED_FORWARD]
    for case in cases:
        with pytest.raises(cm.UnsupportedModel, match=r"SoLU|solu"):
            cm.value_zeroing(zoo.shared(case), zoo.inputs(case).tokens)


def test_provenance_says_what_was_asked(tmp_path: Path) -> None:
    model, given = shared(case_of("gpt2"))
    found = cm.value_zeroing(model, given.tokens, spans=[(0, 3)], pos=[-1], heads=[0, 1])
    assert found.provenance.method == "value_zeroing"
    assert found.provenance.options == {
        "heads": ["0+1"],
        "pos": [-1],
        "spans": [(0, 3)],
        "span_rows": "keep",
        "metric": "cosine",
        "final_norm": True,
    }
    again = ContextMap.load(found.save(tmp_path / "map.safetensors"))
    assert torch.equal(again.scores, found.scores)
    assert again.provenance == found.provenance


@pytest.mark.once
def test_nothing_left_is_exactly_nothing_before_a_norm_of_the_output() -> None:
    case = case_of("gemma2")
    given, found = zoo.inputs(case), []
    for dtype in (torch.float32, torch.float64):
        model = zoo.build(case, dtype=dtype)
        # The first targets read nothing else; the norm would enlarge what rounding leaves.
        one, spans = (
            cm.value_zeroing(model, given.tokens, spans=spans).scores
            for spans in (None, [(0, 3), (3, 6)])
        )
        found.append(torch.cat([one, spans], dim=-1))
    assert relative(found[0].double(), found[1]) <= 1e-6
