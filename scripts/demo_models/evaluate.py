"""Measures the shipped weights: ``python scripts/demo_models/evaluate.py causal-lm``.

Prints the tables of the model card; ``--write`` puts them into the card. All sentences come from
the test split, with a seed that no training phase uses, so that they are new to the models and the
same every time. The models are run by transformers alone, on the processor, in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from cards import Table, Values, figures_block, write_card
from grammar_fr import Translation, TranslationGrammar
from tasks import padded
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from tl_contextmix.demo_models import DEMO_NAMES, DemoName, demo_folder, lexicon
from tl_contextmix.demo_models.grammar import MAX_WORDS, Grammar, Sentence, Shares, Site

DEFAULT_SENTENCES = {"causal-lm": 2000, "masked-lm": 2000, "encoder-decoder": 600}
FLIPPED_SENTENCES = 200
TEST_SHARES = Shares(agreement=0.45, reflexive=0.15, fact=0.20)
TEST_SEED = 99
FLIP_SEED = 5
TRANSLATION_SEED = 77
MAX_NEW_TOKENS = 30
BATCH = 200


def evaluate(name: DemoName, sentences: int | None = None) -> list[Table]:
    """Returns the tables of the model card of `name`, measured now.

    Args:
        name: The demo model.
        sentences: How many test sentences; default as in the card.
    """
    count = sentences or DEFAULT_SENTENCES[name]
    with torch.no_grad():
        if name == "encoder-decoder":
            return _evaluate_translation(count)
        return [_evaluate_language_model(name, count)]


# ---- causal and masked language model


@dataclass(frozen=True)
class _Question:
    """Which of two words does the model prefer at a position?"""

    words: tuple[str, ...]
    target: int
    right: str
    wrong: str


@dataclass(frozen=True)
class _Answer:
    prefers_right: bool
    top_is_right: bool


class _LanguageModel:
    """A demo language model and the ids of the grammar's words."""

    def __init__(self, name: DemoName) -> None:
        folder = demo_folder(name)
        self.masked = name == "masked-lm"
        causal, masked = transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM
        auto = masked if self.masked else causal
        self.model: Any = auto.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        vocabulary = tokenizer.get_vocab()
        space = "" if self.masked else "Ġ"
        self.ids = {word: vocabulary[space + word] for word in lexicon.known_words()}
        self.tokenizer = tokenizer

    def encode(self, words: Sequence[str]) -> list[int]:
        """Ids of a sentence between its special tokens."""
        ids = [self.ids[word] for word in words]
        if self.masked:
            return [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id]
        return [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]

    def answer(self, questions: Sequence[_Question]) -> list[_Answer]:
        """Answers all questions."""
        answers: list[_Answer] = []
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            scores = self._scores(batch)
            right = torch.tensor([self.ids[question.right] for question in batch])
            wrong = torch.tensor([self.ids[question.wrong] for question in batch])
            row = torch.arange(len(batch))
            prefers = (scores[row, right] > scores[row, wrong]).tolist()
            top = (scores.argmax(-1) == right).tolist()
            answers += map(_Answer, prefers, top)
        return answers

    def _scores(self, batch: Sequence[_Question]) -> Tensor:
        """Logits over the vocabulary for the target position of each question."""
        rows = [self.encode(question.words) for question in batch]
        targets = torch.tensor([question.target + 1 for question in batch])
        if self.masked:
            for row, question in zip(rows, batch, strict=True):
                row[question.target + 1] = self.tokenizer.mask_token_id
            positions = targets
        else:
            positions = targets - 1  # the logits that predict the target
        ids, mask = _padded(rows, self.tokenizer.pad_token_id)
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return logits[torch.arange(len(rows)), positions]

    def perplexity(self, sentences: Sequence[Sentence]) -> tuple[float, int]:
        """Returns exp(mean negative log-probability per token) and the number of tokens."""
        total, count = 0.0, 0
        for start in range(0, len(sentences), BATCH):
            rows = [self.encode(sentence.words) for sentence in sentences[start : start + BATCH]]
            ids, mask = _padded(rows, self.tokenizer.pad_token_id)
            log_probs = self.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
            found = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            total -= float((found * mask[:, 1:]).sum())
            count += int(mask[:, 1:].sum())
        return float(torch.tensor(total / count).exp()), count


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns ids filled up on the right, and the mask of the real ones."""
    return padded(rows, pad), padded([[1] * len(row) for row in rows], 0)


_Condition = Callable[[Site], bool]
_PREFERENCE_ROWS: dict[str, _Condition] = {
    "agreement": lambda s: s.kind == "agreement",
    "agreement, with an attractor": lambda s: s.kind == "agreement" and bool(s.lures),
    "agreement, with an attractor, noun-verb pair never seen": (
        lambda s: s.kind == "agreement" and bool(s.lures) and s.held_out
    ),
    "reflexive pronouns": lambda s: s.kind == "reflexive",
    "reflexive pronouns, with an attractor": lambda s: s.kind == "reflexive" and bool(s.lures),
    "determiner and noun": lambda s: s.kind == "determiner",
    "name copying": lambda s: s.kind == "name",
}
"""Share of minimal pairs in which the model prefers the right word."""

_RECALL_ROWS: dict[str, _Condition] = {
    "name copying, right name first of all words": lambda s: s.kind == "name",
    "facts, right answer first of all words": lambda s: s.kind == "fact" and not s.held_out,
    "facts of two steps never seen, right answer first": (
        lambda s: s.kind == "fact" and s.held_out
    ),
}
"""Share of sites where the right word is the most probable of the vocabulary."""


def _evaluate_language_model(name: DemoName, count: int) -> Table:
    model = _LanguageModel(name)
    sentences = Grammar(TEST_SEED, "test", TEST_SHARES).sentences(count)
    pairs = [(sentence, site) for sentence in sentences for site in sentence.sites]
    answers = model.answer([_question(sentence, site) for sentence, site in pairs])
    sites = [site for _, site in pairs]
    rows: dict[str, Values] = {}
    for title, condition in _PREFERENCE_ROWS.items():
        hits = [a.prefers_right for a, s in zip(answers, sites, strict=True) if condition(s)]
        rows[title] = _share(hits)
    for title, condition in _RECALL_ROWS.items():
        hits = [a.top_is_right for a, s in zip(answers, sites, strict=True) if condition(s)]
        rows[title] = _share(hits)
    rows.update(_causal_checks(model))
    if not model.masked:
        rows["perplexity per token"] = model.perplexity(sentences)
    return Table(("figure", "value", "cases"), rows)


def _share(hits: Sequence[bool]) -> tuple[float, int]:
    return (sum(hits) / len(hits) if hits else float("nan")), len(hits)


def _question(sentence: Sentence, site: Site) -> _Question:
    words = sentence.words
    return _Question(tuple(words), site.target, words[site.target], site.wrong)


def _causal_checks(model: _LanguageModel) -> dict[str, Values]:
    """Does the model use the cue? Changes the number of cue or lures, keeps everything else."""
    items = list(_flippable(FLIPPED_SENTENCES))
    cue = [_with_flipped(sentence, site, site.cues) for sentence, site in items]
    lure = [_with_flipped(sentence, site, site.lures) for sentence, site in items]
    cue_flips = [not answer.prefers_right for answer in model.answer(cue)]
    lure_flips = [not answer.prefers_right for answer in model.answer(lure)]
    return {
        "verb changes when the cue's number is changed": _share(cue_flips),
        "verb changes when the attractors' number is changed": _share(lure_flips),
    }


def _flippable(count: int) -> Iterator[tuple[Sentence, Site]]:
    """Sentences with a verb, one cue, and attractors, whose nouns all stand behind "the"."""
    grammar = Grammar(FLIP_SEED, "test")
    while count:
        sentence = grammar.agreement()
        sites = [
            site
            for site in sentence.sites
            if site.subtype in ("pp1", "pp2", "orc") and site.lures and len(site.cues) == 1
        ]
        free = sites and all(sentence.words[index - 1] == "the" for index in sites[0].lures)
        if free and "and" not in sentence.words and len(sentence.words) <= MAX_WORDS:
            count -= 1
            yield sentence, sites[0]


def _with_flipped(sentence: Sentence, site: Site, indices: Sequence[int]) -> _Question:
    words = list(sentence.words)
    for index in indices:
        words[index] = lexicon.OTHER_NUMBER[words[index]]
    return _Question(tuple(words), site.target, sentence.words[site.target], site.wrong)


# ---- encoder-decoder


class _Translator:
    """The translation model, read after any layer of its encoder."""

    def __init__(self) -> None:
        folder = demo_folder("encoder-decoder")
        self.model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Padded ids and their mask."""
        return _padded(self.tokenizer(list(texts))["input_ids"], self.tokenizer.pad_token_id)

    def encoder_layers(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """The encoder's output as if it ended after 0, 1, ... layers, its final norm applied."""
        states = self.model.encoder(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states
        # transformers has applied the final norm to the last state already
        return [*map(self.model.encoder.final_layer_norm, states[:-1]), states[-1]]

    def translate(self, ids: Tensor, mask: Tensor) -> list[list[int]]:
        """Greedy translations, without start, padding and end."""
        found = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            num_beams=1,
            do_sample=False,
        )
        special = {self.tokenizer.pad_token_id, self.tokenizer.eos_token_id}
        return [[token for token in row if token not in special] for row in found.tolist()]

    def forced_hits(self, hidden: Tensor, mask: Tensor, target: Tensor, real: Tensor) -> Tensor:
        """Where the right token is the most probable, given the right tokens before it."""
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=mask,
            labels=target.masked_fill(real == 0, -100),
        ).logits
        return logits.argmax(-1) == target


def _evaluate_translation(count: int) -> list[Table]:
    model = _Translator()
    pairs = TranslationGrammar(TRANSLATION_SEED, "test").translations(count)
    exact: list[bool] = []
    hits: dict[str, list[list[bool]]] = defaultdict(list)
    for start in range(0, count, BATCH):
        batch = pairs[start : start + BATCH]
        exact += _exact_matches(model, batch)
        for context, by_layer in _hits_by_context(model, batch):
            hits[context].append(by_layer)
    layers = len(next(iter(hits.values()))[0])
    columns = ("kind of French word", *(f"layer {k}" for k in range(layers)), "cases")
    rows = {
        context.replace("_", " "): (
            *(sum(column) / len(column) for column in zip(*found, strict=True)),
            len(found),
        )
        for context, found in sorted(hits.items())
    }
    return [
        Table(("figure", "value", "cases"), {"whole sentence right": _share(exact)}),
        Table(columns, rows),
    ]


def _exact_matches(model: _Translator, batch: Sequence[Translation]) -> list[bool]:
    wanted = model.tokenizer([pair.target_text for pair in batch])["input_ids"]
    found = model.translate(*model.ids([pair.source_text for pair in batch]))
    return [translation == row[:-1] for translation, row in zip(found, wanted, strict=True)]


def _hits_by_context(
    model: _Translator, batch: Sequence[Translation]
) -> Iterator[tuple[str, list[bool]]]:
    """Yields for every French word its kind, and per encoder layer whether it is predicted."""
    ids, mask = model.ids([pair.source_text for pair in batch])
    target, real = model.ids([pair.target_text for pair in batch])
    layers = model.encoder_layers(ids, mask)
    hits = torch.stack([model.forced_hits(hidden, mask, target, real) for hidden in layers])
    for row, pair in enumerate(batch):
        for position, context in enumerate(pair.contexts):
            yield context, hits[:, row, position].tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Measure a demo model.")
    parser.add_argument("name", choices=DEMO_NAMES)
    parser.add_argument("--sentences", type=int, help="number of test sentences")
    parser.add_argument("--write", action="store_true", help="update the model card")
    options = parser.parse_args(arguments)
    if options.write and options.sentences:
        parser.error("--write takes the card's own number of sentences; leave --sentences away")
    torch.set_num_threads(1)
    tables = evaluate(options.name, options.sentences)
    sys.stdout.write(figures_block(tables) + "\n")
    if options.write:
        write_card(options.name, tables)


if __name__ == "__main__":
    main()
