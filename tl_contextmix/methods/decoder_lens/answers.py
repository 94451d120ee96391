"""What the decoder says, or thinks of an answer, from each layer, as results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tl_contextmix.adapters import EncoderDecoder
from tl_contextmix.adapters.inputs import pad_rows
from tl_contextmix.core.blocks import Side
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.decoder_lens.layerwise_decoder import Listening
from tl_contextmix.results import (
    LayerwiseDecoding,
    LayerwiseLikelihood,
    LayerwiseScores,
    Provenance,
    Tokens,
)

_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Lens:
    """What was asked, checked against the model.

    Attributes:
        listening: What is decoded from which layers.
        inputs: The inputs as text.
        prompt: The decoder's prompt.
        prompted: Whether it was given, or is Whisper's: nothing is then forced after it.
        references: The right answers, or None.
        max_new_tokens: Longest answer, or None.
        num_beams: 1 for greedy decoding.
        provenance: Where the results come from.
    """

    listening: Listening
    inputs: tuple[str, ...]
    prompt: Side
    prompted: bool
    references: tuple[str, ...] | None
    max_new_tokens: int | None
    num_beams: int
    provenance: Provenance

    @property
    def model(self) -> EncoderDecoder:
        """The model."""
        return self.listening.model

    def generate(self) -> LayerwiseDecoding:
        """Decodes freely from every layer."""
        generated = self.listening.generate(self._even_prompt(), self._length(), self.num_beams)
        shape = (len(self.inputs), len(self.listening.layers))
        ids, mask = generated.ids.unflatten(0, shape), generated.mask.unflatten(0, shape)
        content = mask & ~torch.isin(ids, torch.tensor(sorted(self.model.special)))
        return LayerwiseDecoding(
            ids=ids,
            mask=mask,
            log_probs=generated.log_probs.unflatten(0, shape),
            finished=generated.finished.unflatten(0, shape),
            content=content,
            strings=_strings(self.model.to_string, ids),
            texts=tuple(
                tuple(
                    self.model.to_text(row[real].tolist())
                    for row, real in zip(rows, reals, strict=True)
                )
                for rows, reals in zip(ids, content, strict=True)
            ),
            layers=self.listening.layers,
            depth=self.model.n_layers,
            inputs=self.inputs,
            references=self.references,
            provenance=self.provenance,
        )

    def forced(self) -> LayerwiseLikelihood:
        """Judges the references, or the model's own final output, from every layer."""
        whole, mask, first = self._answers()
        ids, labels, real = whole[:, :-1], whole[:, 1:], mask[:, 1:].clone()
        real[:, : first - 1] = False
        _require_length(self.model, ids.shape[1], "references")
        judged = self.listening.judge(ids, labels)
        log_probs, kl, ranks, predictions = (numbers[..., first - 1 :] for numbers in judged)
        labels, real = labels[:, first - 1 :], real[:, first - 1 :]
        hidden = ~real[:, None]
        return LayerwiseLikelihood(
            log_probs=log_probs.masked_fill(hidden, 0),
            kl=kl.masked_fill(hidden, 0),
            ranks=ranks.masked_fill(hidden, 0),
            predictions=predictions,
            strings=_strings(self.model.to_string, predictions),
            layers=self.listening.layers,
            target=_tokens(self.model, labels, real),
            inputs=self.inputs,
            provenance=self.provenance,
        )

    def scores(self, wanted: list[int]) -> LayerwiseScores:
        """Scores a few next tokens from every layer."""
        prompt = self.prompt
        _require_length(self.model, prompt.ids.shape[1], "decoder_input")
        last = prompt.mask.sum(1) - 1
        logits = torch.cat(
            [
                piece[torch.arange(len(rows)), last[rows]].cpu()
                for rows, piece in self.listening.logits(prompt.ids)
            ]
        ).unflatten(0, (len(self.inputs), len(self.listening.layers)))
        return LayerwiseScores(
            logits=logits[..., wanted],
            log_probs=logits.log_softmax(-1)[..., wanted],
            tokens=tuple(wanted),
            strings=tuple(self.model.to_string(token) for token in wanted),
            layers=self.listening.layers,
            inputs=self.inputs,
            provenance=self.provenance,
        )

    def _answers(self) -> tuple[Tensor, Tensor, int]:
        """Returns what the decoder is to see and say, its mask, and where the answer begins."""
        if self.references is not None:
            rows = [
                [*prompt, *self.model.encode_target(text, True)]
                for prompt, text in zip(self.prompt.ids.tolist(), self.references, strict=True)
            ]
            side = pad_rows(rows, self.model.decoder.pad)
            return side.ids, side.mask, self.prompt.ids.shape[1]
        last = replace(self.listening, layers=(self.model.n_layers,))
        generated = last.generate(self._even_prompt(), self._length(), self.num_beams)
        ids = torch.cat([generated.prompt, generated.ids], dim=1)
        mask = torch.cat(
            [torch.ones_like(generated.prompt, dtype=torch.bool), generated.mask], dim=1
        )
        return ids, mask, generated.prompt.shape[1] + generated.forced

    def _even_prompt(self) -> Tensor | None:
        """Returns what the decoder has said so far, the same number of tokens in every row.

        None where the model's settings say it, which count what they force as said.
        """
        if not self.prompted:
            return None
        if not bool(self.prompt.mask.all()):
            raise InvalidInput(
                "decoding cannot go on from these beginnings",
                f"decoder inputs of {sorted(set(self.prompt.mask.sum(1).tolist()))} tokens",
                "as many tokens in every row",
                "Call once for each length.",
            )
        return self.prompt.ids

    def _length(self) -> int:
        """Returns how many tokens may be said."""
        bound = self.model.decoder.n_ctx
        used = self.prompt.ids.shape[1] if self.prompted else 1
        room = None if bound is None else bound - used
        wanted = self.max_new_tokens
        if wanted is None:
            wanted = _MAX_NEW_TOKENS if room is None else min(_MAX_NEW_TOKENS, room)
        if room is not None and not 0 < wanted <= room:
            raise InvalidInput(
                "the decoder cannot say as much",
                f"max_new_tokens={self.max_new_tokens} after {used} tokens",
                f"at most {bound} tokens together, the longest text of this model",
                "Lower max_new_tokens.",
            )
        return wanted


def _require_length(model: EncoderDecoder, length: int, name: str) -> None:
    bound = model.decoder.n_ctx
    if bound is not None and length > bound:
        raise InvalidInput(
            f"the {name} cannot be run",
            f"{length} tokens",
            f"at most {bound}, the longest text of this model",
            "Shorten it; nothing is cut off silently.",
        )


def _strings(
    to_string: Callable[[int], str], ids: Tensor
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    known = {token: to_string(token) for token in ids.unique().tolist()}
    return tuple(tuple(tuple(known[i] for i in row) for row in rows) for rows in ids.tolist())


def _tokens(model: EncoderDecoder, ids: Tensor, mask: Tensor) -> Tokens:
    strings = _strings(model.to_string, ids[None])[0]
    spaced = None if model.view is None else model.view.spaced()
    sides = (("decoder", ids.shape[1]),)
    return Tokens(ids=ids, strings=strings, mask=mask, sides=sides, spaced=spaced)
