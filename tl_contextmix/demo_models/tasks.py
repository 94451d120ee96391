"""What differs between the demo models while they are trained: data, tokenizer, model and loss."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn

from tl_contextmix.demo_models import DemoName, tokenization
from tl_contextmix.demo_models.grammar import Grammar, Sentence, known_words
from tl_contextmix.demo_models.grammar_fr import TranslationGrammar
from tl_contextmix.demo_models.recipes import Phase

IGNORED = -100
"""Label of positions that do not count in the loss."""

Batch = dict[str, torch.Tensor]


class Task(ABC):
    """What differs between the three models: data, tokenizer, architecture and loss.

    Attributes:
        tokenizer: Set by `fit_tokenizer`, shared by all phases.
    """

    tokenizer: Tokenizer

    @abstractmethod
    def read(self, phase: Phase) -> None:
        """Draws the sentences of a phase."""

    @abstractmethod
    def fit_tokenizer(self, sentences: int) -> None:
        """Makes the tokenizer, if need be from the first sentences drawn."""

    @abstractmethod
    def encode(self) -> list[int]:
        """Encodes the sentences; returns the length by which they are sorted into batches."""

    @abstractmethod
    def model(self) -> Any:
        """Returns the model with initial weights."""

    @abstractmethod
    def batch(self, rows: Sequence[int], rng: random.Random) -> Batch:
        """Builds one batch of the encoded sentences."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Returns the mean loss in nats per predicted token."""


class CausalTask(Task):
    """GPT-2 with 4 layers, predicting the next word."""

    def read(self, phase: Phase) -> None:
        """Draws the sentences of a phase."""
        grammar = Grammar(phase.data_seed, "train", phase.shares)
        self.texts = [grammar.sentence().text for _ in range(phase.sentences)]

    def fit_tokenizer(self, sentences: int) -> None:
        """Trains the tokenizer on the first sentences drawn."""
        self.tokenizer = tokenization.causal_tokenizer(self.texts[:sentences])

    def encode(self) -> list[int]:
        """Encodes the sentences; returns their lengths."""
        end = self.tokenizer.token_to_id(tokenization.CAUSAL_END)
        encodings = self.tokenizer.encode_batch(self.texts)
        self.rows = [[end, *encoding.ids, end] for encoding in encodings]
        return [len(row) for row in self.rows]

    def model(self) -> Any:
        """Returns the model with initial weights."""
        length = tokenization.MAX_LENGTH
        config: Any = transformers.GPT2Config(
            vocab_size=self.tokenizer.get_vocab_size(),
            n_positions=length,
            n_embd=128,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        config.n_ctx = length  # no field of GPT-2's any more, but HookedTransformer reads it
        model: Any = transformers.GPT2LMHeadModel(config)
        model.generation_config.pad_token_id = 0
        return model

    def batch(self, rows: Sequence[int], rng: random.Random) -> Batch:
        """Builds one batch."""
        chosen = [self.rows[row] for row in rows]
        return {"input_ids": _padded(chosen, 0), "labels": _padded(chosen, IGNORED)}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Returns the mean loss in nats per predicted token."""
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
        )


class MaskedTask(Task):
    """BERT with 4 layers, predicting masked words; determined words are masked more often."""

    site_rate = 0.35
    other_rate = 0.15

    def read(self, phase: Phase) -> None:
        """Draws the sentences of a phase."""
        grammar = Grammar(phase.data_seed, "train", phase.shares)
        self.sentences: list[Sentence] = grammar.sentences(phase.sentences)

    def fit_tokenizer(self, sentences: int) -> None:
        """Makes the tokenizer from the words of the grammar."""
        self.tokenizer = tokenization.masked_tokenizer(known_words())

    def encode(self) -> list[int]:
        """Encodes the sentences; returns their lengths."""
        vocabulary = self.tokenizer.get_vocab()
        first, last = vocabulary["[CLS]"], vocabulary["[SEP]"]
        self.rows = []
        self.sites = []
        for sentence in self.sentences:
            words = [vocabulary[word] for word in sentence.words]
            self.rows.append([first, *words, last])
            self.sites.append({site.target + 1 for site in sentence.sites})
        return [len(row) for row in self.rows]

    def model(self) -> Any:
        """Returns the model with initial weights."""
        config = transformers.BertConfig(
            vocab_size=self.tokenizer.get_vocab_size(),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=tokenization.MAX_LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
        )
        return transformers.BertForMaskedLM(config)

    def batch(self, rows: Sequence[int], rng: random.Random) -> Batch:
        """Builds one batch."""
        inputs, labels = [], []
        for row in rows:
            masked, wanted = self._mask(self.rows[row], self.sites[row], rng)
            inputs.append(masked)
            labels.append(wanted)
        ids = _padded(inputs, 0)
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "labels": _padded(labels, IGNORED),
        }

    def _mask(
        self, ids: list[int], sites: set[int], rng: random.Random
    ) -> tuple[list[int], list[int]]:
        """Masks 85 % of the chosen positions, puts a random word in 7 %, keeps 8 %."""
        size = self.tokenizer.get_vocab_size()
        special = len(tokenization.MASKED_SPECIAL)
        inputs, labels = list(ids), [IGNORED] * len(ids)
        for position in range(1, len(ids) - 1):
            rate = self.site_rate if position in sites else self.other_rate
            if rng.random() >= rate:
                continue
            labels[position] = ids[position]
            draw = rng.random()
            if draw < 0.85:
                inputs[position] = special - 1
            elif draw < 0.92:
                inputs[position] = rng.randrange(special, size)
        return inputs, labels

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Returns the mean loss in nats per predicted token."""
        encoder, head = model.bert, model.cls
        hidden = encoder(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        # The head, the most expensive part, runs on the masked positions only.
        chosen = batch["labels"] != IGNORED
        return nn.functional.cross_entropy(head(hidden[chosen]), batch["labels"][chosen])


class Seq2SeqTask(Task):
    """T5 with 4 + 4 layers, translating English to French."""

    def read(self, phase: Phase) -> None:
        """Draws the sentences of a phase."""
        pairs = TranslationGrammar(phase.data_seed, "train").translations(phase.sentences)
        self.sources = [pair.source_text for pair in pairs]
        self.targets = [pair.target_text for pair in pairs]

    def fit_tokenizer(self, sentences: int) -> None:
        """Trains the tokenizer on the first sentences drawn."""
        pairs = zip(self.sources[:sentences], self.targets[:sentences], strict=True)
        self.tokenizer = tokenization.seq2seq_tokenizer(text for pair in pairs for text in pair)

    def encode(self) -> list[int]:
        """Encodes the sentences; returns their lengths."""
        self.source_rows = [e.ids for e in self.tokenizer.encode_batch(self.sources)]
        self.target_rows = [e.ids for e in self.tokenizer.encode_batch(self.targets)]
        return [len(row) for row in self.source_rows]

    def model(self) -> Any:
        """Returns the model with initial weights."""
        config_class: Any = transformers.T5Config  # its signature hides the common fields
        config = config_class(
            vocab_size=self.tokenizer.get_vocab_size(),
            d_model=128,
            d_kv=32,
            d_ff=384,
            num_layers=4,
            num_decoder_layers=4,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            n_positions=tokenization.MAX_LENGTH,  # no field of T5's; HookedEncoderDecoder reads it
        )
        model = transformers.T5ForConditionalGeneration(config)
        # T5's own initial embeddings (standard deviation 1) are far too large for tied weights.
        with torch.no_grad():
            model.shared.weight.mul_(0.05 / model.shared.weight.std())
        return model

    def batch(self, rows: Sequence[int], rng: random.Random) -> Batch:
        """Builds one batch."""
        ids = _padded([self.source_rows[row] for row in rows], 0)
        labels = _padded([self.target_rows[row] for row in rows], IGNORED)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Returns the mean loss in nats per predicted token."""
        return model(**batch, use_cache=False).loss


TASKS: dict[DemoName, type[Task]] = {
    "causal-lm": CausalTask,
    "masked-lm": MaskedTask,
    "encoder-decoder": Seq2SeqTask,
}


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Stacks rows of different lengths, filling up with `value` on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
