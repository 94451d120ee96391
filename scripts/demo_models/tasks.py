"""What differs between the demo models while they are trained: data, tokenizer, model and loss."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import tokenization
import torch
import transformers
from grammar_fr import TranslationGrammar
from recipes import Phase
from tokenizers import Tokenizer
from torch import nn

from tl_contextmix.demo_models import DemoName
from tl_contextmix.demo_models.grammar import Grammar, known_words

IGNORED = -100
"""Label of positions that do not count in the loss."""

Batch = dict[str, torch.Tensor]


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Stacks rows of different lengths, filling up with `value` on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


class Task(ABC):
    """What differs between the three models.

    Attributes:
        tokenizer: Set by `fit_tokenizer`, shared by all phases.
        rows: Ids of the encoded sentences, set by `encode`.
    """

    tokenizer: Tokenizer
    rows: list[list[int]]

    @abstractmethod
    def read(self, phase: Phase) -> None:
        """Draws the sentences of a phase."""

    @abstractmethod
    def fit_tokenizer(self, sentences: int) -> None:
        """Makes the tokenizer, if need be from the first sentences drawn."""

    @abstractmethod
    def encode(self) -> None:
        """Encodes the sentences."""

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
        sentences = Grammar(phase.data_seed, "train", phase.shares).sentences(phase.sentences)
        self.texts = [sentence.text for sentence in sentences]

    def fit_tokenizer(self, sentences: int) -> None:
        self.tokenizer = tokenization.causal_tokenizer(self.texts[:sentences])

    def encode(self) -> None:
        end = self.tokenizer.token_to_id(tokenization.CAUSAL_END)
        assert end is not None
        self.rows = [[end, *e.ids, end] for e in self.tokenizer.encode_batch(self.texts)]

    def model(self) -> Any:
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
        chosen = [self.rows[row] for row in rows]
        return {"input_ids": padded(chosen, 0), "labels": padded(chosen, IGNORED)}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
        )


class MaskedTask(Task):
    """BERT with 4 layers, predicting masked words; determined words are masked more often."""

    site_rate = 0.35
    other_rate = 0.15

    def read(self, phase: Phase) -> None:
        grammar = Grammar(phase.data_seed, "train", phase.shares)
        self.sentences = grammar.sentences(phase.sentences)

    def fit_tokenizer(self, sentences: int) -> None:
        self.tokenizer = tokenization.masked_tokenizer(known_words())

    def encode(self) -> None:
        ids = self.tokenizer.get_vocab()
        first, last = ids["[CLS]"], ids["[SEP]"]
        self.rows = [[first, *(ids[w] for w in s.words), last] for s in self.sentences]
        self.sites = [{site.target + 1 for site in s.sites} for s in self.sentences]

    def model(self) -> Any:
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
        found = [self._mask(self.rows[row], self.sites[row], rng) for row in rows]
        ids = padded([inputs for inputs, _ in found], 0)
        labels = padded([labels for _, labels in found], IGNORED)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

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
        encoder, head = model.bert, model.cls
        hidden = encoder(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        # The head, the most expensive part, runs on the masked positions only.
        chosen = batch["labels"] != IGNORED
        return nn.functional.cross_entropy(head(hidden[chosen]), batch["labels"][chosen])


class Seq2SeqTask(Task):
    """T5 with 4 + 4 layers, translating English to French."""

    def read(self, phase: Phase) -> None:
        pairs = TranslationGrammar(phase.data_seed, "train").translations(phase.sentences)
        self.sources = [pair.source_text for pair in pairs]
        self.targets = [pair.target_text for pair in pairs]

    def fit_tokenizer(self, sentences: int) -> None:
        pairs = zip(self.sources[:sentences], self.targets[:sentences], strict=True)
        self.tokenizer = tokenization.seq2seq_tokenizer(text for pair in pairs for text in pair)

    def encode(self) -> None:
        self.rows = [e.ids for e in self.tokenizer.encode_batch(self.sources)]
        self.target_rows = [e.ids for e in self.tokenizer.encode_batch(self.targets)]

    def model(self) -> Any:
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
        ids = padded([self.rows[row] for row in rows], 0)
        labels = padded([self.target_rows[row] for row in rows], IGNORED)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return model(**batch, use_cache=False).loss


TASKS: dict[DemoName, type[Task]] = {
    "causal-lm": CausalTask,
    "masked-lm": MaskedTask,
    "encoder-decoder": Seq2SeqTask,
}
