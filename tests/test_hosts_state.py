"""The model is left as it was; hooks of the user's own are followed or refused, never ignored."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from asked import case_of, in_threads, keywords, relative, stacks, state, view_of
from torch import Tensor, nn

import tl_contextmix as cm
from tl_contextmix.adapters import views
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.adapters.running import hooked_places, without_hooks
from tl_contextmix.core.counters import Operations

CASES = [pytest.param(case, id=case.id) for case in zoo.spread()]
# A family of each class, attention computed by TransformerLens (gpt2, llama) and by Hugging Face.
SOME = [
    pytest.param(case, id=case.id)
    for case in zoo.cases()
    if case.family in ("gpt2", "llama", "bert", "opt", "t5", "bart")
]


def maps(model: Any, case: zoo.Case, given: zoo.Inputs) -> Tensor:
    """Scores of every stack in one row."""
    found = [
        cm.attention_norms(model, given.tokens, stack=stack, **keywords(given)).scores
        for stack in stacks(case)
    ]
    return torch.cat([scores.flatten() for scores in found])


# Left as it was


def record(tensor: Tensor, hook: Any) -> None:
    """A hook of the user's own that changes nothing."""


def add_hooks(model: Any) -> None:
    """Puts a temporary and a permanent hook on the first block's values, as a user would."""
    name = next(name for name in model.hook_dict if name.endswith((".hook_v", ".v.hook_out")))
    point = model.hook_dict[name]
    point.add_hook(record)
    point.add_hook(record, is_permanent=True)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_after_success_error_and_interrupt(case: zoo.Case) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    add_hooks(model)
    at = "resid_mid" if case.family in zoo.OPAQUE_FEED_FORWARD else "block_out"
    options = {"at": at, **keywords(given)}
    # The first run of a bridge leaves recording hooks of its own behind.
    cm.attention_norms(model, given.tokens, **options)
    before = state(model)
    cm.attention_norms(model, given.tokens, **options)
    cm.check(model)
    assert state(model) == before
    last = view_of(model).blocks()[-1].attentions[0].value

    for error in (ValueError("from a hook"), KeyboardInterrupt()):

        def fail(tensor: Tensor, hook: Any, error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)), model.hooks(fwd_hooks=[(last, fail)]):
            cm.attention_norms(model, given.tokens, **options)
        assert state(model) == before


@pytest.mark.parametrize("case", SOME)
def test_an_interrupted_first_look_leaves_nothing_and_counts_for_nothing(
    case: zoo.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    zoo.logits(model, given)
    add_hooks(model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tl_contextmix.adapters.building.settle_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cm.check(model)
    # Warm by now: what is there must stay, and another interrupt must add nothing.
    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr("tl_contextmix.adapters.building.settle_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cm.check(model)
    assert state(model) == before
    assert cm.check(model).ok


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_neither_model_nor_views_outlive_the_users_reference(case: zoo.Case) -> None:
    model = zoo.build(case)
    view = view_of(model)
    kept = weakref.ref(model)
    assert kept in set(views._KNOWN.keyrefs())
    del model
    gc.collect()
    assert kept() is None
    assert all(reference() is not None for reference in views._KNOWN.keyrefs())
    with pytest.raises(ReferenceError, match="has been deleted"):
        view.hooked()


# Hooks of the user's own


def halve(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * 0.5


@pytest.mark.parametrize("case", SOME)
def test_edited_values_are_followed(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    name = view_of(model).blocks()[0].attentions[0].value
    found = cm.attention_norms(model, given.tokens, at="attn_out", layer=0, **keywords(given))
    with model.hooks(fwd_hooks=[(name, halve)]):
        edited = cm.attention_norms(model, given.tokens, at="attn_out", layer=0, **keywords(given))
    assert relative(edited.scores, found.scores / 2) <= 1e-12
    again = cm.attention_norms(model, given.tokens, at="attn_out", layer=0, **keywords(given))
    assert torch.equal(again.scores, found.scores)


@pytest.mark.parametrize("case", SOME)
def test_a_map_is_of_the_edited_model_where_the_stream_was_edited(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    block = view_of(model).blocks()[-1]
    with model.hooks(fwd_hooks=[(block.resid_in, halve)]):
        found = cm.decompose(model, given.tokens, at="block_out", layer=-1, **keywords(given))
        kept = []
        keep = [(block.resid_out, lambda tensor, hook: kept.append(tensor.detach()))]
        decoder = keywords(given)
        with torch.no_grad():
            model.run_with_hooks(given.tokens, fwd_hooks=keep, **decoder)
    total = (found.parts.sum(dim=3) + found.bias)[:, 0]
    assert relative(total, kept[0]) <= 1e-6


def swap_heads(tensor: Tensor, hook: Any) -> Tensor:
    return tensor.flip(2)


EDITS: dict[str, Callable[[Any], str]] = {
    "mixed": lambda block: block.attentions[0].mixed,
    "neurons": lambda block: block.feed_forward.post,
    "neuron inputs": lambda block: block.feed_forward.pre,
    "block output": lambda block: block.resid_out,
}


@pytest.mark.parametrize("known", [False, True], ids=["first look", "known model"])
@pytest.mark.parametrize("place", EDITS)
@pytest.mark.parametrize("case", SOME)
def test_edits_that_a_method_cannot_follow_are_refused(
    case: zoo.Case, place: str, known: bool
) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    # Names come from another model: the one that is asked about may have been edited before.
    name = EDITS[place](view_of(zoo.shared(case)).blocks()[0])
    if known:
        view_of(model)
    edit = swap_heads if place == "mixed" else halve
    with model.hooks(fwd_hooks=[(name, edit)]):
        with pytest.raises(cm.UnsupportedModel, match="hooks of your own") as raised:
            cm.value_zeroing(model, given.tokens, **keywords(given))
        text = str(raised.value)
        # What is added to a stream is followed, if it stays the same where a value is zeroed.
        replaced = place == "block output" and "Take off hooks that replace" in text
        assert replaced or ("fails in" in text and "Remove other hooks" in text)
        # The weights are read for what they are, whatever hooks do.
        assert cm.check(model).ok
    maps(model, case, given)


def test_edits_of_a_submodule_are_seen_too() -> None:
    case = case_of("gpt2")
    model, given = zoo.build(case), zoo.inputs(case)
    view_of(model)
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(cm.UnsupportedModel, match=r"hooks of your own at blocks.0.mlp"):
        cm.attention_norms(model, given.tokens, at="block_out")
    handle.remove()
    cm.attention_norms(model, given.tokens)


def test_a_hook_made_for_other_lengths_does_not_disturb_the_first_look() -> None:
    case = case_of("gpt2")
    model, given = zoo.build(case), zoo.inputs(case)

    def patch_last(value: Tensor, hook: Any) -> Tensor:
        value[:, 5] = 0  # the probe has four positions
        return value

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_v", patch_last)]):
        found = cm.attention_norms(model, given.tokens, at="attn_out", layer=0)
    assert float(found.scores[..., 5].abs().max()) == 0


def test_hooks_are_taken_off_and_put_back_in_their_order() -> None:
    module = nn.Sequential(nn.Identity(), nn.Identity())
    calls: list[str] = []
    for name in "ab":
        module[0].register_forward_hook(lambda *args, name=name: calls.append(name))
    module[1].register_forward_pre_hook(lambda *args: calls.append("c"))
    assert hooked_places(module) == ("0", "1")

    def look() -> None:
        with without_hooks(module):
            module(torch.zeros(1))
            assert hooked_places(module) == ()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        look()
    assert calls == []
    module(torch.zeros(1))
    assert calls == ["a", "b", "c"]


@pytest.mark.parametrize("case", CASES)
def test_hooks_of_the_hosts_own_are_not_the_users(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    model.run_with_cache(given.tokens, **keywords(given))
    assert hooked_places(model) == ()


@pytest.mark.parametrize("case", SOME)
def test_an_edit_is_applied_once_whatever_the_hosts_mode(case: zoo.Case) -> None:
    if not zoo.processable(case):
        pytest.skip("no compatibility mode")
    model, given = zoo.build(case, processed=True), zoo.inputs(case)
    view = view_of(model)
    attention = view.blocks()[0].attentions[0]
    batch = make_batch(view, Given(given.tokens, **keywords(given)))
    calls = []

    def add_one(value: Tensor) -> Tensor:
        calls.append(1)
        return value + 1

    plain = view.run(batch, [attention.value, attention.mixed, attention.pattern])
    edited = view.run(batch, [attention.value, attention.mixed], edits={attention.value: add_one})
    assert len(calls) == 1
    assert relative(edited[attention.value], plain[attention.value] + 1) <= 1e-12
    # Rows of a pattern add up to one.
    assert relative(edited[attention.mixed], plain[attention.mixed] + 1) <= 1e-6


# Modes of the hosts


@pytest.mark.parametrize("case", SOME)
def test_modes_that_gate_hooks_change_no_number(case: zoo.Case) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    expected = maps(model, case, given)
    if case.host == "TransformerBridge":
        with zoo.zoo_build.quiet():
            model.enable_compatibility_mode(no_processing=True)
        assert relative(maps(model, case, given), expected) <= 1e-12
    for mode in ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"):
        if not hasattr(model, f"set_{mode}"):
            continue
        try:
            getattr(model, f"set_{mode}")(True)
        except (NotImplementedError, AssertionError):
            continue  # attention that Hugging Face computes; grouped queries
        assert relative(maps(model, case, given), expected) <= 1e-12, mode
        getattr(model, f"set_{mode}")(False)


# Threads


@pytest.mark.parametrize("case", SOME)
def test_threads_do_not_fill_each_others_traces(case: zoo.Case) -> None:
    model = zoo.build(case)
    given = [zoo.inputs(case, batch=batch) for batch in (1, 2, 3)]
    expected = [maps(zoo.shared(case), case, one) for one in given]
    found = in_threads(lambda one: [maps(model, case, one) for _ in range(3)], given)
    for several, one in zip(found, expected, strict=True):
        assert all(torch.equal(scores, one) for scores in several)


METHODS: dict[str, Callable[..., Any]] = {
    "maps": lambda model, **given: cm.attention_norms(model, **given).scores,
    "zeroed": lambda model, **given: cm.value_zeroing(model, **given).scores,
    "gradients": lambda model, **given: cm.gradient_x_input(model, pos=-1, **given).scores,
    "knockout": lambda model, **given: (
        cm.knockout(model, heads=[(0, 1)], pos=-1, controls=0, **given).after
    ),
}
TWO = [pytest.param(case, id=case.id) for case in zoo.cases() if case.family in ("gpt2", "bart")]


@pytest.mark.parametrize("case", TWO)
def test_threads_with_different_methods_do_not_disturb_each_other(case: zoo.Case) -> None:
    """Nor does one that runs the model itself, whose hooks and numbers are its own."""
    model, given = zoo.build(case), zoo.inputs(case)
    asked = {"input": given.tokens, **keywords(given)}
    expected = {name: ask(model, **asked) for name, ask in METHODS.items()}
    others = zoo.inputs(case, batch=1)
    logits, before = zoo.logits(model, others), state(model)

    def work(name: str) -> None:
        for _ in range(3):
            if name == "the model":
                found, known = zoo.logits(model, others), logits
            else:
                found, known = METHODS[name](model, **asked), expected[name]
            # A new thread may share its sums among several of OpenMP's: 5e-15 was seen.
            assert torch.allclose(found, known, rtol=1e-12, atol=1e-12, equal_nan=True), name

    in_threads(work, [*METHODS, "the model"])
    assert state(model) == before


@pytest.mark.parametrize("first", [True, False], ids=["first look", "known model"])
@pytest.mark.parametrize("case", TWO)
def test_calls_from_a_hook_of_the_users_own_are_calls_like_others(
    case: zoo.Case, first: bool
) -> None:
    """From inside every method's pass, at one sentence and so at other shapes."""
    model, given, inner = zoo.build(case), zoo.inputs(case), zoo.inputs(case, batch=1)
    asked = {"input": given.tokens, **keywords(given)}
    one = {"input": inner.tokens, **keywords(inner)}
    other = zoo.shared(case)
    plain = {name: ask(other, **asked) for name, ask in METHODS.items()}
    nested = {name: ask(other, **one) for name, ask in METHODS.items()}
    value = view_of(other).blocks()[-1].attentions[0].value
    inside: list[str] = []

    def call(tensor: Tensor, hook: Any) -> None:
        if inside:
            return
        inside.append("once")
        for name, ask in METHODS.items():
            assert relative(ask(model, **one), nested[name]) <= 1e-12, name
            inside.append(name)

    with model.hooks(fwd_hooks=[(value, call)]):
        if first:
            # The first look at the model is taken from inside a pass of the user's own.
            assert torch.equal(zoo.logits(model, given), zoo.logits(other, given))
            assert len(inside) == 1 + len(METHODS)
        else:
            view_of(model)
        before = state(model)
        for name, ask in METHODS.items():
            inside.clear()
            assert relative(ask(model, **asked), plain[name]) <= 1e-12, name
            assert len(inside) == 1 + len(METHODS)
        assert state(model)["hooks"] == before["hooks"]


@pytest.mark.parametrize("case", CASES)
def test_a_pass_ends_with_the_last_activation_and_leaves_nothing(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    view, own = views.as_view(model), zoo.logits(model, given)
    batch = make_batch(view, Given(given.tokens, **keywords(given)))
    before = state(model)
    for stack, blocks in view.stacks.items():
        name = blocks[0].resid_out
        with Operations() as whole:
            expected = view.run(batch, [name])
        with Operations() as ended:
            found = view.run(batch, [name], logits=False)
        assert found.logits is None
        assert torch.equal(found[name], expected[name])
        assert ended.total < whole.total * (0.8 if stack == "decoder" else 0.5)
    assert state(model) == before
    assert torch.equal(zoo.logits(model, given), own)
