"""Models on disk that every version of transformers loads, and texts of a given length for them."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import zoo_build
import zoo_configs

from tl_contextmix.demo_models import demo_folder

FAMILIES = "gpt2 opt neox gptj llama mistral qwen2 gemma2 bert t5 flan bart marian".split()
"""Rows of the tests' zoo."""

_SIZES = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_GPT2 = {"n_embd": 768, "n_head": 12, "n_positions": 128, "n_ctx": 128}
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", _GPT2 | {"n_layer": 2}),
    "GPT-NeoX": ("neox", _SIZES | {"max_position_embeddings": 128}),
    "Llama": ("llama", _SIZES | {"num_hidden_layers": 2, "max_position_embeddings": 128}),
    "BART": (
        "bart",
        {
            "d_model": 768,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
            "max_position_embeddings": 128,
        },
    ),
    "GPT-2, 12 layers, 50257 words": ("gpt2", _GPT2 | {"n_layer": 12, "vocab_size": 50257}),
}
"""Families and options: two layers per stack of GPT-2's and BERT's sizes and the zoo's 61 words,
and one model as it was published."""


@dataclass(frozen=True)
class Subject:
    """A model on disk.

    Attributes:
        name: Of the table's row.
        folder: Weights, configuration and tokenizer.
    """

    name: str
    folder: Path

    @property
    def config(self) -> Any:
        """Its configuration."""
        return transformers.AutoConfig.from_pretrained(self.folder)

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer; AutoTokenizer would take the family's and leave out the file's rules."""
        return transformers.PreTrainedTokenizerFast.from_pretrained(self.folder)

    def hugging_face(self, dtype: torch.dtype) -> Any:
        """Returns the model as transformers loads it."""
        cls = getattr(transformers, self.config.architectures[0])
        return cls.from_pretrained(self.folder, attn_implementation="eager").to(dtype).eval()

    def texts(self, n: int) -> dict[str, str]:
        """Returns random words, as many as make inseq look at ``n`` tokens on every side."""
        tokenizer = self.tokenizer
        frame = len(tokenizer("").input_ids)
        words = sorted({tokenizer.decode([i]).strip() for i in range(len(tokenizer))})
        words = [
            word
            for word in words
            if word.isalpha() and len(tokenizer(f"{word} {word}").input_ids) == 2 + frame
        ]
        draw = random.Random(n)
        if not self.config.is_encoder_decoder:
            return {"text": " ".join(draw.choices(words, k=n + 1 - frame))}
        source, target = (" ".join(draw.choices(words, k=n - frame)) for _ in range(2))
        return {"text": source, "target": target}

    def ids(self, texts: dict[str, str]) -> list[Tensor]:
        """Returns the token ids [1, pos] that inseq looks at: the encoder's and the decoder's.

        It leaves out the last token, of the decoder's side where there are two, which gets a start
        token.
        """
        ids = [self.tokenizer(text, return_tensors="pt").input_ids for text in texts.values()]
        if self.config.is_encoder_decoder:
            start = torch.full((1, 1), self.config.decoder_start_token_id)
            ids[1] = torch.cat([start, ids[1]], dim=1)
        return [*ids[:-1], ids[-1][:, :-1]]


def demos() -> list[Subject]:
    """Returns the models that ship with the package, without the masked one."""
    names = ("causal-lm", "encoder-decoder")
    return [Subject(f"embedded {name}", demo_folder(name)) for name in names]


def saved(name: str, family: str, options: dict[str, Any], folder: Path) -> Subject:
    """Saves a random model of the zoo and returns it.

    Args:
        name: Of the subject.
        family: Its row in the zoo.
        options: Configuration arguments that differ from the row's.
        folder: Where; it need not exist.
    """
    row = zoo_configs.FAMILIES[family]
    options = row.options | options
    with zoo_build.quiet():
        model = zoo_build.hugging_face(row.model, row.config, options, dtype=torch.float32, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    # The zoo's spread suits its width; a wider model's softmax would saturate.
                    parameter.mul_((zoo_configs.D_MODEL / model.config.hidden_size) ** 0.5)
        model.save_pretrained(folder)
    zoo_build.load_tokenizer(row.tokenizer).save_pretrained(folder)
    # What transformers 5 writes is not what 4 reads; the arguments are the same.
    config = {"model_type": model.config.model_type, "architectures": [row.model], **options}
    (folder / "config.json").write_text(json.dumps(config))
    return Subject(name, folder)
