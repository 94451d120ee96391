"""Padding changes nothing, a ready cache stands for a pass, text stands for its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from asked import bound, keywords, points, relative, view_of
from torch import Tensor

import tl_contextmix as cm

CASES = zoo.cases()
# Hosts that do not shift positions past the padding: measured, errors of 0.5 to 3.
NO_LEFT_PADDING = {
    "bert-HookedEncoder",
    *(f"{family}-TransformerBridge" for family in ("bart", "marian", "mbart", "pegasus")),
}


def furthest(model: Any) -> str:
    """The furthest point that a model can be asked about."""
    return points(view_of(model).blocks()[0])[-1]


def padded(tokens: Tensor, side: str, count: int = 2) -> tuple[Tensor, Tensor]:
    """The tokens with padding, and their mask. The padding ids are words, not the pad token."""
    pad = tokens[:, :count].flip(1)
    one, zero = torch.ones_like(tokens), torch.zeros_like(pad)
    parts = [(tokens, one), (pad, zero)]
    parts = parts if side == "right" else parts[::-1]
    ids, mask = zip(*parts, strict=True)
    return torch.cat(ids, 1), torch.cat(mask, 1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_padding_changes_no_real_position(case: zoo.Case, side: str) -> None:
    # Hosts with a float32 softmax turn float64's lowest number into -inf and padding into NaN.
    inside = "attention" in zoo.FLOAT32_INSIDE.get((case.family, case.host), ())
    dtype, limit = (torch.float32, 1e-5) if inside else (torch.float64, bound(case))
    model, given = zoo.build(case, dtype=dtype), zoo.inputs(case)
    tokens, mask = padded(given.tokens, side)
    stack = "encoder" if case.encoder_decoder else None
    kwargs = {"at": furthest(model), "stack": stack, **keywords(given)}
    expected = cm.attention_norms(model, given.tokens, **kwargs).scores
    if side == "left" and case.id in NO_LEFT_PADDING:
        with pytest.raises(cm.InvalidInput, match=r"[Pp]ad on the right"):
            cm.attention_norms(model, tokens, attention_mask=mask, **kwargs)
        return
    found = cm.attention_norms(model, tokens, attention_mask=mask, **kwargs).scores
    real = slice(0, -2) if side == "right" else slice(2, None)
    assert relative(found[..., real, real], expected) <= limit
    found[..., real, real] = 0
    assert not bool(found.any()), "scores of padding are exactly zero"


@pytest.mark.parametrize("case", [c for c in CASES if c.encoder_decoder], ids=str)
def test_encoder_padding_changes_nothing_the_decoder_reads(case: zoo.Case) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    tokens, mask = padded(given.tokens, "right")
    for stack in ("decoder", "cross"):
        kwargs = {"stack": stack, **keywords(given)}
        expected = cm.attention_norms(model, given.tokens, **kwargs).scores
        found = cm.attention_norms(model, tokens, attention_mask=mask, **kwargs).scores
        assert relative(found[..., :-2], expected) <= bound(case)
        assert not bool(found[..., -2:].any())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_ready_cache_stands_for_a_pass(case: zoo.Case) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    at = furthest(model)
    kwargs = keywords(given)
    _, cache = model.run_with_cache(given.tokens, **kwargs)
    fresh = cm.attention_norms(model, given.tokens, at=at, **kwargs).scores
    found = cm.attention_norms(model, given.tokens, at=at, cache=cache, **kwargs).scores
    assert relative(found, fresh) <= 1e-12
    block = view_of(model).blocks()[0]
    for name in (block.attentions[0].value, block.attentions[0].pattern, block.resid_in):
        # A bridge keeps the same tensor under its own name and under TransformerLens' older one.
        gone = cache[name].data_ptr()
        partial = {key: cache[key] for key in list(cache.keys()) if cache[key].data_ptr() != gone}
        with pytest.raises(cm.InvalidInput, match=rf"the cache lacks {name}"):
            cm.attention_norms(model, given.tokens, at=at, cache=partial, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cache_of_another_input_is_refused(case: zoo.Case) -> None:
    model, given = zoo.build(case), zoo.inputs(case)
    _, cache = model.run_with_cache(given.tokens, **keywords(given))
    stack = "encoder" if case.encoder_decoder else None
    shorter = given.tokens[:, :-1]
    with pytest.raises(cm.InvalidInput, match=r"another input.*prepend_bos"):
        cm.attention_norms(
            model, shorter, at="attn_out", stack=stack, cache=cache, **keywords(given)
        )


def test_a_cache_without_batch_dimension_works() -> None:
    case = next(c for c in CASES if c.family == "gpt2")
    model, given = zoo.build(case), zoo.inputs(case, batch=1)
    _, cache = model.run_with_cache(given.tokens, remove_batch_dim=True)
    fresh = cm.attention_norms(model, given.tokens).scores
    found = cm.attention_norms(model, given.tokens, cache=cache).scores
    assert relative(found, fresh) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_is_read_in_float32(case: zoo.Case, dtype: torch.dtype) -> None:
    exact, given = zoo.build(case, dtype=torch.float32), zoo.inputs(case)
    model = zoo.build(case, dtype=dtype)
    kwargs = {"at": furthest(exact), **keywords(given)}
    parts = cm.decompose(model, given.tokens, **kwargs)
    assert parts.parts.dtype == torch.float32
    found, expected = parts.norms().scores, cm.attention_norms(exact, given.tokens, **kwargs).scores
    # Largest measured over the zoo: 7e-2, 8e-3 and 0; the models themselves differ by that much.
    limit = {torch.bfloat16: 0.15, torch.float16: 2e-2, torch.float32: 1e-5}[dtype]
    assert relative(found, expected) <= limit


TEXTS = ["the cat sat on the mat", "a dog ran"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_texts_stand_for_their_tokens(case: zoo.Case) -> None:
    model = zoo.build(case)
    if model.tokenizer is None:
        with pytest.raises(cm.InvalidInput, match=r"without a tokenizer.*tensor of token ids"):
            cm.attention_norms(model, TEXTS[0], at="attn_out")
        return
    at = furthest(model)
    stack = "encoder" if case.encoder_decoder else None
    together = cm.attention_norms(model, TEXTS, at=at, stack=stack)
    for row, text in enumerate(TEXTS):
        single = cm.attention_norms(model, text, at=at, stack=stack)
        length = single.target.ids.shape[1]
        assert torch.equal(together.target.ids[row, :length], single.target.ids[0])
        assert together.target.mask[row].tolist() == [
            index < length for index in range(together.target.ids.shape[1])
        ]
        part = together.scores[row : row + 1, ..., :length, :length]
        assert relative(part, single.scores) <= bound(case)
        ids = single.target.ids
        assert torch.equal(cm.attention_norms(model, ids, at=at, stack=stack).scores, single.scores)


def test_prepend_bos_is_the_hosts() -> None:
    case = next(c for c in CASES if c.family == "gpt2")
    model = zoo.build(case)
    for choice in (True, False, None):
        options = {} if choice is None else {"prepend_bos": choice}
        expected = model.to_tokens(TEXTS[0], **options)
        found = cm.attention_norms(model, TEXTS[0], prepend_bos=choice).target.ids
        assert torch.equal(found, expected.cpu())
    left = cm.attention_norms(model, TEXTS, padding_side="left")
    assert left.target.mask[1].tolist()[0] is False
    right = cm.attention_norms(model, TEXTS)
    length = int(right.target.mask[1].sum())
    assert (
        relative(left.scores[1:, ..., -length:, -length:], right.scores[1:, ..., :length, :length])
        <= 1e-10
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.encoder_decoder], ids=str)
def test_decoder_input_as_text_tokens_or_nothing(case: zoo.Case) -> None:
    model = zoo.build(case)
    alone = cm.attention_norms(model, TEXTS[0])
    assert alone.target.ids.shape == (1, 1)
    told = cm.attention_norms(model, TEXTS[0], decoder_input=TEXTS[1])
    start, end = int(alone.target.ids[0, 0]), model.tokenizer.eos_token_id
    ids = [i for i in model.tokenizer(TEXTS[1])["input_ids"] if i != end]
    assert told.target.ids.tolist() == [[start, *ids]]
    again = cm.attention_norms(model, TEXTS[0], decoder_input=told.target.ids)
    assert torch.equal(again.scores, told.scores)
