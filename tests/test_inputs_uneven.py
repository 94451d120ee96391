"""Texts of unequal length: the numbers of one padded run, at the cost of each text alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import zoo
from asked import case_of, stacks, view_of
from test_conformance import METHODS, QUESTIONS, Method
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters import passes
from tl_contextmix.adapters.inputs import Given
from tl_contextmix.adapters.inputs.crops import Crop, crops
from tl_contextmix.adapters.inputs.tokens import read_batch
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.counters import count_operations
from tl_contextmix.errors import ContextMixWarning
from tl_contextmix.results import Decomposition, LogProbContributions
from tl_contextmix.results.base import axes_of

pytestmark = pytest.mark.mostly_once

LENGTHS = [3, 10, 2, 13, 3]
DECODED = [2, 1, 9, 3, 1]


def rows(lengths: list[int], side: str = "right") -> tuple[Tensor, Tensor]:
    """Random ids and their mask."""
    width = max(lengths)
    ids = torch.randint(11, 60, (len(lengths), width), generator=torch.manual_seed(3))
    places = torch.arange(width)
    places = places if side == "right" else places.flip(0)
    mask = places < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def as_one(monkeypatch: pytest.MonkeyPatch, ask: Any) -> Any:
    """What a method says where all rows run together."""
    with monkeypatch.context() as patch:
        patch.setattr(passes, "crops", lambda view, batch: ())
        return ask()


def numbers(result: Any) -> dict[str, Tensor]:
    """The tensors of a result, 0 where source or target is padding."""
    found = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    found = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if isinstance(result, Decomposition):  # rows of padding are not the model's
        for name, value in found.items():
            place = axes_of(type(result), name).index("target")
            shape = [len(value), *[1] * (value.ndim - 1)]
            shape[place] = -1
            real = result.target.mask.view(shape)
            found[name] = value * real
    return found


def require_equal(found: Any, expected: Any) -> None:
    ours, theirs = numbers(found), numbers(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-12, equal_nan=True)
    for name in ("target", "source", "tokens", "encoder"):
        tokens = getattr(found, name, None)
        assert tokens is None or tokens.equals(getattr(expected, name))
    if hasattr(found, "provenance"):
        assert found.provenance == expected.provenance


EVERY = [pytest.param(method, id=method.name) for method in METHODS + QUESTIONS]


@pytest.mark.parametrize(("family", "side"), [("gpt2", "left"), ("bert", "right")])
@pytest.mark.parametrize("method", EVERY)
def test_numbers_are_those_of_one_padded_run(
    method: Method, family: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.shared(case_of(family))
    ids, mask = rows(LENGTHS, side)
    assert len(crops(view_of(model), read_batch(view_of(model), Given(ids, mask)))) == 3

    def ask() -> Any:
        return method.ask(model, ids, attention_mask=mask)

    require_equal(ask(), as_one(monkeypatch, ask))


SOME = ("attention_norms", "decompx", "knockout", "log_prob_contributions", "gradient_x_input")


@pytest.mark.parametrize("method", [method for method in EVERY if method.id in SOME])
def test_numbers_of_both_sides_of_an_encoder_decoder(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("bart")
    model, (ids, mask) = zoo.shared(case), rows(LENGTHS)
    texts, real = rows(DECODED)
    decoded = texts.masked_fill(real == 0, view_of(model).pad_id())
    for stack in stacks(case) if method.stacked else [None]:

        def ask(stack: Any = stack) -> Any:
            asked = {} if stack is None else {"stack": stack}
            with pytest.warns(ContextMixWarning, match="decoder_input is taken as padded"):
                return method.ask(model, ids, attention_mask=mask, decoder_input=decoded, **asked)

        require_equal(ask(), as_one(monkeypatch, ask))


def test_positions_are_those_of_the_whole_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.shared(case_of("gpt2"))
    for side in ("right", "left"):
        ids, mask = rows([3, 11, 2, 30, 4], side)
        given = {"attention_mask": mask}
        for ask in (
            lambda given=given, ids=ids: cm.value_zeroing(model, ids, pos=[-1, -2], **given),
            lambda given=given, ids=ids: cm.token_memory(
                model, ids, pos=[0, 28], neurons=[1, 2], **given
            ),
            lambda given=given, ids=ids: cm.gradient_x_input(
                model, ids, target=[5, 6, 7, 8, 9], **given
            ),
            lambda given=given, ids=ids: cm.value_zeroing(
                model, ids, spans=[(0, 2), (2, 29)], span_rows="mean", **given
            ),
        ):
            require_equal(ask(), as_one(monkeypatch, ask))


def test_what_is_knocked_out_of_some_rows_and_the_mean_over_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zoo.shared(case_of("gpt2"))
    for side in ("right", "left"):
        ids, mask = rows(LENGTHS, side)

        def ask(ids: Tensor = ids, mask: Tensor = mask) -> Any:
            best = cm.log_prob_contributions(model, ids, by="attn_neuron", k=2, attention_mask=mask)
            assert isinstance(best, LogProbContributions)
            options: dict[str, Any] = {"replace_with": "mean", "controls": 2}
            return cm.knockout(model, ids, neurons=best, attention_mask=mask, **options)

        require_equal(ask(), as_one(monkeypatch, ask))


COSTLY = ("attention", "value_zeroing", "token_memory", "integrated_gradients", *SOME)
COSTS = [method for method in EVERY if method.id in COSTLY]


@pytest.mark.parametrize("method", COSTS)
def test_a_long_text_among_short_ones_costs_what_they_cost_alone(method: Method) -> None:
    model = zoo.shared(case_of("gpt2"))
    ids, mask = rows([30, *[2] * 30])
    short, long = ids[1:2, :2], ids[:1]
    method.ask(model, short)
    together = count_operations(lambda: method.ask(model, ids, attention_mask=mask))
    alone = count_operations(lambda: method.ask(model, long))
    alone += 30 * count_operations(lambda: method.ask(model, short))
    # Of a model as small as this one, what attention brings to W_O counts, padding included.
    limit = 2 if method.name == "log_prob_contributions" else 1.5
    assert together <= limit * alone, together / alone


def test_groups_hold_every_row_once_and_little_padding() -> None:
    view = view_of(zoo.shared(case_of("gpt2")))
    lengths = torch.randint(1, 200, (300,), generator=torch.manual_seed(0)).tolist()
    mask = torch.arange(200) < torch.tensor(lengths)[:, None]
    mask[lengths.index(max(lengths))] = True
    batch = Batch(Side(torch.zeros(mask.shape, dtype=torch.long), mask))
    found = crops(view, batch)
    assert sorted(row for crop in found for row in crop.rows) == [*range(300)]
    for crop in found:
        part = crop.of(batch).main.mask
        assert torch.equal(part.sum(1), mask[[*crop.rows]].sum(1))
        assert part.shape[1] <= max(8, 1.2 * int(part.sum(1).min()))
    assert len(found) < 25
    # Where padding is wrong, none is left.
    view.facts["padding on the right"] = "wrong"
    exact = crops(view, batch)
    del view.facts["padding on the right"]
    assert all(bool(crop.of(batch).main.mask.all()) for crop in exact)
    assert sorted(row for crop in exact for row in crop.rows) == [*range(300)]


def test_a_batch_that_is_padded_further_than_its_texts_is_cut() -> None:
    view = view_of(zoo.shared(case_of("gpt2")))
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[:, :9] = True
    batch = Batch(Side(torch.zeros(mask.shape, dtype=torch.long), mask))
    assert crops(view, batch) == (Crop((0, 1), slice(0, 9), None),)
    assert crops(view, Batch(Side(batch.main.ids[:, :9], mask[:, :9]))) == ()


def test_few_long_rows_run_at_a_time() -> None:
    view = view_of(zoo.shared(case_of("gpt2")))
    mask = torch.ones(64, 1000, dtype=torch.bool)
    mask[0, -1] = False
    batch = Batch(Side(torch.zeros(mask.shape, dtype=torch.long), mask))
    layers = len(view.blocks())
    groups = [len(crop.rows) for crop in crops(view, batch)]
    assert sum(groups) == 64
    assert 1 < max(groups) <= 2**24 // (layers * 1000**2)


@pytest.mark.every
def test_hooks_of_the_users_see_the_batch_that_was_given() -> None:
    model = zoo.shared(case_of("gpt2"))
    ids, mask = rows(LENGTHS)
    seen: list[Any] = []
    name = view_of(model).blocks()[0].resid_in
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: seen.append(tensor.shape[:2]))]):
        cm.attention(model, ids, attention_mask=mask)
    assert set(seen) == {ids.shape}
