"""Tokenizers of the demo models: one token per word of the grammar.

Each is made from the model's own sentences or words and saved as `tokenizer.json`, with a
hand-written `tokenizer_config.json`: what one version of transformers writes there, not every
version this package supports can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CAUSAL_END = "<|endoftext|>"
MASKED_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SEQ2SEQ_SPECIAL = ("<pad>", "</s>", "<unk>")
MAX_LENGTH = 64


def causal_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, as of GPT-2; one special token begins and ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        special_tokens=[CAUSAL_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def masked_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Makes a WordPiece tokenizer, as of BERT, that adds [CLS] and [SEP].

    Its vocabulary is written down, not trained: training WordPiece breaks ties by chance and gives
    another vocabulary every time. Unknown words fall apart into letters.
    """
    known = sorted(set(words))
    letters = sorted(set("".join(known)))
    pieces = [*MASKED_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    pieces += [word for word in known if word not in letters]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(MASKED_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def seq2seq_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains a BPE tokenizer on words with a leading "▁", as of T5, that adds </s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=list(SEQ2SEQ_SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


_SETTINGS: dict[str, dict[str, Any]] = {
    "causal-lm": {
        # transformers 4 would switch the prefix space of tokenizer.json off otherwise, and the
        # first word of a text would be split.
        "add_prefix_space": True,
        "bos_token": CAUSAL_END,
        "eos_token": CAUSAL_END,
        "pad_token": CAUSAL_END,
        "unk_token": CAUSAL_END,
    },
    "masked-lm": {
        # The general class loses [CLS] and [SEP] when TransformerLens loads it its own way.
        "tokenizer_class": "BertTokenizer",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "encoder-decoder": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}


def save_tokenizer(tokenizer: Tokenizer, name: str, folder: Path) -> None:
    """Writes the files from which transformers 4 and 5 load the tokenizer of demo `name`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        **_SETTINGS[name],
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
