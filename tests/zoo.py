"""The models of the tests: every family on every TransformerLens class that loads it.

All models are tiny, random and built offline. Every parameter is random, norm weights and biases
included: a default initialisation (ones and zeros) hides mistakes in the affine parts. The values
depend on a parameter's name and the seed alone, so one family has the same weights on every host
and under every version.

A new family is one row in `zoo_configs.py`; what must be refused is one in `zoo_refused.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
import zoo_build
import zoo_configs as rows
from torch import Tensor
from zoo_build import major
from zoo_refused import REFUSED, RefusedCase

__all__ = ["REFUSED", "RefusedCase", "major"]  # which are from elsewhere


@dataclass(frozen=True)
class Case:
    """One model of the zoo: a family on a TransformerLens class."""

    family: str
    host: str

    @property
    def id(self) -> str:
        """Name of the case in test ids and in EXPECTED."""
        return f"{self.family}-{self.host}"

    def __str__(self) -> str:
        return self.id

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model has two stacks, and its inputs a decoder part."""
        row = rows.FAMILIES.get(self.family)
        return row is not None and row.decoder_start is not None

    @property
    def both_ways(self) -> bool:
        """Whether the model has one stack, in which tokens read those behind them, too."""
        return self.family in ("bert", "roberta", "both_ways")


@dataclass(frozen=True)
class Inputs:
    """Token ids for a case: `tokens` [batch pos], and `decoder_tokens` for encoder-decoders."""

    tokens: Tensor
    decoder_tokens: Tensor | None = None


_KINDS = ("gpt2", "gptj", "mistral", "gemma2", "bert", "t5", "bart", "both_ways")


def cases() -> list[Case]:
    """Every case the installed TransformerLens can hold."""
    table = {name: row.hosts for name, row in rows.FAMILIES.items()}
    table |= dict.fromkeys(rows.CONFIG_BUILT, rows.CONFIG_BUILT_HOSTS)
    return [Case(name, host) for name, hosts in table.items() for host in hosts.get(major(), ())]


def spread() -> list[Case]:
    """The cases without families that a bridge of the newest version repeats in the same way.

    For what takes long: contract, goldens and identities go through `cases` on every version.
    """
    newest = major() == max(EXPECTED)
    return [c for c in cases() if newest or c.host != "TransformerBridge" or c.family in _KINDS]


def kinds() -> list[Case]:
    """A case for every kind of block, attention and stack; the other families repeat them.

    For what does not depend on the host, or on how a family is read from it.
    """
    return list({case.family: case for case in cases() if case.family in _KINDS}.values())


def processable(case: Case) -> bool:
    """Whether `build(case, processed=True)` means anything."""
    # LNPre is what a model looks like after folding; 2.18 cannot fold it again.
    return case.host in ("HookedTransformer", "TransformerBridge") and case.family != "ln_pre"


def build(
    case: Case,
    *,
    dtype: torch.dtype = torch.float64,
    processed: bool = False,
    seed: int = 0,
    tokenizer: bool = True,
) -> Any:
    """A fresh TransformerLens model of the case, in eval mode, on the CPU.

    Args:
        case: Which model; one of `cases()`.
        dtype: Of all parameters. From 3.x on, processing itself runs in float32, so a processed
            float64 model is 1e-6 off the unprocessed one.
        processed: TransformerLens' default weight processing: folded norms, centred writing weights
            and unembedding, folded value biases (compatibility mode on a bridge).
        seed: Other seeds give other weights.
        tokenizer: Whether the model gets the family's tokenizer.

    Raises:
        LookupError: If the installed version has no such case, or the case no weight processing.
    """
    if case not in cases():
        known = ", ".join(known.id for known in cases())
        raise LookupError(f"TransformerLens {major()} has no case {case}; it has {known}")
    if processed and not processable(case):
        raise LookupError(f"{case} has no weight processing; ask zoo.processable(case) first")
    with zoo_build.quiet(), torch.random.fork_rng(devices=[]):
        model = _load(case, dtype, processed, seed)
    if not tokenizer:
        model.tokenizer = None
    return model.eval()


@functools.cache
def _kept(case: Case, dtype: torch.dtype) -> tuple[Any, list[int]]:
    model = build(case, dtype=dtype)
    return model, _versions(model)


def _versions(model: Any) -> list[int]:
    return [model.training, *(weight._version for weight in model.parameters())]


def shared(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    """A model of the case that no test changes.

    Building one and examining it takes longer than most questions.
    """
    model, versions = _kept(case, dtype)
    assert _versions(model) == versions, f"a test has changed the shared model {case}"
    return model


def _load(case: Case, dtype: torch.dtype, processed: bool, seed: int) -> Any:
    if case.family in rows.CONFIG_BUILT:
        model = zoo_build.config_built(rows.CONFIG_BUILT[case.family], dtype=dtype, seed=seed)
        if processed:
            model.process_weights_()
        return model
    row = rows.FAMILIES[case.family]
    if case.host == "TransformerBridge":
        hf = hf_model(case.family, dtype=dtype, seed=seed)
        return zoo_build.bridge(hf, row.tokenizer, dtype=dtype, processed=processed)
    if case.host == "HookedEncoder":  # it reads a pooler, which only this class has
        row = dataclasses.replace(row, model="BertForPreTraining")
    hf = zoo_build.hugging_face(row.model, row.config, row.options, dtype=dtype, seed=seed)
    if case.family == "gemma2":
        return zoo_build.hooked_gemma2(hf, dtype=dtype, processed=processed)
    return zoo_build.hooked(hf, row.tokenizer, case.host, dtype=dtype, processed=processed)


def hf_model(family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """The Hugging Face model of a family, with the weights `build` gives its hosts.

    Attention is eager: the fused kernels return no attention pattern.

    Raises:
        LookupError: If the family is built from a TransformerLens config and has no such model.
    """
    if family not in rows.FAMILIES:
        raise LookupError(f"{family} has no Hugging Face model; {', '.join(rows.FAMILIES)} have")
    row = rows.FAMILIES[family]
    return zoo_build.hugging_face(row.model, row.config, row.options, dtype=dtype, seed=seed)


def hf_families() -> list[str]:
    """The families `hf_model` knows."""
    return list(rows.FAMILIES)


def inputs(case: Case, *, batch: int = 2) -> Inputs:
    """Random words for a case: 7 and 5 of them for encoder-decoders, 6 for all others."""
    generator = torch.Generator().manual_seed(1)

    def words(pos: int) -> Tensor:
        shape = (batch, pos)
        return torch.randint(rows.FIRST_WORD_ID, rows.D_VOCAB, shape, generator=generator)

    if not case.encoder_decoder:
        return Inputs(words(6))
    tokens, decoder_tokens = words(7), words(5)
    start = rows.FAMILIES[case.family].decoder_start
    assert start is not None
    decoder_tokens[:, 0] = start
    return Inputs(tokens, decoder_tokens)


def logits(model: Any, given: Inputs) -> Tensor:
    """The model's own logits [batch pos d_vocab], without gradients, on any host."""
    decoder = {} if given.decoder_tokens is None else {"decoder_input": given.decoder_tokens}
    with torch.no_grad():
        return model(given.tokens, **decoder)


_NORM, _ATTENTION = "norm", "attention"
FLOAT32_INSIDE: dict[tuple[str, str], frozenset[str]] = {
    (family, "TransformerBridge"): frozenset(parts)
    for family, parts in {
        "opt": {_ATTENTION},
        "gptj": {_ATTENTION},
        "llama": {_NORM, _ATTENTION},
        "llama_biased": {_NORM, _ATTENTION},
        "mistral": {_NORM, _ATTENTION},
        "mixtral": {_NORM, _ATTENTION},
        "qwen2": {_NORM, _ATTENTION},
        "gemma2": {_NORM, _ATTENTION},
        "olmo2": {_NORM, _ATTENTION},
        "t5": {_NORM},
        "flan": {_NORM},
    }.items()
}
"""Where a float64 model computes in float32 nevertheless: Hugging Face code that says so outright.

`norm`: the recomputed norm differs from the model's; `attention`: scores or softmax do, so the
pattern is off while pattern @ v = z still holds to float64. Against the same forward with every
float32 turned into float64, layer outputs are up to 7e-6 off where a norm is concerned (Flan-T5)
and up to 5e-7 where only the attention is. Rotary angles, in float32 everywhere, are not counted.
"""


OPAQUE_FEED_FORWARD = frozenset({"solu"})
"""Families without a slope per neuron (SoLU is a softmax over them): what is asked of their
attention has an answer, what is asked behind the feed-forward has none."""

CURVED_READOUT = frozenset({"bert", "roberta", "gemma2"})
"""Families whose logits are not linear in the stream: a masked-LM head, or a cap."""


def _ids(host: str, families: str) -> frozenset[str]:
    return frozenset(f"{family}-{host}" for family in families.split())


_HOOKED = _ids(
    "HookedTransformer",
    "gpt2 opt neox gptj llama mistral qwen2 gemma2 attn_only ln_pre parallel gqa no_norm solu "
    "both_ways",
) | _ids("HookedEncoder", "bert")
_BRIDGE = _ids(
    "TransformerBridge",
    "gpt2 opt neox gptj llama llama_biased mistral mixtral qwen2 gemma2 bert bart marian",
)
EXPECTED: dict[int, frozenset[str]] = {
    2: _HOOKED,
    3: _HOOKED | _BRIDGE | _ids("HookedEncoderDecoder", "t5"),
    4: _BRIDGE | _ids("TransformerBridge", "roberta olmo2 t5 flan mbart m2m100 pegasus"),
}
"""Case ids by major version of TransformerLens; written out, so coverage cannot shrink unseen."""
