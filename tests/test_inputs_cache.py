"""A ready cache gives the numbers of a fresh pass, or is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from asked import case_of, keywords, shared, stacks, view_of
from test_inputs import padded, points

import tl_contextmix as cm

CASES = [pytest.param(case, id=case.id) for case in zoo.spread()]


def cached(model: Any, given: zoo.Inputs, **options: Any) -> Any:
    return model.run_with_cache(given.tokens, **keywords(given), **options)[1]


def require_same(model: Any, case: zoo.Case, given: zoo.Inputs, cache: Any) -> None:
    """Every stack and point, to the last bit: the same activations go into the same maths."""
    for stack in stacks(case):
        options = {"at": points(case), "stack": stack, **keywords(given)}
        fresh = cm.attention_norms(model, given.tokens, **options)
        found = cm.attention_norms(model, given.tokens, cache=cache, **options)
        for point in fresh:
            torch.testing.assert_close(
                found[point].scores, fresh[point].scores, rtol=1e-12, atol=1e-12
            )
            assert found[point].source.strings == fresh[point].source.strings


@pytest.mark.parametrize("case", CASES)
def test_a_ready_cache_gives_the_same_maps(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    require_same(model, case, given, cached(model, given))


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_a_cache_without_batch_axis_too(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case, batch=1)
    require_same(model, case, given, cached(model, given, remove_batch_dim=True))


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_a_cache_of_the_needed_activations_alone_under_either_name(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    view = view_of(model)
    cache = cached(model, given)
    needed = {name for _, block in view.every_block() for name in block.points()}
    # As a dict, and on a bridge under the other names too, as a names_filter may leave it.
    for pick in (lambda names: names[0], lambda names: names[-1]):
        part = {}
        for name in needed:
            names = [name, *(n for n in view.cached.other_names(name) if n in set(cache.keys()))]
            part[pick(names)] = cache[pick(names)]
        require_same(model, case, given, part)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_a_padded_cache_gives_the_same_maps(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    tokens, mask = padded(given, "right", 0)
    hooked = case.host in ("HookedEncoder", "HookedEncoderDecoder")
    name = "one_zero_attention_mask" if hooked else "attention_mask"
    kind = torch.float64 if case.host == "HookedEncoderDecoder" else torch.long
    cache = cached(model, zoo.Inputs(tokens, given.decoder_tokens), **{name: mask.to(kind)})
    for stack in stacks(case):
        options = {"at": points(case)[-1], "stack": stack, "attention_mask": mask}
        options |= keywords(given)
        if case.family == "both_ways":
            with pytest.raises(cm.InvalidInput, match="cache was made without this mask"):
                cm.attention_norms(model, tokens, cache=cache, **options)
            continue
        fresh = cm.attention_norms(model, tokens, **options)
        found = cm.attention_norms(model, tokens, cache=cache, **options)
        # The fresh pass leaves the padding out, so that sums in float32 inside of the host differ.
        limit = 1e-6 if (case.family, case.host) in zoo.FLOAT32_INSIDE else 1e-12
        torch.testing.assert_close(found.scores, fresh.scores, rtol=limit, atol=limit)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_a_cache_made_without_the_mask_is_refused_where_padding_was_read(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    tokens, mask = padded(given, "right", 17)
    cache = cached(model, zoo.Inputs(tokens, given.decoder_tokens))
    for stack in stacks(case):
        options = {"stack": stack, "attention_mask": mask, **keywords(given)}
        if stack is None and not case.both_ways:  # nothing reads what is behind it
            found = cm.attention(model, tokens, cache=cache, **options)
            torch.testing.assert_close(found.scores, cm.attention(model, tokens, **options).scores)
        else:
            with pytest.raises(
                cm.InvalidInput, match=r"without this mask: got 0\.\d+ of a token's"
            ):
                cm.attention(model, tokens, cache=cache, **options)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_a_missing_activation_is_named(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    whole = cached(model, given)
    view = view_of(model)
    for name in view.blocks()[1].points():
        without = {name, *view.cached.other_names(name)}
        part = {key: value for key, value in whole.items() if key not in without}
        match = f"the cache lacks activations that are read: got .* without {name};"
        with pytest.raises(cm.InvalidInput, match=match):
            cm.attention_norms(model, given.tokens, cache=part, **keywords(given))
        # Nothing is asked of layers that are not asked about.
        cm.attention_norms(
            model, given.tokens, cache=part, layer=0, at="attn_out", **keywords(given)
        )


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_a_cache_of_another_input_is_refused(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    cache = cached(model, given)
    shorter = zoo.Inputs(given.tokens[:, :-1], given.decoder_tokens)
    other = given.tokens.clone()
    other[1, 2] = other[1, 2] % (zoo.rows.D_VOCAB - 6) + 6  # another word, same length
    for wrong in (shorter, zoo.Inputs(other, given.decoder_tokens), zoo.inputs(case, batch=3)):
        with pytest.raises(cm.InvalidInput, match=r"cache is of another input: got .*same tokens"):
            cm.attention_norms(model, wrong.tokens, at="attn_out", cache=cache, **keywords(wrong))
    if given.decoder_tokens is not None:
        decoder = given.decoder_tokens.clone()
        decoder[0, 3] = decoder[0, 3] % (zoo.rows.D_VOCAB - 6) + 6
        with pytest.raises(cm.InvalidInput, match="row 0 at position 3"):
            cm.attention_norms(model, given.tokens, cache=cache, decoder_input=decoder)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_a_cache_of_other_weights_or_of_an_edited_pass_is_refused(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    block = view_of(model).blocks()[0]
    # Weights of W_O and the feed-forward are not in what maps are made of, and yet they matter.
    with model.hooks(fwd_hooks=[(block.attentions[0].mixed, lambda mixed, hook: mixed.roll(1, 1))]):
        edited = cached(model, given)
    match = r"this would not match the pass: .* fails in .*as the cache holds it"
    with pytest.raises(cm.UnsupportedModel, match=match):
        cm.attention_norms(model, given.tokens, at="attn_out", cache=edited, **keywords(given))
    stale = cached(zoo.build(case, seed=1), given)
    with pytest.raises((cm.UnsupportedModel, cm.InvalidInput)):
        cm.attention_norms(model, given.tokens, at="attn_out", cache=stale, **keywords(given))


def test_an_edited_pass_that_can_be_followed_is_taken() -> None:
    model, given = shared(case_of("gpt2"))
    hooks = [("blocks.0.attn.hook_v", lambda value, hook: value * 0.5)]
    with model.hooks(fwd_hooks=hooks):
        cache = cached(model, given)
        fresh = cm.attention_norms(model, given.tokens)
    found = cm.attention_norms(model, given.tokens, cache=cache)
    assert torch.allclose(found.scores, fresh.scores, rtol=1e-12)


def test_half_precision_caches_are_upcast() -> None:
    case = case_of("gpt2")
    model, given = zoo.build(case, dtype=torch.bfloat16), zoo.inputs(case)
    found = cm.attention_norms(model, given.tokens, cache=cached(model, given))
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.scores, cm.attention_norms(model, given.tokens).scores)
