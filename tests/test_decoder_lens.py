"""DecoderLens against models whose later encoder blocks are really removed."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import oracle_decoding as oracle
import pytest
import torch
import zoo
from asked import case_of, state, view_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tl_contextmix as cm
from tl_contextmix.results import LayerwiseDecoding

CASES = [case for case in zoo.cases() if case.encoder_decoder]
EACH = pytest.mark.parametrize("case", CASES, ids=str)
LENGTH = 8


@functools.cache
def reference(family: str) -> Any:
    """The Hugging Face model of a family, never changed."""
    return zoo.hf_model(family)


@functools.cache
def untouched(case: zoo.Case) -> Any:
    """Another one, which ends its answers early."""
    model = zoo.build(case)
    end_early(model, case)
    return model


@functools.cache
def end_token(family: str) -> int:
    """A token that the whole model says in the middle of its answer: random ones say no end."""
    tokens = zoo.inputs(case_of(family)).tokens
    said = oracle.said(reference(family), tokens, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    return int(said[0, 3])


def end_early(model: Any, case: zoo.Case) -> None:
    """Makes a model end its answers with that token."""
    end = end_token(case.family)
    if hasattr(model, "original_model"):
        model.original_model.generation_config.eos_token_id = end
    else:
        model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(end)


def options(case: zoo.Case, beams: int = 1) -> dict[str, Any]:
    return {
        "max_new_tokens": LENGTH,
        "num_beams": beams,
        "eos_token_id": end_token(case.family),
    }


def until_end(ids: Tensor, end: int) -> list[list[int]]:
    """Rows of token ids up to the end token."""
    rows = ids.tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def outputs(found: LayerwiseDecoding, place: int) -> list[list[int]]:
    """What was said from one layer."""
    return [
        ids[place][mask[place]].tolist() for ids, mask in zip(found.ids, found.mask, strict=True)
    ]


# Identities


@EACH
@pytest.mark.parametrize("beams", [1, 3])
def test_every_layer_says_what_the_model_without_later_blocks_says(
    case: zoo.Case, beams: int
) -> None:
    model, tokens, whole = untouched(case), zoo.inputs(case, batch=3).tokens, reference(case.family)
    found = cm.decoder_lens(model, tokens, max_new_tokens=LENGTH, num_beams=beams)
    end = end_token(case.family)
    assert found.layers == tuple(range(oracle.depth(whole) + 1))
    for layer in found.layers:
        short = oracle.truncated(whole, layer)
        expected = until_end(oracle.said(short, tokens, **options(case, beams)), end)
        said = outputs(found, layer)
        assert said == expected
        for row, answer in enumerate(said):
            start = [zoo.inputs(case).decoder_tokens[0, 0].item()]
            inputs = torch.tensor([[*start, *answer[:-1]]])
            logits = oracle.logits(short, tokens[row : row + 1], inputs)[0].log_softmax(-1)
            right = logits[torch.arange(len(answer)), answer]
            torch.testing.assert_close(
                found.log_probs[row, layer, : len(answer)], right, rtol=1e-5, atol=1e-5
            )
            assert bool(found.finished[row, layer]) == (answer[-1] == end)
            assert not bool(found.log_probs[row, layer, len(answer) :].any())
    if case.family in ("t5", "bart"):
        assert bool(found.truncated.any())
        assert bool(found.finished.any()), "rows leave the batch before others"


@EACH
def test_the_last_layer_is_the_hosts_own_generate(case: zoo.Case) -> None:
    model, tokens = untouched(case), zoo.inputs(case, batch=3).tokens
    found = cm.decoder_lens(model, tokens, layer=-1, max_new_tokens=LENGTH)
    end = end_token(case.family)
    if case.host == "HookedEncoderDecoder":
        own = model.generate(
            tokens,
            one_zero_attention_mask=torch.ones_like(tokens).double(),
            max_new_tokens=LENGTH,
            do_sample=False,
            verbose=False,
        )[:, 1:]
    else:
        own = oracle.said(model.original_model, tokens, max_new_tokens=LENGTH)
    assert outputs(found, 0) == until_end(own, end)


@EACH
@pytest.mark.parametrize("norm", [True, False])
def test_judged_answers_are_those_of_the_model_without_later_blocks(
    case: zoo.Case, norm: bool
) -> None:
    model, given, whole = untouched(case), zoo.inputs(case), reference(case.family)
    texts = ["the cat sat on the mat", "a dog ran"]
    found = cm.decoder_lens(model, given.tokens, texts, mode="teacher_forced", final_norm=norm)
    labels, mask = found.target.ids, found.target.mask
    assert mask.sum(1).tolist()[0] > mask.sum(1).tolist()[1]
    start = given.decoder_tokens[:, :1]
    inputs = torch.cat([start, labels[:, :-1]], dim=1)
    shorts = [oracle.truncated(whole, layer, norm=norm) for layer in found.layers]
    every = [oracle.logits(short, given.tokens, inputs).log_softmax(-1) for short in shorts]
    for place, log_probs in enumerate(every):
        gold = log_probs.gather(-1, labels[..., None])
        kl = (every[-1].exp() * (every[-1] - log_probs)).sum(-1)
        rank = (log_probs > gold).sum(-1)
        for name, right in (("log_probs", gold[..., 0]), ("kl", kl), ("ranks", rank)):
            torch.testing.assert_close(
                getattr(found, name)[:, place][mask], right[mask], rtol=1e-5, atol=1e-5
            )
        assert torch.equal(found.predictions[:, place][mask], log_probs.argmax(-1)[mask])
    assert not bool(found.log_probs[~mask[:, None].expand(found.log_probs.shape)].any())


@EACH
def test_without_references_the_model_judges_its_own_output(case: zoo.Case) -> None:
    model, tokens = untouched(case), zoo.inputs(case).tokens
    said = cm.decoder_lens(model, tokens, layer=-1, max_new_tokens=LENGTH)
    found = cm.decoder_lens(model, tokens, mode="teacher_forced", max_new_tokens=LENGTH)
    for row, answer in enumerate(outputs(said, 0)):
        assert found.target.ids[row][found.target.mask[row]].tolist() == answer
    assert not bool(found.ranks[:, -1].any()), "greedy decoding takes the most probable token"
    assert float(found.kl[:, -1].abs().max()) <= 1e-12
    torch.testing.assert_close(found.log_probs[:, -1], said.log_probs[:, 0])


@EACH
def test_scores_are_the_logits_of_the_model_without_later_blocks(case: zoo.Case) -> None:
    model, given, whole = zoo.shared(case), zoo.inputs(case), reference(case.family)
    found = cm.decoder_lens(
        model,
        given.tokens,
        mode="scores",
        target=["cat", "dog"],
        decoder_input=given.decoder_tokens,
    )
    assert given.decoder_tokens is not None
    for layer in found.layers:
        expected = oracle.logits(
            oracle.truncated(whole, layer), given.tokens, given.decoder_tokens
        )[:, -1]
        torch.testing.assert_close(
            found.logits[:, layer], expected[:, list(found.tokens)], rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            found.log_probs[:, layer],
            expected.log_softmax(-1)[:, list(found.tokens)],
            rtol=1e-6,
            atol=1e-6,
        )
    assert [string.strip() for string in found.strings] == ["cat", "dog"]
    assert torch.equal(found.difference(), found.logits[..., 0] - found.logits[..., 1])
    assert torch.equal(found.difference(1, 0), -found.difference())
    ids = cm.decoder_lens(model, given.tokens, mode="scores", target=[7, 9])
    assert ids.tokens == (7, 9)


# One batch


@EACH
def test_together_is_one_at_a_time(case: zoo.Case) -> None:
    model, tokens = untouched(case), zoo.inputs(case, batch=3).tokens
    whole = cm.decoder_lens(model, tokens, max_new_tokens=LENGTH)
    pieces = cm.decoder_lens(model, tokens, max_new_tokens=LENGTH, max_bytes=1)
    assert [outputs(whole, p) for p in whole.layers] == [outputs(pieces, p) for p in whole.layers]
    for layer in (0, whole.layers[-1]):
        for row in range(2):
            one = cm.decoder_lens(model, tokens[row : row + 1], layer=layer, max_new_tokens=LENGTH)
            assert outputs(one, 0)[0] == outputs(whole, layer)[row]
            used = one.ids.shape[-1]
            torch.testing.assert_close(
                one.log_probs[0, 0], whole.log_probs[row, layer, :used], rtol=1e-6, atol=1e-6
            )
    forced = [
        cm.decoder_lens(
            model, tokens, ["the cat", "a dog ran", "the"], mode="teacher_forced", max_bytes=size
        )
        for size in (1, 2**30)
    ]
    for name in ("log_probs", "kl", "ranks"):
        torch.testing.assert_close(*(getattr(one, name) for one in forced), rtol=1e-6, atol=1e-6)
    some = cm.decoder_lens(model, tokens, layer=[1, 0], max_new_tokens=LENGTH)
    # In the order of the layers, whatever the order asked in.
    assert (outputs(some, 0), outputs(some, 1)) == (outputs(whole, 0), outputs(whole, 1))


@EACH
def test_padding_changes_nothing(case: zoo.Case) -> None:
    model = untouched(case)
    texts = ["the cat sat on the mat", "a dog", "paris is the city"]
    whole = cm.decoder_lens(model, texts, max_new_tokens=LENGTH)
    for row, text in enumerate(texts):
        one = cm.decoder_lens(model, text, max_new_tokens=LENGTH)
        assert [outputs(one, p)[0] for p in one.layers] == [
            outputs(whole, p)[row] for p in whole.layers
        ]
    ids = zoo.inputs(case).tokens
    masked = torch.cat([ids, ids[:, :2]], dim=1)
    mask = torch.ones_like(masked)
    mask[:, -2:] = 0
    padded = cm.decoder_lens(model, masked, attention_mask=mask, max_new_tokens=LENGTH)
    plain = cm.decoder_lens(model, ids, max_new_tokens=LENGTH)
    assert torch.equal(padded.ids, plain.ids)
    torch.testing.assert_close(padded.log_probs, plain.log_probs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.host == "TransformerBridge"], ids=str)
def test_operations_stay_below_one_encoder_pass_and_a_decoding_per_layer(case: zoo.Case) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    model, tokens = untouched(case), zoo.inputs(case).tokens
    whole = copy.deepcopy(reference(case.family))
    whole.set_attn_implementation("eager")  # fused kernels are not counted
    settings = options(case)
    cm.decoder_lens(model, tokens, max_new_tokens=LENGTH)  # the model is checked once
    with FlopCounterMode(display=False) as ours:
        found = cm.decoder_lens(model, tokens, max_new_tokens=LENGTH)
    with FlopCounterMode(display=False) as encoder, torch.no_grad():
        whole.get_encoder()(tokens)
    decoders = 0
    for layer in found.layers:
        memory = oracle.truncated(whole, layer).get_encoder()(tokens)[0].detach()
        for row in range(len(tokens)):
            states = BaseModelOutput(last_hidden_state=memory[row : row + 1])
            with FlopCounterMode(display=False) as decoder:
                oracle.said(whole, encoder_outputs=states, **settings)
            decoders += decoder.get_total_flops()
    assert 0 < ours.get_total_flops() <= encoder.get_total_flops() + decoders


@EACH
def test_the_model_is_left_as_it_was_and_hooks_take_part(case: zoo.Case) -> None:
    model, tokens = zoo.build(case), zoo.inputs(case).tokens
    plain = cm.decoder_lens(model, tokens, max_new_tokens=3)
    before = state(model)
    again = cm.decoder_lens(model, tokens, max_new_tokens=3)
    assert state(model) == before
    assert again.equals(plain)

    def interrupt(tensor: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    def zero(tensor: Tensor, hook: Any) -> Tensor:
        return tensor * 0

    view = view_of(model)
    first = view.stacks["encoder"][0].attentions[0].value
    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[(first, interrupt)]):
        cm.decoder_lens(model, tokens, max_new_tokens=3)
    assert state(model) == before
    with model.hooks(fwd_hooks=[(first, zero)]):
        edited = cm.decoder_lens(model, tokens, mode="scores", target=[7])
    kept = cm.decoder_lens(model, tokens, mode="scores", target=[7])
    # The embeddings come before the hook.
    torch.testing.assert_close(edited.logits[:, 0], kept.logits[:, 0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(edited.logits[:, 1], kept.logits[:, 1])
    last = view.stacks["decoder"][-1].attentions[0].value
    with model.hooks(fwd_hooks=[(last, zero)]):
        if case.host == "HookedEncoderDecoder":
            with pytest.raises(cm.UnsupportedModel, match="hooks on the decoder"):
                cm.decoder_lens(model, tokens)
        else:
            edited = cm.decoder_lens(model, tokens, mode="scores", target=[7])
            assert not torch.allclose(edited.logits, kept.logits)
    assert state(model) == before


TALKATIVE = [c for c in CASES if c.host == "TransformerBridge" and c.family != "m2m100"]


@pytest.mark.parametrize("case", TALKATIVE, ids=str)
def test_the_models_generation_settings_are_followed(case: zoo.Case) -> None:
    model, tokens = zoo.build(case), zoo.inputs(case).tokens
    plain = cm.decoder_lens(model, tokens, max_new_tokens=LENGTH)
    word = int(plain.ids[plain.content][0])
    settings = model.original_model.generation_config
    settings.suppress_tokens = [word]
    settings.max_length = 3  # max_new_tokens comes before it
    free = cm.decoder_lens(model, tokens, max_new_tokens=LENGTH)
    assert not bool(((free.ids == word) & free.mask).any())
    settings.forced_eos_token_id = settings.eos_token_id
    for beams in (1, 2):
        found = cm.decoder_lens(model, tokens, max_new_tokens=LENGTH, num_beams=beams)
        expected = oracle.said(
            reference(case.family),
            tokens,
            max_new_tokens=LENGTH,
            num_beams=beams,
            suppress_tokens=[word],
            forced_eos_token_id=settings.eos_token_id,
        )
        assert outputs(found, -1) == until_end(expected, settings.eos_token_id)
        if beams == 1:
            # An end that was forced is none.
            assert torch.equal(found.truncated, free.truncated)


@EACH
def test_saved_loaded_tabulated_and_shown(case: zoo.Case, tmp_path: Path) -> None:
    model, texts = zoo.shared(case), ["the cat sat", "a <b>dog</b>"]
    results = [
        cm.decoder_lens(model, texts, texts, max_new_tokens=LENGTH),
        cm.decoder_lens(model, texts, texts, mode="teacher_forced"),
        cm.decoder_lens(model, texts, mode="scores", target=["cat", "dog"]),
        cm.decoder_lens(model, texts, texts, metric="exact match", max_new_tokens=LENGTH),
    ]
    for found in results:
        again = type(found).load(found.save(tmp_path / "result.safetensors"))
        assert again.equals(found)
        assert again.provenance.method == "decoder_lens"
        assert len(found.to_dataframe())
        page = found.show()._repr_html_()
        assert "<b>dog" not in page
        own = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
        assert not re.search(r"(src|href)=[\"']?https?:", own)
    said, forced, scores, _ = results
    frame = said.to_dataframe()
    assert frame.log_prob.sum() == pytest.approx(float(said.log_probs.sum()))
    assert forced.to_dataframe().kl.sum() == pytest.approx(float(forced.kl.sum()))
    assert scores.to_dataframe().logit.sum() == pytest.approx(float(scores.logits.sum()))
