"""Texts, tokens, masks and padding: what users of TransformerLens pass is what is run."""

from __future__ import annotations

import copy
import importlib
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pytest
import torch
import zoo
import zoo_build
from asked import bound, case_of, keywords, relative, shared, stacks, view_of
from test_decoder_prompt import nllb_tokenizer
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, PaddingSide, make_batch
from tl_contextmix.adapters.inputs.padding import unsafe_padding
from tl_contextmix.core.blocks import Side
from tl_contextmix.engine.parts import POINTS, Point
from tl_contextmix.results import ContextMap

CASES = [pytest.param(case, id=case.id) for case in zoo.spread()]
PAIRS = [pytest.param(case, id=case.id) for case in zoo.cases() if case.encoder_decoder]
SINGLE = [pytest.param(case, id=case.id) for case in zoo.cases() if not case.encoder_decoder]
TEXTS = ["the cat sat", "a dog ran to the small house", "paris"]
# Hosts whose left padding was measured to be wrong: positions that do not move with the text.
UNMOVED = {
    "bert-HookedEncoder",
    *(f"{family}-TransformerBridge" for family in ("bart", "marian", "mbart", "pegasus")),
}


def points(case: zoo.Case) -> list[Point]:
    if case.family in zoo.OPAQUE_FEED_FORWARD:
        return ["attn_out", "resid_mid", "mlp_in"]
    mlp = case.family != "attn_only"
    return [point for point in POINTS if mlp or not point.startswith("mlp")]


def encode(model: Any, case: zoo.Case, text: str) -> list[int]:
    """The ids that a user of this class would make of a text.

    Models that were trained on framed texts get the frame of their own tokenizer, untouched by
    TransformerLens, which makes those of BART and RoBERTa forget their end token.
    """
    if case.encoder_decoder or case.host == "HookedEncoder" or case.family in ("bert", "roberta"):
        return fresh_tokenizer(case)(text)["input_ids"]
    return model.to_tokens(text)[0].tolist()


def fresh_tokenizer(case: zoo.Case) -> Any:
    return zoo_build.load_tokenizer(zoo.rows.FAMILIES[case.family].tokenizer)


# Padding


def padded(given: zoo.Inputs, side: str, pad: int, length: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens with padding on one side and their mask."""
    rows = given.tokens.shape[0]
    more, zeros = torch.full((rows, length), pad), torch.zeros(rows, length, dtype=torch.long)
    tokens, ones = given.tokens, torch.ones_like(given.tokens)
    if side == "right":
        return torch.cat([tokens, more], dim=1), torch.cat([ones, zeros], dim=1)
    return torch.cat([more, tokens], dim=1), torch.cat([zeros, ones], dim=1)


def require_same(found: ContextMap, alone: ContextMap, limit: float) -> None:
    """Real positions as in the run without padding, padding exactly zero."""
    target, source = found.target.mask, found.source.mask
    for row in range(target.shape[0]):
        scores = found.scores[row][..., target[row], :][..., source[row]]
        assert relative(scores, alone.scores[row]) <= limit, found.point
        # Measured by the scores: a model may have no bias at all.
        off = (found.bias[row][..., target[row]] - alone.bias[row]).abs().max()
        assert float(off / alone.scores[row].abs().max()) <= limit
        assert not bool(found.scores[row][..., ~target[row], :].any())
        assert not bool(found.scores[row][..., ~source[row]].any())


def padded_maps(model: Any, case: zoo.Case, side: str, pad: int, limit: float) -> None:
    given = zoo.inputs(case)
    tokens, mask = padded(given, side, pad)
    for stack in stacks(case):
        options = {"at": points(case), "stack": stack, **keywords(given)}
        alone = cm.attention_norms(model, given.tokens, **options)
        found = cm.attention_norms(model, tokens, attention_mask=mask, **options)
        for point in alone:
            require_same(found[point], alone[point], limit)


# Any id may stand where the mask says padding, also one that the model does not pad with.
@pytest.mark.parametrize("pad", [0, 17])
@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_padding_on_the_right_changes_no_real_position(case: zoo.Case, pad: int) -> None:
    padded_maps(zoo.shared(case), case, "right", pad, bound(case))


def left_is_wrong(model: Any, case: zoo.Case) -> bool:
    """Whether padding before the text changes the text, as the package measures it."""
    tokens, mask = padded(zoo.inputs(case), "left", 0)
    return bool(unsafe_padding(view_of(model), Side(tokens, mask.bool())))


@pytest.mark.parametrize("pad", [0, 17])
@pytest.mark.parametrize("case", CASES)
def test_padding_on_the_left_changes_nothing(case: zoo.Case, pad: int) -> None:
    """Where the host is wrong, rows run without it."""
    model = zoo.shared(case, torch.float32)
    # Measured: 1.2e-6 at most.
    padded_maps(model, case, "left", pad, 1e-5)
    assert left_is_wrong(model, case) == (case.id in UNMOVED)


@pytest.mark.parametrize("case", CASES)
def test_left_padding_in_double_precision_is_right(case: zoo.Case) -> None:
    # Hugging Face code with float32 inside turns rows of padding of a float64 model into NaN.
    inside = "attention" in zoo.FLOAT32_INSIDE.get((case.family, case.host), ())
    wrong = case.id in UNMOVED or (inside and case.family != "gptj")
    padded_maps(zoo.shared(case), case, "left", 0, bound(case))
    assert left_is_wrong(zoo.shared(case), case) == wrong


@pytest.mark.parametrize("case", [case for case in zoo.cases() if case.id in UNMOVED], ids=str)
def test_left_padding_is_refused_where_rows_have_to_run_as_they_are(case: zoo.Case) -> None:
    model = zoo.shared(case, torch.float32)
    name = view_of(model).blocks()[0].resid_in
    match = f"padding before the text gives wrong numbers .*{case.host}.* relative error of"
    refused = pytest.raises(cm.InvalidInput, match=f"{match}.*Pad on the right")
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: tensor)]), refused:
        padded_maps(model, case, "left", 0, 1e-5)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_texts_of_unequal_length_equal_each_text_alone(case: zoo.Case) -> None:
    model = zoo.build(case, dtype=torch.float32)
    at = points(case)[-1]
    sides: list[PaddingSide] = ["right", "left"]
    for side in sides:
        found = cm.attention_norms(model, TEXTS, at=at, padding_side=side)
        assert found.target.mask.all() == case.encoder_decoder
        for row, text in enumerate(TEXTS):
            alone = cm.attention_norms(model, text, at=at)
            target, source = found.target.mask[row], found.source.mask[row]
            scores = found.scores[row][..., target, :][..., source]
            assert relative(scores, alone.scores[0]) <= 1e-5
            kept = [s for s, real in zip(found.source.strings[row], source, strict=True) if real]
            assert tuple(kept) == alone.source.strings[0]


@pytest.mark.parametrize("case", SINGLE)
def test_decompose_rows_of_a_padded_batch_equal_singles(case: zoo.Case) -> None:
    # In float64, Hugging Face code with float32 inside makes NaN of long padding, see below.
    inside = (case.family, case.host) in zoo.FLOAT32_INSIDE
    model = zoo.shared(case, dtype=torch.float32 if inside else torch.float64)
    at, limit = points(case)[-1], 1e-5 if inside else bound(case)
    found = cm.decompose(model, TEXTS[:2], at=at)
    for row, text in enumerate(TEXTS[:2]):
        alone = cm.decompose(model, text, at=at)
        real = found.target.mask[row]
        parts = found.parts[row][:, real][:, :, real]
        assert relative(parts, alone.parts[0]) <= limit
        assert torch.allclose(found.bias[row][:, real], alone.bias[0], atol=1e-5)


def test_padding_that_the_model_turns_into_nan_is_refused() -> None:
    case = case_of("mistral", host="TransformerBridge")
    # Longer than its window of four, so that a row of padding sees nothing else.
    with pytest.raises(cm.InvalidInput, match=r"a mask in float64 turns into NaN .*: got NaN"):
        cm.decompose(zoo.shared(case), TEXTS[:2])


def test_masks_of_any_dtype_and_with_texts() -> None:
    model, given = shared(case_of("gpt2"))
    tokens, mask = padded(given, "right", 0)
    found = [
        cm.attention_norms(model, tokens, attention_mask=mask.to(dtype)).scores
        for dtype in (torch.bool, torch.int32, torch.float32, torch.uint8)
    ]
    assert all(torch.equal(scores, found[0]) for scores in found)
    # With texts, a mask can hide more than their padding.
    rows = cm.attention_norms(model, TEXTS[:2])
    hidden = rows.source.mask.long()
    hidden[1, 3] = 0
    part = cm.attention_norms(model, TEXTS[:2], attention_mask=hidden)
    assert not bool(part.scores[1, ..., 3].any())
    assert torch.equal(part.scores[0], rows.scores[0])


def test_padding_id_outside_of_the_vocabulary_is_not_used() -> None:
    model = zoo.build(case_of("gpt2"))
    model.tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert model.tokenizer.pad_token_id == zoo.rows.D_VOCAB
    found = cm.attention_norms(model, TEXTS)
    assert int(found.source.ids.max()) < zoo.rows.D_VOCAB


# Text and tokens


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_a_text_and_its_tokens_give_the_same_map(case: zoo.Case) -> None:
    model, at = zoo.shared(case), points(case)[-1]
    ids = torch.tensor(encode(model, case, TEXTS[1]))
    text = cm.attention_norms(model, TEXTS[1], at=at)
    for tokens in (ids, ids[None], ids[None].int(), ids[None].to(torch.uint8)):
        found = cm.attention_norms(model, tokens, at=at)
        assert torch.equal(found.scores, text.scores)
        assert found.source.strings == text.source.strings


@pytest.mark.parametrize("case", SINGLE)
def test_beginning_of_sequence_is_as_the_model_has_it(case: zoo.Case) -> None:
    model, view = zoo.shared(case), None
    view = view_of(model)
    if case.host == "HookedEncoder" or case.family in ("bert", "roberta"):
        with pytest.raises(cm.InvalidInput, match=r"prepend_bos .* encoder: got prepend_bos=True"):
            view.encode(TEXTS[0], True)
        return
    for prepend in (True, False):
        expected = model.to_tokens(TEXTS[0], prepend_bos=prepend)[0].tolist()
        assert view.encode(TEXTS[0], prepend) == expected
        found = cm.attention_norms(model, TEXTS[0], at="attn_out", prepend_bos=prepend)
        assert found.source.ids[0].tolist() == expected
    assert len(view.encode(TEXTS[0], True)) == len(view.encode(TEXTS[0], False)) + 1
    assert view.encode(TEXTS[0], None) == model.to_tokens(TEXTS[0])[0].tolist()


@pytest.mark.parametrize("case", PAIRS)
def test_decoder_side_as_text_tokens_or_start_alone(case: zoo.Case) -> None:
    model = zoo.shared(case)
    source, target = TEXTS[0], "the small house"
    start = zoo.rows.FAMILIES[case.family].decoder_start
    labels = fresh_tokenizer(case)(target)["input_ids"]
    shift = getattr(
        getattr(model, "original_model", None), "prepare_decoder_input_ids_from_labels", None
    )
    if shift is not None:
        # What Hugging Face trains on: the labels moved by one.
        shifted = shift(labels=torch.tensor([labels]))[0]
    else:
        shifted = torch.tensor([start, *labels[:-1]])
    text = cm.attention_norms(model, source, decoder_input=target)
    assert text.target.ids[0].tolist() == shifted.tolist()
    assert text.target.ids[0, 0] == start
    tokens = cm.attention_norms(model, source, decoder_input=shifted)
    assert torch.equal(tokens.scores, text.scores)
    alone = cm.attention_norms(model, source)
    assert alone.target.ids.tolist() == [[start]]
    assert torch.equal(
        cm.attention_norms(model, source, stack="encoder", decoder_input=target).scores,
        cm.attention_norms(model, source, stack="encoder").scores,
    )


# What each tokenizer puts around a text; TransformerLens has it loaded again with a BOS token.
FRAMES = [None, "<s> $A", "$A </s>", "<s> $A </s>", "$A </s> <lang>", "<lang> $A </s>"]
FRAMED = [
    pytest.param(case, id=case.id)
    for case in zoo.cases()
    if case.family in ("t5", "bart", "mbart", "bert", "roberta") and case.host[-7:] != "former"
]


def framing(folder: Path, frame: str | None, bos: str | None) -> Path:
    """A tokenizer with words for ids from 5 on, an unknown word, and any frame, on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "<pad>", "</s>", "<unk>", "<lang>"]
    words = {word: i for i, word in enumerate([*specials, "the", "cat", "sat"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame:
        used = [(word, words[word]) for word in specials if word in frame.split()]
        inner.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<lang>"],
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", FRAMED)
def test_a_text_is_what_its_tokenizer_makes_of_it(case: zoo.Case, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, bridge = zoo.build(case, dtype=torch.float32), case.host == "TransformerBridge"
    view, start = view_of(model), zoo.rows.FAMILIES[case.family].decoder_start
    shift = getattr(getattr(model, "original_model", None), _SHIFT, None)
    ids = {"<s>": 0, "</s>": 2, "<lang>": 4}
    words = [5, 3, 6, 3]  # two known words, each with an unknown one behind it
    for frame, bos, by_name in product(FRAMES, (None, "<s>"), (False, True)):
        folder = framing(tmp_path / f"{frame} {bos}".replace("/", ""), frame, bos)
        # What from_pretrained of a bridge asks for when it loads the tokenizer itself.
        options = {"add_bos_token": True} if by_name and bridge else {}
        model.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if bridge and zoo_build.major() == 3:
            again = importlib.import_module("transformer_lens.utilities").get_tokenizer_with_bos
            model.tokenizer = again(model.tokenizer)
        before, _, after = (frame or "$A").partition("$A")
        ending = [ids[word] for word in after.split()]
        expected = [*(ids[word] for word in before.split()), *words, *ending]
        assert AutoTokenizer.from_pretrained(folder)("the x cat y")["input_ids"] == expected
        assert view.encode("the x cat y", None) == expected, (frame, bos, by_name)
        assert view.encode("", None) == [token for token in expected if token not in words]
        if view.encode_decoder is not None:
            # As trained: the labels moved by one. Where nothing ends them, no word is lost.
            labels = expected if ending else [*expected, start]
            shifted = [start, *labels[:-1]]
            if shift is not None:
                # mBART's would start with what ends the labels; generate starts as set.
                shifted = [start, *shift(labels=torch.tensor([labels]))[0].tolist()[1:]]
            # What is left of the end of a text has no place in one that goes on.
            shifted = shifted[: 1 + len(expected) - len(ending)]
            assert view.encode_decoder("the x cat y") == shifted, (frame, bos, by_name)
            assert [token for token in shifted if token in words] == words


_SHIFT = "prepare_decoder_input_ids_from_labels"


@pytest.mark.skipif(zoo_build.major() < 3, reason="TransformerLens 2 has no TransformerBridge")
def test_the_language_of_a_text_is_the_tokenizers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    fresh = nllb_tokenizer(tmp_path, tgt_lang="fra_Latn")
    english, french, german = fresh.convert_tokens_to_ids(["eng_Latn", "fra_Latn", "deu_Latn"])
    model = zoo.build(case_of("bart", "TransformerBridge"), dtype=torch.float32)
    view = view_of(model)
    model.tokenizer = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    plain = fresh("a b", add_special_tokens=False)["input_ids"]
    for _ in range(2):
        assert view.encode("a b", None) == [english, *plain, 2] == fresh("a b")["input_ids"]
        assert view.encode_decoder is not None
        assert view.encode_decoder("a b") == [2, french, *plain]
    model.tokenizer.src_lang = "deu_Latn"
    assert view.encode("a b", None) == [german, *plain, 2]


@pytest.mark.skipif(zoo_build.major() < 3, reason="TransformerLens 2 has no TransformerBridge")
def test_words_added_later_and_a_tokenizer_that_is_gone(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = framing(tmp_path / "here", "<s> $A </s>", "<s>")
    model = zoo.build(case_of("bart", "TransformerBridge"), dtype=torch.float32)
    view = view_of(model)
    model.tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
    model.tokenizer.add_tokens("dog")
    assert view.encode("the dog", None) == [0, 5, 8, 2]
    shutil.rmtree(folder)
    assert view.encode("the cat", None) == [0, 5, 6, 2]  # known by now
    model.tokenizer = copy.deepcopy(model.tokenizer)
    with pytest.raises(cm.InvalidInput, match=r"special tokens .* add_bos_token=True.*token ids"):
        view.encode("the cat", None)


@pytest.mark.parametrize("case", PAIRS)
def test_decoder_texts_of_unequal_length_equal_each_alone(case: zoo.Case) -> None:
    model, targets = zoo.shared(case), ["the small house", "a dog"]
    found = cm.attention_norms(model, TEXTS[:2], decoder_input=targets)
    for row in range(2):
        alone = cm.attention_norms(model, TEXTS[row], decoder_input=targets[row])
        target, source = found.target.mask[row], found.source.mask[row]
        scores = found.scores[row][..., target, :][..., source]
        assert relative(scores, alone.scores[0]) <= bound(case)


def test_an_unfinished_decoder_text_keeps_its_last_word() -> None:
    model = zoo.build(case_of("t5"))
    view = view_of(model)
    assert view.encode_decoder is not None
    finished = view.encode_decoder("the small house")
    model.tokenizer = _without_frame(model.tokenizer)
    assert model.tokenizer("the small house")["input_ids"][-1] != model.tokenizer.eos_token_id
    assert view.encode_decoder("the small house") == finished


def _without_frame(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


@pytest.mark.parametrize("case", CASES)
def test_the_longest_input_is_the_models_own(case: zoo.Case) -> None:
    model = zoo.shared(case, dtype=torch.float32)
    view = view_of(model)
    length = view.n_ctx or 3 * zoo.rows.N_CTX
    if length > 3 * zoo.rows.N_CTX:
        # HookedTransformer has one for each name, whatever the config says.
        assert (case.host, length) == ("HookedTransformer", model.cfg.n_ctx)
        return
    # Positions of RoBERTa start behind the id of padding, which is 1.
    expected = zoo.rows.N_CTX - 2 * (case.family == "roberta")
    assert view.n_ctx == (None if case.family in ("t5", "flan") else expected)
    tokens = torch.full((1, length), 7)
    decoder = keywords(zoo.Inputs(tokens, tokens if case.encoder_decoder else None))
    cm.attention_norms(model, tokens, at="attn_out", layer=0, **decoder)
    if view.n_ctx is not None:
        longer = torch.full((1, length + 1), 7)
        match = rf"input cannot be run: got {length + 1} tokens; expected at most {length}"
        with pytest.raises(cm.InvalidInput, match=match):
            cm.attention_norms(model, longer, at="attn_out")


# Labels


@pytest.mark.parametrize("case", SINGLE)
def test_labels_are_the_tokens_as_text(case: zoo.Case) -> None:
    model = zoo.build(case)
    found = cm.attention_norms(model, TEXTS[0], at="attn_out")
    assert found.source.strings[0][-3:] == ("the", "cat", "sat") or found.source.strings[0][
        1:4
    ] == ("the", "cat", "sat")
    if hasattr(model, "to_str_tokens"):
        assert list(found.source.strings[0]) == model.to_str_tokens(found.source.ids[0])
    model.tokenizer = None
    ids = found.source.ids
    assert cm.attention_norms(model, ids, at="attn_out").source.strings[0][0] == str(int(ids[0, 0]))


def tokenizer_of(kind: str) -> Any:
    """A tiny tokenizer of one of the three kinds that real models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if kind == "byte level":
        words = ["\u0120the", "\u0120cat", "ing", "<u>"]
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<u>"))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.ByteLevel()
    elif kind == "sentence piece":
        words = ["\u2581the", "\u2581cat", "ing", "<u>", "\u2581"]
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<u>"))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
    else:
        words = ["the", "cat", "##ing", "<u>"]
        inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<u>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<u>")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("byte level", (" the", " cat", "ing", "<u>")),
        ("sentence piece", (" the", " cat", "ing", "<u>", " ")),
        ("word piece", ("the", "cat", "##ing", "<u>")),
    ],
)
def test_labels_keep_the_marks_of_real_tokenizers(kind: str, expected: tuple[str, ...]) -> None:
    model = zoo.build(case_of("gpt2"))
    with zoo_build.quiet():
        model.tokenizer = tokenizer_of(kind)
    ids = torch.arange(len(expected) + 1)[None]
    found = cm.attention_norms(model, ids, at="attn_out")
    assert found.source.strings[0][:-1] == expected
    # Vocabularies are padded to round numbers; an id without a token is shown as what it is.
    assert found.source.strings[0][-1] == f"[{len(expected)}]"


def test_what_was_given_is_not_changed() -> None:
    model, given = shared(case_of("gpt2"))
    tokens, mask = padded(given, "right", 17)
    kept = tokens.clone(), mask.clone()
    found = cm.attention_norms(model, tokens, attention_mask=mask)
    assert torch.equal(tokens, kept[0])
    assert torch.equal(mask, kept[1])
    assert torch.equal(found.source.ids, tokens)


def test_batches_are_checked_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.shared(case_of("gpt2"))
    view = view_of(model)
    monkeypatch.setattr(type(model), "run_with_hooks", None)
    make_batch(view, Given(TEXTS[0]))
    with pytest.raises(cm.InvalidInput, match="is empty"):
        make_batch(view, Given([]))


def test_columns_and_arrays_of_texts_are_lists() -> None:
    model, texts = zoo.shared(case_of("gpt2")), TEXTS[:2]
    expected = cm.attention(model, texts)
    columns = [
        pandas.Series(texts, index=[7, 3]),
        numpy.array(texts),
        numpy.array(texts, dtype=object),
        datasets.Dataset.from_dict({"text": texts})["text"],
    ]
    for column in columns:
        assert cm.attention(model, column).equals(expected), type(column)
    assert cm.attention(model, range(3, 6)).equals(cm.attention(model, [3, 4, 5]))
    with pytest.raises(cm.InvalidInput, match="the input cannot be read: got a generator"):
        cm.attention(model, (text for text in texts))  # type: ignore[arg-type]
