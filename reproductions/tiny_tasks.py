"""Encoder-decoders for the domains of DecoderLens, small enough to be trained here in a minute."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
LAYERS = 4
_WIDTH: dict[str, Any] = {"d_model": 64, "num_heads": 4, "d_kv": 16, "d_ff": 256}


@dataclass(frozen=True)
class Example:
    """One input of a task.

    Attributes:
        source: Its words.
        target: Words of a right answer.
        kind: What solving it takes.
    """

    source: str
    target: str
    kind: str


Draw = Callable[[random.Random], Example]

PEOPLE = "anna bob carol".split()
PLACES = "kitchen garden office cellar".split()
THINGS = "ball book".split()
VARIABLES = "abc"


def question(draw: random.Random) -> Example:
    """Returns who is where, and where a person or what a person holds is: one step, or two."""
    people, thing = draw.sample(PEOPLE, 2), draw.choice(THINGS)
    places = draw.sample(PLACES, 2)
    told = [f"{who} {where}" for who, where in zip(people, places, strict=True)]
    holder = draw.randrange(2)
    told.append(f"{thing} {people[holder]}")
    draw.shuffle(told)
    if draw.random() < 0.5:
        asked = draw.randrange(2)
        return Example(f"{people[asked]} ? {' '.join(told)}", places[asked], "one step")
    return Example(f"{thing} ? {' '.join(told)}", places[holder], "two steps")


def formula(draw: random.Random) -> Example:
    """Returns a satisfiable formula in Polish notation, and an assignment that satisfies it."""
    while True:
        words = _formula(draw, 2)
        names = sorted({*words} & {*VARIABLES})
        for number in range(2 ** len(names)):
            values = {name: bool(number >> i & 1) for i, name in enumerate(names)}
            if evaluate(words, values):
                answer = " ".join(f"{name} {int(value)}" for name, value in values.items())
                return Example(" ".join(words), answer, f"{len(names)} variables")


def _formula(draw: random.Random, depth: int) -> list[str]:
    kind = draw.random()
    if depth == 0 or kind < 0.1:
        return [*["!"] * (draw.random() < 0.5), draw.choice(VARIABLES)]
    operator = "&" if kind < 0.6 else "|"
    return [operator, *_formula(draw, depth - 1), *_formula(draw, depth - 1)]


def evaluate(words: Sequence[str], values: dict[str, bool]) -> bool:
    """Returns whether an assignment makes a formula in Polish notation true."""

    def read(at: int) -> tuple[bool, int]:
        word = words[at]
        if word == "!":
            value, at = read(at + 1)
            return not value, at
        if word in "&|":
            left, at = read(at + 1)
            right, at = read(at)
            return (left and right) if word == "&" else (left or right), at
        return values[word], at + 1

    return read(0)[0]


def tokenizer_of(words: Sequence[str]) -> Any:
    """Returns a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate([PAD, END, UNKNOWN, *sorted({*words})])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def train_text(draw: Draw, steps: int, seed: int = 0) -> tuple[Any, Any]:
    """Returns a T5 that was trained on a task, and its tokenizer."""
    rng = random.Random(seed)
    known = [draw(rng) for _ in range(2000)]
    tokenizer = tokenizer_of([w for one in known for w in f"{one.source} {one.target}".split()])
    torch.manual_seed(seed)
    some: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        num_layers=LAYERS,
        num_decoder_layers=1,
        dropout_rate=0.0,
        **some,
        **_WIDTH,
    )
    model = transformers.T5ForConditionalGeneration(config)

    def loss() -> torch.Tensor:
        some = [draw(rng) for _ in range(64)]
        given = tokenizer([one.source for one in some], padding=True, return_tensors="pt")
        right = tokenizer([one.target for one in some], padding=True, return_tensors="pt").input_ids
        labels = right.masked_fill(right == 0, -100)
        return model(
            input_ids=given.input_ids, attention_mask=given.attention_mask, labels=labels
        ).loss

    return _trained(model, loss, steps), tokenizer


def _trained(model: Any, loss: Callable[[], torch.Tensor], steps: int) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    model.train()
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


DIGITS = "zero one two three four five".split()
MELS, FRAMES = 12, 32


def tones(draw: random.Random) -> tuple[torch.Tensor, str]:
    """Returns the features [mel, frame] of two to four tones with noise, and their names."""
    said = [draw.randrange(len(DIGITS)) for _ in range(draw.randint(2, 4))]
    features = torch.randn(MELS, 2 * FRAMES, generator=_generator(draw)) * 0.7
    at = 0
    for number in said:
        at += draw.randint(2, 5)
        end = at + draw.randint(6, 9)
        # A tone and its first harmonic.
        features[number, at:end] += 1.5
        features[number + len(DIGITS), at:end] += 0.75
        at = end
    return features, " ".join(DIGITS[number] for number in said)


def _generator(draw: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(draw.randrange(2**31))


def train_speech(steps: int, seed: int = 0) -> tuple[Any, Any]:
    """Returns a Whisper that names tones, and its tokenizer."""
    rng, tokenizer = random.Random(seed), tokenizer_of(DIGITS)
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=MELS,
        max_source_positions=FRAMES,
        max_target_positions=12,
        d_model=64,
        encoder_layers=LAYERS,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config)

    def loss() -> torch.Tensor:
        some = [tones(rng) for _ in range(32)]
        ids = tokenizer([text for _, text in some], padding=True, return_tensors="pt").input_ids
        labels = ids.masked_fill(ids == 0, -100)
        return model(input_features=torch.stack([x for x, _ in some]), labels=labels).loss

    return _trained(model, loss, steps), tokenizer
