"""Padding in ids that come without a mask is found, and what a host does with padding is measured.

What padding changes where there is a mask is in test_inputs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asked
import pytest
import torch
import zoo
from asked import bound, case_of, keywords, relative, shared, stacks, view_of
from test_conformance import METHODS, Method, answers
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.adapters.inputs import padding as measured

TEXTS = ["the cat sat on the mat", "a dog"]
P = 0  # padding of the tokenizers below
W = 7  # a word


@contextmanager
def told(*parts: str) -> Iterator[None]:
    """One warning with these parts where there are some, else none."""
    with asked.told() as texts:
        yield
    assert len(texts) == bool(parts), texts
    for part in parts:
        assert part in texts[0]


def found(model: Any, rows: list[list[int]], **options: Any) -> list[list[int]]:
    """The mask that ids get."""
    given = Given(torch.tensor(rows), **options)
    return make_batch(view_of(model), given).main.mask.int().tolist()


# Rows, and their mask, where padding is BOS and EOS too (GPT-2) and where it is neither (BERT).
SHARED: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "BOS": ([[P, W, W]], [[1, 1, 1]]),
    "BOS and EOS": ([[P, W, P]], [[1, 1, 1]]),
    "BOS and EOS of all": ([[P, W, P], [P, 8, P]], [[1, 1, 1]] * 2),
    "a batch": ([[P, W, W, W], [P, W, P, P]], [[1, 1, 1, 1], [1, 1, 0, 0]]),
    "no BOS": ([[W, W, W], [W, P, P]], [[1, 1, 1], [1, 0, 0]]),
    "EOS in each, then padding": ([[P, W, W, P], [P, W, P, P]], [[1, 1, 1, 1], [1, 1, 1, 0]]),
    "a row of a batch": ([[P, W, P, P]], [[1, 1, 0, 0]]),
    "rows of a batch": ([[P, W, P, P], [P, 8, P, P]], [[1, 1, 0, 0]] * 2),
    "inside": ([[W, P, P, W]], [[1, 1, 1, 1]]),
    "nothing else": ([[P, P, P]], [[1, 1, 1]]),
    "a text of BOS alone": ([[P, W, W], [P, P, P]], [[1, 1, 1], [1, 0, 0]]),
    "on the left": ([[P, W, W, W], [P, P, P, W]], [[1, 1, 1, 1], [0, 0, 1, 1]]),
    "on the left, no BOS": ([[W, W, W], [P, P, W]], [[1, 1, 1], [0, 0, 1]]),
    "two BOS": ([[P, P, W]], [[1, 1, 1]]),
}
OWN: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "one row": ([[W, W, P]], [[1, 1, 0]]),
    "a batch": ([[W, W, W], [W, P, P]], [[1, 1, 1], [1, 0, 0]]),
    "all alike": ([[W, W, P], [W, 8, P]], [[1, 1, 0]] * 2),
    "inside": ([[W, P, W]], [[1, 1, 1]]),
}


@pytest.mark.parametrize(("rows", "mask"), SHARED.values(), ids=SHARED)
def test_padding_that_texts_may_begin_and_end_in(
    rows: list[list[int]], mask: list[list[int]]
) -> None:
    model = zoo.shared(case_of("gpt2"))
    padded = sum(row.count(0) for row in mask)
    parts = ("input is taken as padded", f"{padded} times 0 ('<|endoftext|>')", "attention_mask")
    with told(*(parts if padded else ())):
        assert found(model, rows) == mask
    # What is asked for is done, without a word.
    with told():
        ones = torch.ones(len(rows), len(rows[0]))
        assert found(model, rows, attention_mask=ones) == ones.int().tolist()


@pytest.mark.parametrize(("rows", "mask"), OWN.values(), ids=OWN)
def test_padding_that_is_nothing_else(rows: list[list[int]], mask: list[list[int]]) -> None:
    model = zoo.shared(case_of("bert"))
    padded = any(0 in row for row in mask)
    with told(*(["'[PAD]'"] if padded else [])):
        assert found(model, rows) == mask


def test_a_single_row_is_padded_on_the_left_where_that_is_the_padding_side() -> None:
    model = zoo.build(case_of("gpt2"))
    rows, mask = [[P, P, P, W]], [[0, 0, 1, 1]]
    with told():
        assert found(model, rows) == [[1, 1, 1, 1]]
    with told("row 0"):
        assert found(model, rows, padding_side="left") == mask
    model.tokenizer.padding_side = "left"
    with told("row 0"):
        assert found(model, rows) == mask
    # A text of nothing but its BOS ends where the others do.
    with told("row 1"):
        assert found(model, [[P, W, W], [P, P, P]]) == [[1, 1, 1], [0, 0, 1]]


def test_without_a_tokenizer_every_id_is_text() -> None:
    model = zoo.build(case_of("gpt2"), tokenizer=False)
    with told():
        assert found(model, SHARED["a batch"][0]) == [[1] * 4] * 2


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_own_ids_give_what_their_texts_give(case: zoo.Case) -> None:
    # Some Hugging Face code makes NaN of padding in float64.
    model = zoo.build(case, dtype=torch.float32)
    texts = cm.attention(model, TEXTS)
    batch = make_batch(view_of(model), Given(TEXTS))
    decoder = keywords(zoo.Inputs(batch.main.ids, batch.decoder and batch.decoder.ids))
    pad = view_of(model).padding()
    ids = batch.main.ids.masked_fill(~batch.main.mask, pad.token)
    with told("input is taken as padded", "ends of row 1"):
        tokens = cm.attention(model, ids, **decoder)
    assert torch.equal(tokens.scores, texts.scores)
    assert torch.equal(tokens.source.mask, texts.source.mask)


def test_a_prediction_is_read_from_the_text() -> None:
    model = zoo.shared(case_of("gpt2"))
    texts = cm.log_prob_contributions(model, TEXTS)
    with told("input is taken as padded"):
        tokens = cm.log_prob_contributions(model, model.to_tokens(TEXTS))
    assert torch.equal(tokens.pos, texts.pos)
    assert torch.equal(tokens.scores, texts.scores)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_padding_of_the_decoder_side(family: str) -> None:
    case = case_of(family)
    model, given = zoo.shared(case), zoo.inputs(case)
    pad = view_of(model).padding()
    start = zoo.rows.FAMILIES[family].decoder_start
    rows = torch.tensor([[start, 9, 8, 7], [start, 9, pad.token, pad.token]])
    with told("decoder_input is taken as padded", "ends of row 1", "give texts"):
        both = cm.log_prob_contributions(model, given.tokens, decoder_input=rows)
    assert both.pos.tolist() == [3, 1]
    with told():
        alone = cm.log_prob_contributions(model, given.tokens[1:], decoder_input=rows[1:, :2])
        # What starts a decoder is no padding, whatever its id.
        cm.attention(model, given.tokens, decoder_input=rows[:, :1])
    assert relative(both.log_prob[1:], alone.log_prob) <= bound(case)
    before = torch.tensor([[pad.token, pad.token, start, 9], [start, 9, 8, 7]])
    with pytest.raises(cm.InvalidInput, match=r"padded before its text: .*row 0.*on the right"):
        cm.attention(model, given.tokens, decoder_input=before)


# What hosts do with padding


def behind(given: zoo.Inputs, pad: int) -> tuple[Tensor, Tensor]:
    """Tokens of which the last two of the first row are padding."""
    mask = torch.ones_like(given.tokens)
    mask[0, -2:] = 0
    return given.tokens.masked_fill(mask == 0, pad), mask


BOTH = [pytest.param(method, id=method.name) for method in METHODS if answers(method, "both_ways")]


@pytest.mark.parametrize("method", BOTH)
def test_every_method_masks_where_the_host_does_not(method: Method) -> None:
    model, given = shared(case_of("both_ways"))
    answered = []
    for pad in (0, 17):
        tokens, mask = behind(given, pad)
        answered.append(method.values(method.ask(model, tokens, attention_mask=mask)))
    torch.testing.assert_close(*answered, rtol=0, atol=0, equal_nan=True)
    alone = method.values(method.ask(model, given.tokens[:1, :-2]))
    # Padding adds entries, all of them zero (or NaN where there is no component).
    kept = answered[0][0]
    kept = kept[kept.isfinite() & (kept != 0)]
    expected = alone[alone.isfinite() & (alone != 0)]
    if method.name not in ("decompose", "ff_memories"):  # rows of padding are what they are
        torch.testing.assert_close(kept, expected, rtol=1e-9, atol=1e-12)


def test_a_host_that_drops_masks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(case_of("both_ways"))
    monkeypatch.setattr("tl_contextmix.adapters.handles.Handle.ignores_masks", False)
    tokens, mask = behind(zoo.inputs(case_of("both_ways")), 0)
    # Rows run without padding there, and where they have to run as they are they are refused.
    found = cm.attention(model, tokens, attention_mask=mask)
    alone = cm.attention(model, tokens[:1, :-2])
    assert relative(found.scores[:1, ..., :-2, :-2], alone.scores) <= bound(case_of("both_ways"))
    name = view_of(model).blocks()[0].resid_in
    match = r"padding after the text gives wrong numbers .*relative error of .*one length together"
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: tensor)]):
        for _ in range(2):
            with pytest.raises(cm.InvalidInput, match=match):
                cm.attention(model, tokens, attention_mask=mask)
    cm.attention(model, zoo.inputs(case_of("both_ways")).tokens)


def test_padding_is_tried_once_a_side_and_without_hooks_of_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = case_of("gpt2")
    model, given = zoo.build(case, dtype=torch.float32), zoo.inputs(case)
    mask = torch.ones_like(given.tokens)
    seen: list[Any] = []
    tried: list[str] = []
    run = measured._try
    monkeypatch.setattr(measured, "_try", lambda *given: tried.append(given[1]) or run(*given))
    name = view_of(model).blocks()[0].resid_in
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: seen.append(tensor.shape) or tensor)]):
        for edge in (-1, -1, 0, 0):
            part = mask.clone()
            part[0, edge] = 0
            cm.attention(model, given.tokens, attention_mask=part)
    assert tried == ["right", "left"]
    assert {tuple(shape[:2]) for shape in seen} == {tuple(given.tokens.shape)}


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_no_padding_is_tried_where_there_is_none(case: zoo.Case) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    for stack in stacks(case):
        cm.attention(model, given.tokens, stack=stack, **keywords(given))
    assert view_of(model).facts == {}
