"""A decoder is told what Hugging Face's `generate` tells it, in every method and mode."""

from __future__ import annotations

import copy
import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_build
import zoo_configs
import zoo_others
from asked import case_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.errors import ContextMixWarning

pytestmark = pytest.mark.skipif(
    zoo_build.major() < 4, reason="multilingual models are on the bridge of 4.x alone"
)

LETTERS = list("\u2581abcdefghij")
LANGUAGES = ["eng_Latn", "fra_Latn", "deu_Latn"]


def nllb_tokenizer(folder: Path, **options: Any) -> Any:
    """NLLB's tokenizer: the code of the language is put before a text."""
    from transformers import AutoTokenizer, NllbTokenizer

    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *LETTERS])}
    NllbTokenizer(
        vocab=words, merges=[], extra_special_tokens=LANGUAGES, src_lang="eng_Latn", **options
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, src_lang="eng_Latn", **options)


def mbart_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer of mBART: the code is put behind a text, and a decoder starts with it."""
    from transformers import AutoTokenizer, MBartTokenizer

    words = [(word, 0.0) for word in ["<s>", "<pad>", "</s>", "<unk>", *LETTERS]]
    MBartTokenizer(vocab=words, src_lang="en_XX", **options).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, src_lang="en_XX", **options)


def start_of(model: Any, text: str | None) -> list[int]:
    """The decoder's tokens for a text, or for none."""
    encode = as_view(model).encode_decoder
    assert encode is not None
    return encode(text)


@functools.cache
def reference(family: str) -> Any:
    """The Hugging Face model."""
    return zoo.hf_model(family)


def bridge(family: str, tokenizer: Any = None, **settings: Any) -> Any:
    """A bridge with some generation settings."""
    model = zoo.build(case_of(family))
    if tokenizer is not None:
        model.tokenizer = tokenizer
    for name, value in settings.items():
        setattr(model.original_model.generation_config, name, value)
    return model


@torch.no_grad()
def generate(family: str, ids: Tensor, **options: Any) -> list[int]:
    """What the model generates, its start included."""
    said = reference(family).generate(ids, do_sample=False, num_beams=1, **options)
    return said[0].tolist()


@torch.no_grad()
def log_probs(family: str, ids: Tensor, decoder: list[int]) -> Tensor:
    """Log-probabilities at every position of the decoder."""
    out = reference(family)(input_ids=ids, decoder_input_ids=torch.tensor([decoder]))
    return out.logits[0].log_softmax(-1)


def require_prompt(
    model: Any, family: str, prompt: list[int], language: str | None = None, **options: Any
) -> None:
    """Checks every mode of the lens and a map against a prompt."""
    lens = functools.partial(cm.decoder_lens, model, "a b c", language=language)
    tokenizer = model.tokenizer
    ids = torch.tensor([tokenizer("a b c").input_ids])
    a, c = tokenizer.convert_tokens_to_ids(["a", "c"])
    said = generate(family, ids, max_new_tokens=5, **options)
    assert said[: len(prompt)] == prompt
    free = lens(max_new_tokens=5)
    assert free.ids[0, -1].tolist() == said[1:]
    forced = len(prompt) - 1
    right = log_probs(family, ids, said[:-1])[torch.arange(5), said[1:]]
    torch.testing.assert_close(free.log_probs[0, -1, forced:], right[forced:])
    assert not bool(free.log_probs[0, :, :forced].any())

    own = lens(mode="teacher_forced", max_new_tokens=5)
    assert own.target.ids[0].tolist() == said[len(prompt) :]
    assert not bool(own.ranks[0, -1].any())
    words = tokenizer(text_target="a c", add_special_tokens=False)["input_ids"]
    judged = lens("a c", mode="teacher_forced")
    answer = judged.target.ids[0].tolist()
    assert answer[: len(words)] == words
    right = log_probs(family, ids, [*prompt, *answer[:-1]])[forced:]
    torch.testing.assert_close(judged.log_probs[0, -1], right[torch.arange(len(answer)), answer])
    scores = lens(mode="scores", target=[a, c])
    torch.testing.assert_close(scores.log_probs[0, -1], log_probs(family, ids, prompt)[-1, [a, c]])
    map = cm.attention(model, "a b c", language=language)
    assert map.target.ids.tolist() == [prompt]
    map = cm.attention(model, "a b c", decoder_input="a c", language=language)
    assert map.target.ids.tolist() == [[*prompt, *words]]
    found = cm.gradient_x_input(model, "a b c", of="log_prob", language=language)
    best = log_probs(family, ids, prompt)[-1].argmax()
    assert found.provenance.options["target"] == [int(best)]
    assert found.provenance.options["pos"] == [len(prompt) - 1]


def test_a_language_that_only_the_tokenizer_knows_is_told_and_warned_of(tmp_path: Path) -> None:
    tokenizer = nllb_tokenizer(tmp_path, tgt_lang="fra_Latn")
    french = tokenizer.convert_tokens_to_ids("fra_Latn")
    model = bridge("m2m100", tokenizer)
    with pytest.warns(ContextMixWarning, match="'fra_Latn'.*told </s> fra_Latn here.*forced_b"):
        require_prompt(model, "m2m100", [2, french], forced_bos_token_id=french)


@pytest.mark.parametrize("language", ["fra_Latn", "deu_Latn", None])
def test_a_language_that_generation_forces_comes_first(
    language: str | None, tmp_path: Path
) -> None:
    tokenizer = nllb_tokenizer(tmp_path, tgt_lang=language)
    french = tokenizer.convert_tokens_to_ids("fra_Latn")
    model = bridge("m2m100", tokenizer, forced_bos_token_id=french)
    ask = functools.partial(
        require_prompt, model, "m2m100", [2, french], forced_bos_token_id=french
    )
    if language == "deu_Latn":
        with pytest.warns(ContextMixWarning, match="'deu_Latn'.*told </s> fra_Latn here"):
            ask()
        return
    ask()
    if language is None:
        # Reading a target text has not told the tokenizer a language.
        tokenizer.tgt_lang = None
        start_of(model, "a c")
        assert tokenizer.tgt_lang is None


@pytest.mark.parametrize("known", [None, "deu_Latn"])
def test_a_language_of_the_call_comes_before_all(known: str | None, tmp_path: Path) -> None:
    tokenizer = nllb_tokenizer(tmp_path, tgt_lang=known)
    french, german = tokenizer.convert_tokens_to_ids(["fra_Latn", "deu_Latn"])
    for forced in (None, german):
        model = bridge("m2m100", tokenizer, forced_bos_token_id=forced)
        before = tokenizer.tgt_lang
        require_prompt(
            model, "m2m100", [2, french], language="fra_Latn", forced_bos_token_id=french
        )
        assert tokenizer.tgt_lang == before
    with pytest.raises(cm.InvalidInput, match="knows no such language: got language='fr'"):
        cm.attention(model, "a b c", language="fr")
    with pytest.raises(cm.InvalidInput, match="is told no language"):
        cm.decoder_lens(bridge("bart"), "the cat", language="fra_Latn")
    with pytest.raises(cm.InvalidInput, match="language has no meaning for this model"):
        cm.attention(zoo.shared(case_of("gpt2")), "the cat", language="fra_Latn")
    with pytest.raises(cm.InvalidInput, match="task has no meaning for this model"):
        cm.decoder_lens(model, "a b c", task="translate")


def test_a_text_with_the_prompt_gets_no_second_one(tmp_path: Path) -> None:
    for forced in (None, 0):
        model = bridge("bart", forced_bos_token_id=forced)
        plain = start_of(model, "the dog")
        assert plain[:2] == [2, 0]
        with pytest.warns(ContextMixWarning, match="has its prompt: got '</s><s>'"):
            assert start_of(model, "</s><s>the dog") == plain
    model = bridge("m2m100", nllb_tokenizer(tmp_path, tgt_lang="fra_Latn"))
    plain = start_of(model, "a b")
    # Of these the code frames every text of the tokenizer's.
    with pytest.warns(ContextMixWarning, match="has special tokens .* got 'fra_Latn'"):
        assert start_of(model, "fra_Latna b") == plain
    assert start_of(model, "deu_Latna b") != plain


@pytest.mark.parametrize("name", ["decoder_start_token_id", "forced_bos_token_id"])
def test_settings_may_name_a_token_for_each_row(name: str) -> None:
    prompt = {"decoder_start_token_id": [7], "forced_bos_token_id": [2, 7]}[name]
    assert start_of(bridge("bart", **{name: [7, 7]}), None) == prompt
    with pytest.raises(cm.UnsupportedModel, match=rf"same for every text: got {name}=\[7, 8\]"):
        start_of(bridge("bart", **{name: [7, 8]}), None)


def test_a_language_of_the_call_starts_mbarts_decoder(tmp_path: Path) -> None:
    tokenizer = mbart_tokenizer(tmp_path)
    romanian = tokenizer.convert_tokens_to_ids("ro_RO")
    require_prompt(
        bridge("mbart", tokenizer),
        "mbart",
        [romanian],
        language="ro_RO",
        decoder_start_token_id=romanian,
    )


def trained(path: Path, *texts: str) -> list[str]:
    """Writes a small SentencePiece model, and returns its pieces but the first three."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 9),
        model_writer=written,
        vocab_size=14,
        minloglevel=9,
        hard_vocab_limit=False,
    )
    path.write_bytes(written.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return [pieces.id_to_piece(token) for token in range(3, pieces.get_piece_size())]


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:Recommended")
def test_marian_may_have_a_vocabulary_for_each_side(tmp_path: Path) -> None:
    from transformers import MarianTokenizer

    for name, text in (("source", "ab abc bca cab aabb"), ("target", "xy xyz zyx yxz xxyy")):
        words = ["</s>", "<unk>", *trained(tmp_path / f"{name}.spm", text), "<pad>"]
        vocabulary = {piece: n for n, piece in enumerate(words)}
        (tmp_path / f"{name}.json").write_text(json.dumps(vocabulary))
    files = [str(tmp_path / name) for name in ("source.spm", "target.spm", "source.json")]
    target = str(tmp_path / "target.json")
    tokenizer = MarianTokenizer(*files, target_vocab_file=target, separate_vocabs=True)
    sizes = {
        **zoo_configs.BART_LIKE,
        "vocab_size": 11,
        "decoder_vocab_size": 10,
        "share_encoder_decoder_embeddings": False,
        "tie_word_embeddings": False,
        "pad_token_id": 9,
        "eos_token_id": 0,
        "decoder_start_token_id": 9,
    }
    hf = zoo_build.hugging_face("MarianMTModel", "MarianConfig", sizes, dtype=torch.float64, seed=0)
    # Read directly, it is tried on ids that both sides have.
    found = cm.decoder_lens(hf, "ab abc", max_new_tokens=3, tokenizer=tokenizer)
    assert {*"".join(found.texts[0]).replace(" ", "")} <= {*"xyz"}
    model = zoo_build.bridge(hf, "bart", dtype=torch.float64, processed=False)
    model.tokenizer = tokenizer
    map = cm.attention(model, "ab abc", decoder_input="xy xyz", stack="cross")
    assert map.source.strings == ((" ab", " ab", "c", "</s>"),)
    assert map.target.strings == (("<pad>", " xy", " xy", "z"),)


@pytest.mark.once
def test_m2m100_names_languages_by_codes_that_are_no_tokens(tmp_path: Path) -> None:
    from transformers import M2M100Tokenizer

    words = trained(tmp_path / "model.spm", "a b c ab bc cab", "abc cba bac")
    vocabulary = {piece: n for n, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    files = [str(tmp_path / name) for name in ("vocab.json", "model.spm")]
    M2M100Tokenizer(*files, src_lang="en").save_pretrained(tmp_path / "tokenizer")
    tokenizer = M2M100Tokenizer.from_pretrained(tmp_path / "tokenizer", src_lang="en")
    french, german = map(tokenizer.get_lang_id, ("fr", "de"))
    sizes = {**zoo_configs.BART_LIKE, "vocab_size": max(tokenizer.lang_code_to_id.values()) + 1}
    hf = zoo_build.hugging_face(
        "M2M100ForConditionalGeneration", "M2M100Config", sizes, dtype=torch.float64, seed=0
    )
    model = zoo_build.bridge(copy.deepcopy(hf), "bart", dtype=torch.float64, processed=False)
    model.tokenizer = tokenizer
    tokenizer = model.tokenizer  # loaded again
    ids = torch.tensor([tokenizer("ab c").input_ids])
    assert ids[0, 0] == tokenizer.get_lang_id("en")

    def prompt_of(**options: Any) -> list[int]:
        return cm.attention(model, "ab c", stack="decoder", **options).target.ids[0].tolist()

    assert prompt_of() == [2]
    assert prompt_of(language="fr") == [2, french]
    answer = tokenizer("c ab", add_special_tokens=False)["input_ids"]
    assert prompt_of(language="fr", decoder_input="c ab") == [2, french, *answer]
    said = hf.generate(ids, forced_bos_token_id=french, max_new_tokens=5, do_sample=False)
    free = cm.decoder_lens(model, "ab c", language="fr", max_new_tokens=5, layer=-1)
    assert free.ids[0, -1].tolist() == said[0, 1:].tolist()
    tokenizer.tgt_lang = "de"
    with pytest.warns(ContextMixWarning, match="'de', and a decoder that is told </s> __de__"):
        assert prompt_of() == [2, german]
    assert prompt_of(language="fr") == [2, french]
    with pytest.raises(cm.InvalidInput, match="knows no such language: got language='fra_Latn'"):
        prompt_of(language="fra_Latn")


def test_the_decoders_start_is_that_of_the_generation_config(tmp_path: Path) -> None:
    tokenizer = nllb_tokenizer(tmp_path, tgt_lang="fra_Latn")
    french = tokenizer.convert_tokens_to_ids("fra_Latn")
    model = bridge("m2m100", tokenizer, decoder_start_token_id=french)
    require_prompt(model, "m2m100", [french], decoder_start_token_id=french)
    model = bridge("m2m100", nllb_tokenizer(tmp_path), decoder_start_token_id=None)
    assert start_of(model, None) == [0], "the BOS token, as in generate"


def test_mbarts_decoder_starts_with_the_language(tmp_path: Path) -> None:
    tokenizer = mbart_tokenizer(tmp_path, tgt_lang="ro_RO")
    romanian = tokenizer.convert_tokens_to_ids("ro_RO")
    model = bridge("mbart", tokenizer, decoder_start_token_id=romanian)
    require_prompt(model, "mbart", [romanian], decoder_start_token_id=romanian)
    model = bridge("mbart", tokenizer)
    with pytest.warns(ContextMixWarning, match="'ro_RO', and a decoder that is told ro_RO"):
        require_prompt(model, "mbart", [romanian], decoder_start_token_id=romanian)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_other_models_start_as_they_generate(family: str) -> None:
    model, ids = bridge(family), zoo.inputs(case_of(family)).tokens[:1]
    start = zoo_configs.FAMILIES[family].decoder_start
    assert cm.attention(model, ids).target.ids.tolist() == [[start]]
    model.original_model.generation_config.forced_bos_token_id = 9
    assert cm.attention(model, ids).target.ids.tolist() == [[start, 9]]
    own = cm.decoder_lens(model, ids, mode="teacher_forced", max_new_tokens=4)
    said = generate(family, ids, max_new_tokens=4, forced_bos_token_id=9)
    assert said[:2] == [start, 9]
    assert own.target.ids[0].tolist() == said[2:]
    # Ids are taken as they are, and what is forced is forced behind the start alone.
    given = torch.tensor([[start, 11]])
    told = cm.decoder_lens(model, ids, decoder_input=given, mode="teacher_forced", max_new_tokens=3)
    assert (
        told.target.ids[0].tolist()
        == generate(family, ids, decoder_input_ids=given, max_new_tokens=3, forced_bos_token_id=9)[
            2:
        ]
    )
    other = torch.tensor([[11, 12]])
    free = cm.decoder_lens(model, ids, decoder_input=other, layer=-1, max_new_tokens=2)
    first = log_probs(family, ids, [11, 12])[-1].argmax()
    assert free.ids[0, 0, 0] == first


# Speech

START, GERMAN, ENGLISH, TRANSCRIBE, TRANSLATE, PLAIN = 1, 40, 41, 50, 51, 55
LANGUAGE_IDS = {"<|de|>": GERMAN, "<|en|>": ENGLISH}
TASKS = {"transcribe": TRANSCRIBE, "translate": TRANSLATE}
MULTILINGUAL = {
    "lang_to_id": LANGUAGE_IDS,
    "task_to_id": TASKS,
    "no_timestamps_token_id": PLAIN,
    "is_multilingual": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no timestamps": {"no_timestamps_token_id": PLAIN},
    "language": {**MULTILINGUAL, "language": "german"},
    "language and task": {**MULTILINGUAL, "language": "de", "task": "translate"},
    "heard": MULTILINGUAL,
    "forced ids": {**MULTILINGUAL, "forced_decoder_ids": [[1, GERMAN], [2, TRANSLATE]]},
    "another start": {"decoder_start_token_id": 3},
}


def whisper(**settings: Any) -> Any:
    """A tiny random Whisper with generation settings."""
    model = zoo_others.whisper(encoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def features() -> Tensor:
    return torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(3)).double()


class Seen:
    """A logits processor that keeps what the decoder was told."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Changes nothing."""
        self.ids = ids if self.ids is None else self.ids
        return scores


@torch.no_grad()
def told(model: Any, **options: Any) -> tuple[Tensor, list[list[int]]]:
    """What Whisper's own generate tells the decoder, and what it says."""
    seen = Seen()
    with zoo_build.quiet():
        said = model.generate(
            features(), logits_processor=[seen], max_new_tokens=4, do_sample=False, **options
        )
    assert seen.ids is not None
    return seen.ids, said.tolist()


@pytest.mark.once
@pytest.mark.parametrize("name", SETTINGS)
def test_whisper_is_told_what_its_generate_tells_it(name: str) -> None:
    model = whisper(**SETTINGS[name])
    with zoo_build.quiet():
        prompt, said = told(model)
        width = prompt.shape[1]
        scores = cm.decoder_lens(model, features(), mode="scores", target=[7, 9])
        free = cm.decoder_lens(model, features(), layer=-1, max_new_tokens=4)
        own = cm.decoder_lens(model, features(), mode="teacher_forced", max_new_tokens=4)
    expected = {"language and task": [[START, GERMAN, TRANSLATE, PLAIN]] * 2}.get(name)
    assert expected in (None, prompt.tolist())
    assert (width > 1) == (name not in ("nothing", "another start"))
    with torch.no_grad():
        right = model(features(), decoder_input_ids=prompt).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(scores.log_probs[:, -1], right[:, [7, 9]])
    for row in range(2):
        answer = free.ids[row, 0][free.mask[row, 0]].tolist()
        assert [t for t in answer if t != 2] == [t for t in said[row] if t not in (2, 60)][-4:]
        assert own.target.ids[row][own.target.mask[row]].tolist() == answer
    assert not bool(own.ranks[:, -1].any())


@pytest.mark.once
def test_whisper_is_told_language_and_task_of_the_call() -> None:
    model = whisper(**SETTINGS["language"])  # German
    with zoo_build.quiet():
        both = {"language": "en", "task": "translate"}
        each: list[dict[str, Any]] = [{"language": "en"}, {"task": "translate"}, both]
        for asked in each:
            prompt, _ = told(model, **asked)
            found = cm.decoder_lens(model, features(), mode="scores", target=[7], **asked)
            with torch.no_grad():
                right = model(features(), decoder_input_ids=prompt).logits[:, -1].log_softmax(-1)
            torch.testing.assert_close(found.log_probs[:, -1], right[:, [7]])
        assert told(model, **both)[0].tolist() == [[START, ENGLISH, TRANSLATE, PLAIN]] * 2
        tokenizer = Words()
        tokenizer.language = "english"
        with pytest.raises(cm.InvalidInput, match="cannot be told this: got language='klingon'"):
            cm.decoder_lens(
                model,
                features(),
                mode="scores",
                target=[7],
                language="klingon",
                tokenizer=tokenizer,
            )


class Words:
    """A tokenizer as Whisper's: what is before a text says language and task."""

    language: str | None = None
    prefix_tokens = (START, ENGLISH, TRANSCRIBE, PLAIN)
    all_special_ids = (START, 2, *LANGUAGE_IDS.values(), *TASKS.values(), PLAIN)

    def __call__(
        self, text: str = "", *, text_target: str = "", add_special_tokens: bool = True
    ) -> dict[str, list[int]]:
        """Returns letters as ids."""
        letters = (text or text_target).replace(" ", "")
        words = [5 + ord(letter) - ord("a") for letter in letters]
        return {"input_ids": [*self.prefix_tokens, *words, 2] if add_special_tokens else words}

    def decode(self, ids: Any, **options: Any) -> str:
        """Returns letters."""
        return "".join(chr(int(token) - 5 + ord("a")) for token in ids if 5 <= int(token) < 31)

    def convert_ids_to_tokens(self, ids: int | list[int]) -> str | list[str]:
        """Returns the names of ids, or that of one."""
        if isinstance(ids, int):
            return f"<{ids}>"
        return [f"<{token}>" for token in ids]


@pytest.mark.once
def test_text_follows_whispers_prompt() -> None:
    model = whisper(**SETTINGS["language"])
    prompt = [START, GERMAN, TRANSCRIBE, PLAIN]
    ask = functools.partial(cm.decoder_lens, model, features(), tokenizer=Words())
    with zoo_build.quiet():
        judged = ask(["ab", "c"], mode="teacher_forced")
        scores = ask(mode="scores", target=["d"], decoder_input=["ab", "c"])
        by_ids = ask(mode="scores", target=["d"], decoder_input=[[*prompt, 5], [*prompt, 7]])
    assert judged.target.ids.tolist() == [[5, 6, 2], [7, 2, 60]]
    with torch.no_grad():
        run = functools.partial(model, features())
        inputs = torch.tensor([[*prompt, 5, 6], [*prompt, 7, 2]])
        right = run(decoder_input_ids=inputs).logits.log_softmax(-1)
        first = run(decoder_input_ids=torch.tensor([[*prompt, 5], [*prompt, 7]])).logits
    torch.testing.assert_close(judged.log_probs[0, -1], right[0, [3, 4, 5], [5, 6, 2]])
    torch.testing.assert_close(judged.log_probs[1, -1, :2], right[1, [3, 4], [7, 2]])
    torch.testing.assert_close(scores.log_probs[0, -1], right[0, -1, [8]])
    torch.testing.assert_close(scores.log_probs[1, -1], right[1, -2, [8]])
    torch.testing.assert_close(by_ids.log_probs[:, -1], first[:, -1].log_softmax(-1)[:, [8]])
    # Maps begin with what the tokenizer puts before a text, and that with the start token.
    model.tokenizer = Words()
    found = cm.attention(model, features(), decoder_input=["ab", "ab"])
    assert found.target.ids.tolist() == [[*Words.prefix_tokens, 5, 6]] * 2


@pytest.mark.once
def test_a_language_of_whispers_tokenizer_is_told_and_warned_of() -> None:
    tokenizer = Words()
    tokenizer.language = "english"

    def ask(model: Any) -> Any:
        return cm.decoder_lens(model, features(), mode="scores", target=[7], tokenizer=tokenizer)

    model = whisper(**MULTILINGUAL)
    with pytest.warns(ContextMixWarning, match="'english', and a decoder that is told <1> <41>"):
        found = ask(model)
    with torch.no_grad():
        ids = torch.tensor([tokenizer.prefix_tokens] * 2)
        right = model(features(), decoder_input_ids=ids).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(found.log_probs[:, -1], right[:, [7]])
    model.generation_config.language = "de"
    with pytest.warns(ContextMixWarning, match="'english', and a decoder that is told <1> <40>"):
        other = ask(model)
    assert not torch.allclose(found.log_probs, other.log_probs)
    model.generation_config.language = "en"
    assert torch.equal(ask(model).log_probs, found.log_probs)
