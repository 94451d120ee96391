"""What a model's forward takes of each token besides its id reaches every pass of every method."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from asked import case_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.errors import ContextMixWarning

BERTS = [case for case in zoo.cases() if case.family == "bert"]
EACH_BERT = pytest.mark.parametrize("case", BERTS, ids=str)
MASK = 4
IDS = torch.tensor([[5, 6, MASK, 3, 9, 10, 3], [11, 12, 3, MASK, 5, 3, 1]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0]])
REAL = torch.tensor([[1] * 7, [1] * 6 + [0]])

METHODS: dict[str, Callable[..., Any]] = {
    "attention": cm.attention,
    "attention_norms": functools.partial(cm.attention_norms, at="block_out"),
    "mixing_ratio": cm.mixing_ratio,
    "decompose": functools.partial(cm.decompose, at="mlp_out"),
    "value_zeroing": cm.value_zeroing,
    "globenc": cm.globenc,
    "alti": cm.alti,
    "attention_flow": cm.attention_flow,
    "decompx": cm.decompx,
    "gradient_x_input": functools.partial(cm.gradient_x_input, pos=2),
    "integrated_gradients": functools.partial(cm.integrated_gradients, pos=2, steps=3),
    "log_prob_contributions": functools.partial(cm.log_prob_contributions, pos=2),
    "component_readouts": lambda *given, **options: cm.component_readouts(
        *given, components=cm.log_prob_contributions(*given, pos=2, **options), **options
    ),
    "ff_memories": cm.ff_memories,
    "token_memory": cm.token_memory,
    "knockout": functools.partial(cm.knockout, pos=2, neurons=[(1, 3)], everywhere=True),
}
CACHED = set(METHODS) - {"gradient_x_input", "integrated_gradients", "knockout"}


def table(model: Any) -> Tensor:
    """The embeddings of segments."""
    if hasattr(model, "original_model"):
        return model.original_model.bert.embeddings.token_type_embeddings.original_component.weight
    return model.embed.token_type_embed.W_token_type


@functools.cache
def second_only(case: zoo.Case) -> Any:
    """A model whose first segment is embedded as the second."""
    model = zoo.build(case)
    with torch.no_grad():
        table(model)[0] = table(model)[1]
    return model


@EACH_BERT
def test_attention_is_the_models_own_on_a_pair(case: zoo.Case) -> None:
    hf = zoo.hf_model("bert")
    options: dict[str, Any] = {"token_type_ids": SEGMENTS, "attention_mask": REAL}
    with torch.no_grad():
        out = hf(IDS, output_attentions=True, **options)
    real = REAL[:, None, None, :, None] * REAL[:, None, None, None]
    right = torch.stack(out.attentions, dim=1) * real
    model = zoo.shared(case)
    found = cm.attention(model, IDS, **options)
    torch.testing.assert_close(found.scores, right)
    for given in (
        {"input_ids": IDS.tolist(), "attention_mask": REAL, "token_type_ids": SEGMENTS.numpy()},
        {"input_ids": IDS, "attention_mask": REAL, "token_type_ids": SEGMENTS.int()},
    ):
        assert found.equals(cm.attention(model, given))
    assert found.provenance.options["token_type_ids"] == SEGMENTS.tolist()
    zeros = torch.zeros_like(IDS)
    off = cm.attention(model, IDS, attention_mask=REAL, token_type_ids=zeros)
    assert float((off.scores - right).abs().max()) > 0.01


def numbers(result: Any) -> np.ndarray:
    """What a method found."""
    name = {"Knockout": "after", "ComponentReadouts": "scores"}.get(type(result).__name__)
    return np.asarray(result) if name is None else getattr(result, name).numpy()


@EACH_BERT
@pytest.mark.parametrize("name", METHODS)
def test_every_method_passes_segments_on(case: zoo.Case, name: str) -> None:
    # Of a model with one segment embedding for both there is no need to say which is which.
    ids, ask = IDS[:1, :4], METHODS[name]
    segments = torch.ones_like(ids)
    right = ask(second_only(case), ids)
    model = zoo.shared(case)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "integrated gradients")
        found = ask(model, ids, token_type_ids=segments)
        off = ask(model, ids)
    np.testing.assert_allclose(numbers(found), numbers(right), rtol=1e-9, atol=1e-11)
    assert np.abs(numbers(off) - numbers(right)).max() > 1e-4
    if name in CACHED:
        _, cache = model.run_with_cache(ids, token_type_ids=segments)
        again = ask(model, ids, token_type_ids=segments, cache=cache)
        np.testing.assert_allclose(numbers(again), numbers(found), rtol=1e-12, atol=1e-13)


@EACH_BERT
def test_a_cache_of_other_segments_is_refused(case: zoo.Case) -> None:
    model = zoo.shared(case)
    ids, segments = IDS[:1, :4], SEGMENTS[:1, -4:]
    _, cache = model.run_with_cache(ids, token_type_ids=segments)
    match = "another input: got 3 positions .*at position 1; .*token_type_ids"
    with pytest.raises(cm.InvalidInput, match=match):
        cm.attention(model, ids, cache=cache)
    with pytest.raises(cm.InvalidInput, match=r"at position 0; .*token_type_ids"):
        cm.attention(model, ids, cache=cache, token_type_ids=torch.ones_like(ids))
    cm.attention(model, ids, cache=cache, token_type_ids=segments)


@pytest.mark.parametrize("family", ["gpt2", "opt", "roberta", "bert"])
def test_a_cache_of_other_positions_is_refused(family: str) -> None:
    case = case_of(family, host="TransformerBridge")
    model, ids = zoo.shared(case), zoo.inputs(case).tokens
    there = torch.arange(2, 2 + ids.shape[1]).expand_as(ids)
    _, plain = model.run_with_cache(ids)
    _, moved = model.run_with_cache(ids, position_ids=there)
    found = cm.attention(model, ids, cache=moved, position_ids=there)
    assert torch.equal(found.scores, cm.attention(model, ids, position_ids=there).scores)
    cm.attention(model, ids, cache=plain)
    first = as_view(model).cached.first_position
    own = torch.arange(first, first + ids.shape[1]).expand_as(ids)
    assert torch.equal(
        cm.attention(model, ids, cache=plain, position_ids=own).scores,
        cm.attention(model, ids).scores,
    )
    refused = pytest.raises(cm.InvalidInput, match=r"at position 0; .*input's position_ids")
    with refused:
        cm.attention(model, ids, cache=plain, position_ids=there + (first == 2))
    if first != 2:
        with pytest.raises(cm.InvalidInput, match=r"at position 0; .*input's position_ids"):
            cm.attention(model, ids, cache=moved)


def test_a_cache_that_shows_no_positions_is_refused_with_position_ids() -> None:
    model, ids = zoo.shared(case_of("gpt2", host="TransformerBridge")), torch.tensor([[5, 6, 7]])
    _, cache = model.run_with_cache(ids)
    for name in ("pos_embed.hook_out", "hook_pos_embed"):
        cache.cache_dict.pop(name, None)
    with pytest.raises(cm.InvalidInput, match="the positions of this cache are not known"):
        cm.attention(model, ids, cache=cache, position_ids=torch.tensor([[1, 2, 5]]))


@EACH_BERT
def test_faithfulness_and_knockout_want_what_the_map_was_given(case: zoo.Case) -> None:
    model, ids = zoo.shared(case), IDS[:1, :4]
    given = {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}
    map = cm.attention(model, given, heads=False)
    plain = cm.attention(second_only(case), ids, heads=False)
    found = cm.faithfulness(model, given, map, pos=2, blank=7)
    right = cm.faithfulness(second_only(case), ids, plain, pos=2, blank=7)
    expected = pytest.approx([row.value for row in right.rows], rel=1e-4)
    assert [row.value for row in found.rows] == expected
    with pytest.raises(cm.InvalidInput, match="nothing of the tokens.*the same token_type_ids"):
        cm.faithfulness(model, ids, map, pos=2, blank=7)
    neurons = cm.log_prob_contributions(model, given, pos=2, by="ff_neuron", k=2)
    cm.knockout(model, given, neurons=neurons, controls=0)
    with pytest.raises(cm.InvalidInput, match="earlier result is of another input"):
        cm.knockout(model, ids, neurons=neurons, controls=0)


def pair_tokenizer(folder: Path) -> Any:
    """A tokenizer that frames texts and pairs as BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog sat ran".split()
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@EACH_BERT
def test_pairs_of_texts_are_what_the_tokenizer_makes_of_them(
    case: zoo.Case, tmp_path: Path
) -> None:
    model = zoo.build(case)
    model.tokenizer = tokenizer = pair_tokenizer(tmp_path)
    pairs = [("the cat sat", "a dog ran"), ("a cat", "the dog")]
    found = cm.attention(model, [pairs[0]])
    given = tokenizer(*pairs[0], return_tensors="pt")
    assert found.equals(cm.attention(model, given))
    assert found.equals(cm.attention(model, given.input_ids, token_type_ids=given.token_type_ids))
    assert found.provenance.options["token_type_ids"] == [[0] * 5 + [1] * 4]
    alone = cm.attention(model, pairs[1:])
    # HookedEncoder, too, pads on the right.
    both = cm.attention(model, pairs)
    assert both.target.strings[1][: alone.scores.shape[-1]] == alone.target.strings[0]
    torch.testing.assert_close(both.scores[1, ..., :7, :7], alone.scores[0])
    with pytest.warns(ContextMixWarning, match=r"two texts .*2 times '\[SEP\]' in row 0"):
        cm.attention(model, "the cat sat [SEP] a dog ran")
    cm.attention(model, "the cat sat")
    cm.attention(model, given.input_ids, token_type_ids=torch.zeros_like(given.input_ids))
    with pytest.raises(cm.InvalidInput, match="prepend_bos has no meaning for pairs"):
        cm.attention(model, pairs, prepend_bos=True)


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"token_type_ids": SEGMENTS[:, :3]}, r"token_type_ids do not fit .*shape \(2, 7\)"),
    ({"token_type_ids": SEGMENTS.double()}, r"do not fit the tokens: got a torch.float64"),
    ({"token_type_ids": "01"}, "got a str"),
    ({"token_type_ids": SEGMENTS * 2}, "from 0 to 2; expected integers from 0 to 1"),
    ({"token_type_ids": SEGMENTS - 1}, "from -1 to 0"),
    ({"input": {"input_ids": IDS, "langs": IDS}}, "takes no langs: .*token_type_ids"),
]


@pytest.mark.parametrize(("options", "match"), UNFIT)
def test_what_does_not_fit_is_refused(options: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"input": IDS, "attention_mask": REAL, **options}
    with pytest.raises(cm.InvalidInput, match=match):
        cm.attention(zoo.shared(BERTS[0]), **given)


def test_what_a_model_does_not_take_is_refused() -> None:
    case = case_of("gptj", host="HookedTransformer") if zoo.major() < 4 else case_of("bart")
    model, ids = zoo.shared(case), zoo.inputs(case).tokens
    for name in ("token_type_ids", "position_ids"):
        options: dict[str, Any] = {name: torch.ones_like(ids)}
        with pytest.raises(cm.InvalidInput, match=f"takes no {name}"):
            cm.attention(model, ids, **options)
    # Many tokenizers give segments to every model: one says nothing.
    given = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    assert cm.attention(model, given).equals(cm.attention(model, ids))


BRIDGED = pytest.mark.skipif(zoo.major() < 3, reason="no class of 2 takes them")


@BRIDGED
@pytest.mark.parametrize("family", ["gpt2", "llama_biased", "bert"])
def test_positions_are_the_models_own(family: str) -> None:
    model, hf = zoo.shared(case_of(family, host="TransformerBridge")), zoo.hf_model(family)
    ids = zoo.inputs(case_of(family)).tokens
    for positions in (torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.tensor([9, 4, 5, 6, 7, 1])):
        with torch.no_grad():
            out = hf(ids, position_ids=positions.view(1, -1), output_attentions=True)
        found = cm.attention(model, ids, position_ids=positions)
        torch.testing.assert_close(
            found.scores, torch.stack(out.attentions, 1).to(found.scores), rtol=1e-5, atol=1e-6
        )
        _, cache = model.run_with_cache(ids, position_ids=positions.view(1, -1))
        again = cm.attention(model, ids, position_ids=positions, cache=cache)
        torch.testing.assert_close(again.scores, found.scores, rtol=1e-6, atol=1e-7)
    if family != "llama_biased":
        with pytest.raises(cm.InvalidInput, match="position_ids are not all known"):
            cm.attention(model, ids, position_ids=torch.full_like(ids, 10**4))


@BRIDGED
def test_padding_in_front_is_right_where_positions_are_given() -> None:
    model = zoo.build(case_of("bert", host="TransformerBridge"))
    ids, short = IDS.clone(), IDS[1:, :4]
    ids[1] = torch.cat([ids.new_zeros(3), short[0]])
    real = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    options: dict[str, Any] = {
        "token_type_ids": SEGMENTS,
        "position_ids": (real.cumsum(1) - 1).clamp(min=0),
    }
    found = cm.attention(model, ids, attention_mask=real, **options)
    alone = cm.attention(model, short, token_type_ids=SEGMENTS[1:, 3:])
    torch.testing.assert_close(found.scores[1, ..., 3:, 3:], alone.scores[0])


@BRIDGED
def test_gpt2s_segments_are_looked_up_among_its_tokens() -> None:
    model, hf = zoo.shared(case_of("gpt2", host="TransformerBridge")), zoo.hf_model("gpt2")
    ids = zoo.inputs(case_of("gpt2")).tokens
    given = {"input_ids": ids, "token_type_ids": torch.full_like(ids, 30)}
    with torch.no_grad():
        right = torch.stack(hf(**given, output_attentions=True).attentions, dim=1)
    found = cm.attention(model, given)
    torch.testing.assert_close(found.scores, right)
    _, cache = model.run_with_cache(ids, token_type_ids=given["token_type_ids"])
    assert cm.attention(model, given, cache=cache).equals(found)


def test_rows_of_a_batch_keep_what_is_theirs() -> None:
    view = as_view(zoo.shared(BERTS[0]))
    side = Side(IDS, REAL.bool())
    batch = Batch(side, further={"token_type_ids": SEGMENTS})
    trace = view.run(batch, [view.blocks()[0].resid_in])
    part = trace.part(slice(1, 2)).batch
    assert torch.equal(part.further["token_type_ids"], SEGMENTS[1:])
    twice = batch.each(lambda tensor: tensor.repeat(2, 1))
    assert torch.equal(twice.further["token_type_ids"], SEGMENTS.repeat(2, 1))
    assert torch.equal(twice.main.mask, REAL.bool().repeat(2, 1))
    assert twice.decoder is None
