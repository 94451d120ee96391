"""Text: characters cut into tokens, words, special tokens in a text, and names of tokens."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import random
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_build
from asked import case_of, told, view_of
from hand_built import sentence
from public import FUNCTIONS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import tl_contextmix as cm
from tl_contextmix.adapters.tokenizers import piece_of, text_of
from tl_contextmix.core.pieces import join_pieces, show_bytes, whole_characters
from tl_contextmix.engine.registry import methods
from tl_contextmix.errors import ContextMixWarning
from tl_contextmix.evaluation.minimal_pairs import place_tokens
from tl_contextmix.results import Tokens

APART = "they don\u2019t know the caf\u00e9 \U0001f642 \u6cb3"
labels = partial(sentence, spaced=True)
CORPUS = ["the caf\u00e9 isn\u2019t here", "\u201cthe cat\u201d is here"]


def fast(inner: Tokenizer, folder: Path | None = None, **roles: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
    if folder is None:
        return found
    found.save_pretrained(folder)  # TransformerLens loads it again
    return AutoTokenizer.from_pretrained(folder)


def byte_level() -> Tokenizer:
    """GPT-2's kind, trained on ASCII: it cuts everything else into single bytes."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["they don't know what it is and the cat isn't here"] * 20
    inner.train_from_iterator(words, trainer)
    return inner


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: what is no piece becomes bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581theca"]
    inner = Tokenizer(
        models.BPE(
            {piece: place for place, piece in enumerate(pieces)},
            [],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return inner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with a byte-level tokenizer."""
    from transformer_lens.model_bridge import TransformerBridge

    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = fast(byte_level(), tmp_path_factory.mktemp("bytes"), **roles)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 16}
    hf = zoo_build.hugging_face(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**sizes, "n_layer": 1, "n_head": 2},
        dtype=torch.float64,
        seed=0,
    )
    with zoo_build.quiet():
        return TransformerBridge.boot_transformers(
            "tiny", hf_model=hf, tokenizer=tokenizer, device="cpu", dtype=torch.float64
        )


# Pieces


@pytest.mark.once
def test_labels_in_a_row_are_the_text_however_it_is_cut() -> None:
    draw, text = random.Random(0), f"{APART} \u0939\u093f\u0928\ufffd\u4e0d \u27e8E2\u27e9?"
    data = text.encode()
    # Characters end where the bytes before are text.
    ends = {
        n
        for n in range(len(data) + 1)
        if show_bytes(data[:n]) == data[:n].decode("utf-8", "ignore")
    }
    for _ in range(50):
        cuts = sorted({0, len(data), *draw.sample(range(len(data)), draw.randrange(len(data)))})
        parts = [data[a:b] for a, b in pairwise(cuts)]
        pieces = [show_bytes(part) for part in parts]
        if "\u27e8E2\u27e9" not in pieces:  # the text's own, which cannot be told apart
            assert join_pieces(pieces) == text
        stretches = whole_characters(pieces)
        assert [a for a, _ in stretches] == [i for i, cut in enumerate(cuts[:-1]) if cut in ends]
        assert [b for _, b in stretches] == [*(a for a, _ in stretches[1:]), len(pieces)]


@pytest.mark.once
def test_parts_of_characters_are_told_apart_by_their_bytes() -> None:
    assert show_bytes(b" \xe2\x80") == " \u27e8E2 80\u27e9"
    assert show_bytes("\ufffd".encode()) == "\ufffd"  # which is a character
    assert join_pieces(["\u27e8E2 80\u27e9", "a"]) == "\u27e8E2 80\u27e9a"
    assert join_pieces(["\ud800", "\u27e8C3\u27e9", "\u27e8A9\u27e9"]) == "\ud800\u00e9"
    assert whole_characters(["\ud800", "\u27e8C3\u27e9", "\u27e8A9\u27e9"]) == [(0, 1), (1, 3)]
    assert join_pieces(["[CLS]", "play", "##ing", "it"], spaced=False) == "[CLS] playing it"
    assert join_pieces(["##s", "it"], spaced=False) == "##s it"


@pytest.mark.once
@pytest.mark.parametrize("kind", ["GPT-2", "Llama 2", "ByT5", "bytes"])
def test_every_kind_of_byte_is_shown(kind: str) -> None:
    from transformers import ByT5Tokenizer

    class Bytes:
        """As Qwen's first tokenizer, whose pieces are bytes."""

        all_special_ids = ()

        def convert_ids_to_tokens(self, token: int) -> bytes:
            return bytes([token])

        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", "replace")

    text = "the caf\u00e9 \u6cb3"
    tokenizer: Any = Bytes()
    ids = list(text.encode())
    if kind != "bytes":
        kinds = {"GPT-2": byte_level, "Llama 2": byte_fallback}
        tokenizer = ByT5Tokenizer() if kind == "ByT5" else fast(kinds[kind]())
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [piece_of(tokenizer, token) for token in ids]
    assert join_pieces(pieces).removeprefix(" ") == text_of(tokenizer, ids) == text
    assert pieces[-3:] == ["\u27e8E6\u27e9", "\u27e8B2\u27e9", "\u27e8B3\u27e9"]
    cut = text_of(tokenizer, ids[:-1], skip_special_tokens=True)
    if kind != "ByT5":  # which drops what is no character
        assert cut == "the caf\u00e9 \u27e8E6 B2\u27e9"
    assert "\ufffd" not in cut


# Words


@pytest.mark.once
@pytest.mark.parametrize(
    "text",
    [
        APART,
        "don\u2019t l\u2019eau d\u2010abord col\u00b7labora",
        "\u05e6\u05f3\u05d9\u05e4\u05e1 \u05d0\u05e8\u05d4\u05f4\u05d1",
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e",
        "\u0623\u064e\u0647\u0652\u0644\u064b\u0627 \u0639\u0631\u0628\u064a",
        "\u0440\u0443\u0441\u0441\u043a\u0438\u0439",
        "\u03b5\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
        "nai\u0308ve \ud55c\uad6d\uc5b4",
        "\U0001f469\u200d\U0001f4bb \U0001f44d\U0001f3fd \u2764\ufe0f \U0001f1eb\U0001f1f7",
    ],
)
@pytest.mark.parametrize("cut", [1, 2, 100])
def test_words_of_every_script(text: str, cut: int) -> None:
    data = [word.encode() for word in text.split(" ")]
    data = [b" " * bool(place) + word for place, word in enumerate(data)]
    parts = [word[a : a + cut] for word in data for a in range(0, len(word), cut)]
    tokens = labels(*map(show_bytes, parts))
    words = tokens.join(tokens.words()).strings[0]
    assert [*words] == [word.decode() for word in data]


@pytest.mark.once
def test_what_is_no_word_stands_alone() -> None:
    def words(*pieces: str, spaced: bool | None = True) -> list[str]:
        tokens = labels(*pieces, spaced=spaced)
        return [*tokens.join(tokens.words()).strings[0]]

    flag = ("\U0001f1eb", "\U0001f1f7", "\U0001f1e9", "\U0001f1ea")
    assert words(*flag) == ["".join(flag[:2]), "".join(flag[2:])]
    assert words("a", "\u2764", "\ufe0f", "b") == ["a", "\u2764\ufe0f", "b"]
    assert words("\u0939", "\u093f", "\u0928") == ["\u0939\u093f\u0928"]
    assert words("\n", "a", " ", " ", "b", " ", "<s>") == ["\n", "a", " ", " b", " ", "<s>"]
    assert words("\u27e8E2\u27e9", "a", "\u27e8E2\u27e9", "\u27e8E2\u27e9") == [
        *("\u27e8E2\u27e9", "a", "\u27e8E2\u27e9", "\u27e8E2\u27e9")
    ]


@pytest.mark.newest
def test_words_do_not_depend_on_the_other_rows(model: Any) -> None:
    def words(text: str | list[str]) -> list[list[str]]:
        tokens = cm.attention(model, text, prepend_bos=False).source
        joined = tokens.join(tokens.words())
        return [
            [w for w, real in zip(*row, strict=True) if real]
            for row in zip(joined.strings, joined.mask.tolist(), strict=True)
        ]

    alone = ["hey", "they know", "caf\u00e9"]
    expected = [["hey"], ["they", " know"], ["caf\u00e9"]]
    assert [words(text)[0] for text in alone] == words(alone) == expected
    assert cm.attention(model, "hey").words().source.strings == (("<|endoftext|>", "hey"),)
    shown = cm.attention(model, APART).words()
    assert shown.source.strings[0][1:] == (
        *("they", " don\u2019t", " know", " the", " caf\u00e9", " \U0001f642", " \u6cb3"),
    )
    assert "\ufffd" not in repr(shown) + shown.show().html()


@pytest.mark.once
def test_words_of_word_pieces_and_of_files_that_do_not_say() -> None:
    pieces = ("the", "un", "##able", "cat")
    assert labels(*pieces, spaced=False).words() == labels(*pieces, spaced=None).words()
    assert cm.attention(zoo.shared(case_of("bert")), "the cat").source.spaced is False
    one = labels("a", " b", spaced=None)
    other = labels("c", "d", spaced=None)
    both = Tokens(
        torch.cat([one.ids, other.ids]),
        one.strings + other.strings,
        torch.cat([one.mask, other.mask]),
        one.sides,
    )
    assert both.words() == [one.words()[0], other.words()[0]]
    assert both.select([0], [1]).cat(labels("x")).spaced is None


@pytest.mark.once
def test_tokens_of_one_character_are_placed_together() -> None:
    pieces = [show_bytes(bytes([byte])) for byte in "a \U0001f642\u6cb3b".encode()]
    found = place_tokens("a \U0001f642\u6cb3b", labels(*pieces))
    assert found == [(0, 1), None, *[(2, 3)] * 4, *[(3, 4)] * 3, (4, 5)]


# What is mined


@pytest.mark.newest
def test_contexts_are_text(model: Any, tmp_path: Path) -> None:
    found = cm.mine_triggers(model, CORPUS, out=tmp_path / "out", k=2)
    with open(found.to_sheet(tmp_path / "a.csv"), encoding="utf-8-sig", newline="") as file:
        sheet = list(csv.DictReader(file))
    whole = 0
    for row in sheet:
        ids = model.to_tokens(CORPUS[int(row["document"])])[0, : int(row["position"]) + 1]
        decoded = model.tokenizer.decode(ids)
        if "\ufffd" not in decoded:
            assert row["context"].removeprefix("'") == decoded
            whole += 1
    assert whole
    lines = found.to_jsonl(tmp_path / "a.jsonl").read_text().splitlines()
    tokens = {token for line in lines for token in json.loads(line)["tokens"]}
    neuron = int(found.to_dataframe()["neuron"].iloc[0])
    shown = found.examples(0, neuron)
    contexts = [trigger.context for trigger in shown.triggers]
    patterns = found.patterns(0).to_dataframe()["text"].tolist()
    everything = [*sheet, *tokens, *contexts, *patterns, repr(shown), shown.show().html()]
    assert not [one for one in map(str, everything) if "\ufffd" in one]
    assert "\u27e8C3\u27e9" in tokens


def packed() -> tuple[Any, list[list[int]], int]:
    """A model, documents with special tokens inside, and the id of these."""
    made = zoo.build(case_of("gpt2"))
    bos = made.tokenizer.bos_token_id
    return made, [[bos, 7, 9, bos, 11, 7], [8, bos, 9, 10], [bos, bos]], bos


def test_special_tokens_are_left_out_wherever_they_stand(tmp_path: Path) -> None:
    made, corpus, bos = packed()
    found = cm.mine_triggers(made, corpus, out=tmp_path / "a", k=20)
    counts = found.manifest["counts"]
    assert (counts["documents"], counts["empty"]) == (3, 1)
    assert (counts["tokens"], counts["positions"], counts["special"]) == (10, 7, 3)
    assert bos not in set(found.to_dataframe()["token"])
    assert "3 special" in repr(found)
    # Every prefix that counts, by hand: endings and what they contain.
    texts = [[7, 9, bos, 11, 7], [8, bos, 9, 10]]
    ends = [row[: end + 1] for row in texts for end in range(len(row)) if row[end] != bos]
    for row in found.patterns(0).rows:
        matching = [
            end
            for end in ends
            if join_pieces(
                list(map(view_of(made).to_string, end[-row.length :])), view_of(made).spaced()
            )
            == row.text
        ]
        if row.kind == "ends with":
            assert row.chance == pytest.approx(len(matching) / len(ends))
        else:
            assert bos not in [view_of(made).pieces(row.text)]
    every = cm.mine_triggers(made, corpus, out=tmp_path / "b", k=20, special=True)
    assert every.manifest["counts"]["special"] == 0
    assert every.manifest["counts"]["positions"] == 12
    assert bos in set(every.to_dataframe()["token"])
    assert cm.composition(made, corpus, pos="all").examples == 7


# Special tokens in a text


def test_a_text_with_its_own_bos_gets_no_second_one() -> None:
    demo = cm.load_demo("causal-lm")
    bos, text = demo.tokenizer.bos_token, "the capital of france is"
    expected = cm.attention_norms(demo, text, at="block_out")
    for prepend in (None, True):
        with pytest.warns(ContextMixWarning, match="has its own .*prepend_bos=False"):
            found = cm.attention_norms(demo, f"{bos} {text}", at="block_out", prepend_bos=prepend)
        assert torch.equal(found.source.ids, expected.source.ids)
        assert torch.equal(found.scores, expected.scores)
    # Said: no warning.
    found = cm.attention_norms(demo, f"{bos} {text}", at="block_out", prepend_bos=False)
    assert torch.equal(found.source.ids, expected.source.ids)
    with pytest.warns(ContextMixWarning, match="has its own"):
        both = cm.attention(demo, [text, f"{bos} {text}"])
    assert torch.equal(both.source.ids[0], both.source.ids[1])
    with pytest.warns(ContextMixWarning, match="has its own"):
        kept = cm.attention(demo, f"{bos}{bos} {text}")
    assert kept.source.ids[0, :2].tolist() == [demo.tokenizer.bos_token_id] * 2
    with pytest.warns(ContextMixWarning, match="before token ids.*prepend_bos=True with ids"):
        cm.attention(demo, expected.source.ids, prepend_bos=True)


@pytest.mark.once
def test_every_method_warns_of_a_second_bos() -> None:
    demo = zoo.shared(case_of("gpt2"))
    text = demo.tokenizer.bos_token + " the house"
    for name, function in asked_of_text():
        with told() as said:
            function(demo, text)
        assert any("has its own" in message for message in said), name


def test_an_unknown_word_is_no_bos() -> None:
    made = zoo.build(case_of("gpt2"))
    assert made.tokenizer.unk_token_id == made.tokenizer.bos_token_id
    ids = view_of(made).encode("unheard the", None)
    assert ids[:2] == [made.tokenizer.bos_token_id] * 2


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_an_encoders_special_tokens_are_not_put_twice(family: str) -> None:
    made = zoo.build(case_of(family, "bart"))
    expected = view_of(made).encode("the cat", None)
    names = [view_of(made).to_string(token).strip() for token in expected]
    with pytest.warns(ContextMixWarning, match="has special tokens .*Leave them out"):
        assert view_of(made).encode(" ".join(names), None) == expected
    inside = view_of(made).encode(f"the {names[-1]} cat", None)
    assert inside.count(expected[-1]) == 2


@pytest.mark.once
def test_tokens_of_a_text_are_no_list_of_texts() -> None:
    demo = cm.load_demo("causal-lm")
    text = "the capital of france is"
    pieces = demo.to_str_tokens(text)
    for given in (pieces, [text.split()[0], *pieces[2:]]):
        with pytest.raises(cm.InvalidInput, match=r"tokens of one text.*to_str_tokens.*to_tokens"):
            cm.attention(demo, given)
    masked = cm.load_demo("masked-lm")
    pieces = [view_of(masked).to_string(one) for one in view_of(masked).encode("the cat", None)]
    with pytest.raises(cm.InvalidInput, match="tokens of one text"):
        cm.attention(masked, pieces)
    for texts in (["the", "capital"], [" the", " capital"], ["the capital", " of"]):
        assert len(cm.attention(demo, texts).source.strings) == len(texts)


# Names of tokens


def asked_of_text() -> Iterator[tuple[str, Any]]:
    """Every method that takes a model and a text, with what else it needs."""
    for name, method in methods().items():
        ask = FUNCTIONS[name]
        if not method.on_text or "labels" not in inspect.signature(ask).parameters:
            continue
        key = {"component_readouts": "components", "query_contributions": "neurons"}.get(name)
        if key:
            yield name, partial(asked_of_neurons, ask, key)
        elif name == "knockout":
            yield (
                name,
                lambda model, given, **more: cm.knockout(
                    model, given, heads=[(0, 1)], controls=1, **more
                ),
            )
        elif name in ("attention_norms", "decompose"):
            yield name, lambda model, given, ask=ask, **more: ask(model, given, at="mlp_in", **more)
        elif "decoder_lens" not in name:
            yield name, ask


def asked_of_neurons(ask: Any, key: str, model: Any, given: Any, **more: Any) -> Any:
    found = cm.log_prob_contributions(model, given, by="ff_neuron", k=2, **more)
    return ask(model, given, **{key: found}, **more)


def words_in(result: Any) -> set[str]:
    """The labels of all tokens that a result shows."""
    if isinstance(result, Tokens):
        return {word for row in result.strings for word in row}
    if isinstance(result, dict):
        return set().union(*map(words_in, result.values()))
    if not dataclasses.is_dataclass(result):
        return set()
    found = (
        set(getattr(result, "words", {}).values())
        if isinstance(getattr(result, "words", 0), dict)
        else set()
    )
    held = (getattr(result, field.name) for field in dataclasses.fields(result))
    return found.union(*map(words_in, held))


@pytest.fixture(scope="module")
def toy() -> tuple[Any, torch.Tensor, list[str]]:
    """A model without a tokenizer, a game, and the names of its moves."""
    made = zoo.build(case_of("gpt2"), tokenizer=False)
    moves = [f"{column}{row}" for row in range(1, 9) for column in "abcdefgh"]
    return made, torch.tensor([[3, 41, 12, 60]]), moves[: view_of(made).d_vocab]


def test_labels_name_tokens_in_every_method(toy: Any) -> None:
    made, game, moves = toy
    asked = 0
    for name, ask in asked_of_text():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ContextMixWarning)
            found = ask(made, game, labels=moves)
        shown = words_in(found)
        assert shown, name
        assert shown <= set(moves), name
        assert {moves[token] for token in game[0].tolist()} <= shown or name == "knockout"
        asked += 1
    assert asked > 15
    assert "labels" in inspect.signature(cm.attention).parameters


def test_labels_name_targets(toy: Any) -> None:
    made, game, moves = toy
    by_id = cm.log_prob_contributions(made, game, target=9)
    for given in (moves, moves.__getitem__, tuple(moves)):
        found = cm.log_prob_contributions(made, game, target=moves[9], labels=given)
        assert torch.equal(found.scores, by_id.scores)
        assert found.target.strings == ((moves[9],),)
    slopes = cm.gradient_x_input(made, game, target=[moves[9]], labels=moves)
    assert torch.equal(slopes.scores, cm.gradient_x_input(made, game, target=9).scores)
    out = cm.knockout(made, game, heads=[(0, 1)], target=moves[9], labels=moves)
    assert out.target.ids.tolist() == [[9]]
    tops = cm.ff_values(made, layer=0, neurons=[0], k=2, labels=moves)
    assert set(tops.words.values()) <= set(moves)
    assert cm.attention(made, game, labels=moves).words().source.strings[0] == tuple(
        moves[token] for token in game[0].tolist()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], r"got 1 of str; expected \d+ of str, one for each token id"),
        ("abc", "got 0 of str"),
        (lambda token: token, r"got labels\(\d+\) = \d+; expected a function"),
        (["x"] * 61, r"does not say which token.*'x', of the ids \[0, 1"),
        (list(map(str, range(61))), "no label is called that: got 'x'"),
    ],
)
@pytest.mark.once
def test_labels_that_do_not_name_the_vocabulary(toy: Any, given: Any, message: str) -> None:
    made, game, _ = toy
    with pytest.raises(cm.InvalidInput, match=message):
        cm.log_prob_contributions(made, game, target="x", labels=given)


def test_games_are_evaluated_and_reported_without_a_tokenizer(toy: Any) -> None:
    made, game, moves = toy
    fmap = cm.value_zeroing(made, game, labels=moves).normalize()
    options: dict[str, Any] = {"blank": 1, "labels": moves}
    named = cm.faithfulness(made, game, fmap, target=moves[9], foil=moves[7], **options)
    by_id = cm.faithfulness(made, game, fmap, target=9, foil=7, blank=1)
    assert [row.value for row in named.rows] == [row.value for row in by_id.rows]
    games: list[Any] = [game[0].tolist(), torch.tensor([5, 6, 7])]
    asked: dict[str, Any] = {"methods": ["value_zeroing", "gradient_x_input"]}
    compared = cm.compare(made, games, target=moves[9], **asked, **options)
    plain = cm.compare(made, games, target=9, blank=1, **asked)
    assert [row.value for row in compared.rows] == [row.value for row in plain.rows]
    page = cm.report(made, game, labels=moves, target=moves[9])
    assert all(moves[token] in page.html() for token in game[0].tolist())
    assert "Mixing" in page.html()


def test_games_are_mined_without_a_tokenizer(toy: Any, tmp_path: Path) -> None:
    made, game, moves = toy
    games = [game[0].tolist(), [5, 6, 7]]
    mined = cm.mine_triggers(made, games, out=tmp_path / "out", k=2, labels=moves)
    again = cm.load_triggers(tmp_path / "out", model=made, corpus=games, labels=moves)
    neuron = int(mined.to_dataframe()["neuron"].iloc[0])
    for triggers in (mined, again):
        first = triggers.examples(0, neuron).triggers[0]
        ids = games[first.document][: first.position + 1]
        assert first.context == " ".join(moves[token] for token in ids)
        assert set(triggers.examples(0, neuron).promotes) <= set(moves)
    sheet = mined.to_sheet(tmp_path / "a.csv").read_text("utf-8-sig")
    assert first.context in sheet
    assert mined.manifest["counts"]["special"] == 0


def test_labels_name_what_a_decoder_says() -> None:
    made = zoo.build(case_of("t5", "bart", host="TransformerBridge"), tokenizer=False)
    moves = [f"m{token}" for token in range(view_of(made).d_vocab)]
    game = torch.tensor([[13, 41, 12, 60]])
    scored = cm.decoder_lens(made, game, mode="scores", target=["m7", "m9"], labels=moves)
    by_id = cm.decoder_lens(made, game, mode="scores", target=[7, 9])
    assert torch.equal(scored.logits, by_id.logits)
    assert scored.strings == ("m7", "m9")
    said = cm.decoder_lens(made, game, max_new_tokens=3, labels=moves)
    row = said.ids[0, -1][said.content[0, -1]].tolist()
    assert said.texts[0][-1] == " ".join(moves[token] for token in row)
    assert said.inputs == (" ".join(moves[token] for token in game[0].tolist()),)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_classes_are_read_at_any_position(direction: str) -> None:
    options = {"d_vocab_out": 3, "attention_dir": direction, "act_fn": "gelu"}
    options["normalization_type"] = "LN"
    build = zoo_build.config_built if zoo_build.major() < 4 else zoo_build.native
    with zoo_build.quiet():
        made = build(options, dtype=torch.float64, seed=0)
    made.tokenizer = None
    game = torch.tensor([[3, 41, 12, 60], [8, 9, 10, 11]])
    moves, classes = [f"m{token}" for token in range(made.cfg.d_vocab)], ["lost", "drawn", "won"]
    for pos in (0, 2, -1):
        found = cm.log_prob_contributions(
            made, game, target="won", pos=pos, labels=(moves, classes)
        )
        expected = made(game).log_softmax(-1)[:, pos, 2]
        assert torch.allclose(found.log_prob, expected, atol=1e-10)
        assert found.target.strings == (("won",), ("won",))
        assert found.tokens.strings[0][0] == "m3"
    with pytest.raises(cm.InvalidInput, match="from 0 to 2"):
        cm.gradient_x_input(made, game, target=7, pos=1)
    values = cm.ff_values(made, layer=0, k=1, labels=(moves, classes))
    assert set(values.words.values()) <= set(classes)
    # A list names what is read; outputs that are no tokens stay numbers.
    alone = cm.log_prob_contributions(made, game, target=2, pos=0, labels=moves)
    assert alone.target.strings[0] == ("2",)
