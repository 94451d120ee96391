"""The embedded models: their sentences, their weights and what their cards say about them."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import cards
import evaluate
import grammar_fr
import pytest
import tasks
import tokenization
import torch
import train
import unchecked
from recipes import RECIPES, Phase
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from tl_contextmix import demo_models
from tl_contextmix.demo_models import DEMO_NAMES, demo_folder, grammar, lexicon, lexicon_fr
from tl_contextmix.errors import InvalidInput

pytestmark = pytest.mark.mostly_once

ROOT = Path(__file__).resolve().parent.parent

TOLERANCE = 0.005
"""How far a share may be from its card. Measured: 0.000 under TransformerLens 2.18, 3.9 and 4.3;
one borderline case in 200, from rounding on another processor, is 0.005."""

SHIPPED = {
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("train.json", "MODEL_CARD.md"),
}

ENGLISH = [
    "the capital of latvia is riga .",
    "paul met david at the city and then paul gave a letter to david .",
    "the cow often is singing .",
]
FRENCH = [
    ("the horses are red .", "les chevaux sont rouges ."),
    ("the boat fell .", "le bateau tombait ."),
    ("these books shine .", "ces livres brillent ."),
]


# ---- sentences


def test_known_sentences_of_the_english_grammar():
    # Every seed must go on giving the same sentences: the weights were trained on them.
    english = grammar.Grammar(0, "train")
    assert [english.sentence().text for _ in range(3)] == ENGLISH
    assert grammar.Grammar(0, "train").sentence() == grammar.Grammar(0, "train").sentence()
    assert grammar.Grammar(1, "train").sentence() != grammar.Grammar(0, "train").sentence()


def test_known_sentences_of_the_translation_grammar():
    french = grammar_fr.TranslationGrammar(0, "train")
    pairs = french.translations(3)
    assert [(pair.source_text, pair.target_text) for pair in pairs] == FRENCH


@pytest.mark.parametrize("split", ["train", "test"])
def test_sites_point_at_words(split):
    for sentence in grammar.Grammar(3, split).sentences(2000):
        assert 0 < len(sentence.words) <= grammar.MAX_WORDS
        for site in sentence.sites:
            assert sentence.words[site.target] != site.wrong
            assert site.cues
            assert not set(site.cues) & set(site.lures)
            assert all(0 <= i < len(sentence.words) for i in (*site.cues, *site.lures))
            assert site.target not in (*site.cues, *site.lures)
            if site.kind != "name":
                continue
            assert {sentence.words[i] for i in site.cues} == {sentence.words[site.target]}
            assert {sentence.words[i] for i in site.lures} == {site.wrong}


def test_lures_have_the_other_number():
    plurals = {plural for nouns in lexicon.NOUNS.values() for _, plural in nouns}
    for sentence in grammar.Grammar(4, "test").sentences(2000):
        for site in sentence.sites:
            if site.kind not in ("agreement", "reflexive"):
                continue
            cue = sentence.words[site.cues[0]]
            for lure in site.lures:
                assert (sentence.words[lure] in plurals) != (cue in plurals)


def test_training_holds_pairs_out():
    sites = [site for s in grammar.Grammar(5, "train").sentences(3000) for site in s.sites]
    assert not any(site.held_out for site in sites if site.kind != "name")
    tested = [site for s in grammar.Grammar(5, "test").sentences(500) for site in s.sites]
    assert any(site.held_out for site in tested if site.kind == "agreement")
    assert not _name_pairs("train") & _name_pairs("test")


def _name_pairs(split):
    stream = grammar.Grammar(6, split)
    found = set()
    for sentence in (stream.name() for _ in range(500)):
        site = sentence.sites[0]
        found.add(frozenset((sentence.words[site.target], site.wrong)))
    return found


def test_vocabulary_is_complete():
    mixture = grammar.Shares(agreement=0.6, reflexive=0.1, fact=0.2)
    sentences = grammar.Grammar(7, shares=mixture).sentences(6000)
    seen = {word for sentence in sentences for word in sentence.words}
    assert seen == grammar.known_words()
    assert len(seen) == 412
    pairs = grammar_fr.TranslationGrammar(7).translations(2500)
    assert {word for pair in pairs for word in pair.english} == lexicon_fr.known_words()
    assert demo_models.known_words("causal-lm") == grammar.known_words()
    assert demo_models.known_words("encoder-decoder") == lexicon_fr.known_words()


def test_translations_are_explained():
    for pair in grammar_fr.TranslationGrammar(8, "test").translations(2000):
        assert len(pair.french) == len(pair.sources) == len(pair.contexts)
        assert len(pair.english) <= grammar_fr.MAX_ENGLISH_WORDS
        assert len(pair.french) <= grammar_fr.MAX_FRENCH_WORDS
        for sources, context in zip(pair.sources, pair.contexts, strict=True):
            assert sources
            assert len(set(sources)) == len(sources)
            assert all(0 <= index < len(pair.english) for index in sources)
            assert (context == "dictionary") == (len(sources) == 1) or context == "clitic"


def test_the_same_words_give_the_same_french():
    # The sources must suffice: two French words with equal sources and context are equal.
    meaning: dict[tuple, set[str]] = {}
    for pair in grammar_fr.TranslationGrammar(9).translations(2500):
        for word, sources, context in zip(pair.french, pair.sources, pair.contexts, strict=True):
            if context in ("determiner", "adjective", "verb_number", "pronoun", "sense"):
                key = (context, tuple(pair.english[index] for index in sources))
                meaning.setdefault(key, set()).add(word)
    assert all(len(words) == 1 for words in meaning.values())


# ---- files


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_files_of_a_demo_model(name):
    files = {path.name for path in demo_folder(name).iterdir()}
    assert files - {"generation_config.json"} == SHIPPED


def test_all_weights_together_are_small():
    total = sum(path.stat().st_size for name in DEMO_NAMES for path in demo_folder(name).rglob("*"))
    assert total < 12e6


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_files_name_no_path_or_address(name):
    for path in demo_folder(name).iterdir():
        if path.suffix == ".safetensors":
            continue
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in text
        assert not re.search(r"(^|[\s\"'(])(/[a-z]+/|~/|[A-Z]:\\)", text), path
        assert "://" not in text, path


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_weights_are_finite_and_in_half_precision(name):
    weights = load_file(demo_folder(name) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_every_word_is_one_token(name):
    tokenizer = AutoTokenizer.from_pretrained(demo_folder(name))
    for word in demo_models.known_words(name):
        assert len(tokenizer.tokenize(word)) == 1, word
    ids = tokenizer("the king")["input_ids"]
    assert len(ids) == {"causal-lm": 2, "masked-lm": 4, "encoder-decoder": 3}[name]
    assert tokenizer.unk_token_id not in ids


def test_unknown_demo_name():
    for function in (demo_folder, demo_models.known_words):
        with pytest.raises(InvalidInput, match=r"'causal'.*causal-lm.*masked-lm.*encoder-decoder"):
            function("causal")


# ---- how they were made


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_record_is_the_recipe(name):
    record = json.loads((demo_folder(name) / "train.json").read_text("utf-8"))
    recipe = RECIPES[name]
    assert record["fraction"] == 1
    assert record["weight_seed"] == recipe.weight_seed
    assert record["weight_decay"] == recipe.weight_decay
    assert len(record["phases"]) == len(recipe.phases)
    for found, phase in zip(record["phases"], recipe.phases, strict=True):
        assert Phase(**_fields(found)) == phase
        assert found["loss_by_step"][-1][0] <= phase.steps
        assert found["loss_by_step"][-1][1] < found["loss_by_step"][0][1]


def _fields(found):
    values = {key: found[key] for key in Phase.__dataclass_fields__}
    if values["shares"]:
        values["shares"] = grammar.Shares(**values["shares"])
    return values


def test_learning_rate_schedule():
    phase = Phase(0, 1, 0, steps=1000, peak_learning_rate=1e-3, warmup_steps=100)
    rates = [phase.learning_rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5, rel=1e-3)
    assert max(rates) == pytest.approx(1e-3, rel=0.03)
    assert rates[-1] == pytest.approx(2e-5, rel=0.01)
    assert rates[100:] == sorted(rates[100:], reverse=True)


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_training_is_deterministic_and_makes_a_loadable_folder(name, tmp_path, monkeypatch):
    folders = [tmp_path / "first", tmp_path / "second"]
    train.train(name, folders[0], fraction=0.0003)
    # The command does the same; what it reports changes nothing.
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    train.main([name, str(folders[1]), "--fraction", "0.0003"])
    for phase in json.loads((folders[1] / "train.json").read_text())["phases"]:
        assert [step for step, _ in phase["loss_by_step"]] == [*range(1, phase["steps"] + 1)]
        assert all(0 < loss < 20 for _, loss in phase["loss_by_step"])
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[key], second[key]) for key in first)
    shipped = AutoConfig.from_pretrained(demo_folder(name))
    trained = AutoConfig.from_pretrained(folders[0])
    same = {"hidden_size", "num_hidden_layers", "num_attention_heads", "model_type"}
    assert all(getattr(shipped, key) == getattr(trained, key) for key in same)


def test_the_masked_tokenizer_is_the_shipped_one():
    made = tokenization.masked_tokenizer(lexicon.known_words())
    shipped = json.loads((demo_folder("masked-lm") / "tokenizer.json").read_text("utf-8"))
    assert shipped["model"]["vocab"] == made.get_vocab()


def test_masking_prefers_determined_words():
    task = tasks.MaskedTask()
    task.read(Phase(0, 300, 0, 1, 1e-3))
    task.fit_tokenizer(0)
    task.encode()
    rows = list(range(300))
    labels = task.batch(rows, random.Random(0))["labels"]
    sites = [(row, position) for row in rows for position in task.sites[row]]
    at_sites = sum(labels[site] != tasks.IGNORED for site in sites) / len(sites)
    assert 0.25 < at_sites < 0.45


# ---- what they can do


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_card_is_reproduced(name):
    text = cards.card_path(name).read_text(encoding="utf-8")
    assert cards.training_block(name) in text
    written = cards.read_figures(text)
    measured = evaluate.evaluate(name)
    assert [table.columns for table in measured] == [table.columns for table in written]
    for found, said in zip(measured, written, strict=True):
        assert list(found.rows) == list(said.rows)
        for row, values in found.rows.items():
            assert _agree(row, values, said.rows[row]), (row, values, said.rows[row])


def _agree(row, found, said):
    *shares, count = found
    *said_shares, said_count = said
    tolerance = 0.02 if row.startswith("perplexity") else TOLERANCE
    near = (math.isclose(a, b, abs_tol=tolerance) for a, b in zip(shares, said_shares, strict=True))
    return count == said_count and all(near)


@pytest.mark.every
@pytest.mark.parametrize("name", ["causal-lm", "masked-lm"])
def test_language_models_are_good_enough(name):
    rows = cards.read_figures(cards.card_path(name).read_text("utf-8"))[0].rows
    assert rows["agreement, with an attractor"][0] >= 0.99
    assert rows["reflexive pronouns"][0] >= 0.99
    assert rows["facts, right answer first of all words"][0] >= 0.99
    assert rows["name copying, right name first of all words"][0] >= 0.95
    assert rows["verb changes when the cue's number is changed"][0] >= 0.99
    assert rows["verb changes when the attractors' number is changed"][0] <= 0.01


@pytest.mark.every
def test_the_translator_is_good_enough():
    exact, by_layer = cards.read_figures(cards.card_path("encoder-decoder").read_text("utf-8"))
    assert exact.rows["whole sentence right"][0] >= 0.85
    *layers, _ = by_layer.rows["sense"]
    assert layers[-1] >= 0.95
    assert layers[1] <= 0.80  # the meaning of an ambiguous noun needs depth


def test_card_tables_survive_writing():
    table = cards.Table(("figure", "value", "cases"), {"a": (0.5, 3), "b, c": (1.0, 0)})
    begin, end = "<!-- figures:begin -->\n", "\n<!-- figures:end -->"
    assert cards.read_figures(f"x {begin}{table.markdown()}{end} y") == [table]


def test_cards_are_written_as_they_stand_in_the_repository(tmp_path, monkeypatch):
    path = tmp_path / "card.md"
    monkeypatch.setattr(evaluate, "evaluate", lambda name, count=None: tables)
    for name in DEMO_NAMES:
        text = cards.card_path(name).read_text("utf-8")
        tables = cards.read_figures(text)
        path.write_text(text.replace("AdamW", "something").replace("| figure |", "| row |"))
        with monkeypatch.context() as patch:
            patch.setattr(cards, "card_path", lambda name: path)
            evaluate.main([name, "--write"])
        assert path.read_text("utf-8") == text


def test_evaluate_command_line(capsys):
    evaluate.main(["causal-lm", "--sentences", "40"])
    assert "agreement, with an attractor" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main(["causal-lm", "--sentences", "40", "--write"])


def test_importing_the_package_is_cheap():
    code = (
        "import sys, tl_contextmix.demo_models.grammar, tl_contextmix.demo_models.lexicon_fr;"
        "print([m for m in ('transformers', 'transformer_lens') if m in sys.modules])"
    )
    assert unchecked.run("-c", code).strip() == "[]"


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_scripts_start_from_the_top_folder(name):
    assert f"usage: {name}.py" in unchecked.run(f"scripts/demo_models/{name}.py", "--help")
