"""Every encoder layer through the decoder at once.

One pass gives the encoder's states e^0 .. e^L; they are rows of one batch for the decoder, in
pieces that fit ``max_bytes``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_contextmix.adapters import EncoderDecoder, Generated
from tl_contextmix.core.blocks import Side


@dataclass(frozen=True)
class _Piece:
    """Rows of the decoder's batch that fit together.

    Attributes:
        rows: Which sentence each row is of.
        memory: What the decoder reads.
        mask: Which positions of it are real.
        source: The tokens at these positions, one padding id where there are none; None for audio.
    """

    rows: Int[Tensor, " row"]
    memory: Float[Tensor, "row pos d_model"]
    mask: Bool[Tensor, "row pos"]
    source: Int[Tensor, "row pos"] | None

    def part(self, chosen: slice) -> _Piece:
        """Returns some of the rows."""
        source = None if self.source is None else self.source[chosen]
        return _Piece(self.rows[chosen], self.memory[chosen], self.mask[chosen], source)


@dataclass(frozen=True)
class Listening:
    """What is to be decoded from which layers.

    Attributes:
        model: The encoder-decoder.
        source: The tokens, or audio features [batch mel frame].
        layers: The layers, 0 (embeddings) to L.
        final_norm: Whether the encoder's final norm is applied, where there is one.
        max_bytes: Bound on what a batch of the decoder takes; one row at least is decoded.
        further: What else an encoder is given of each token (LED's global attention), by name.
    """

    model: EncoderDecoder
    source: Side | Tensor
    layers: tuple[int, ...]
    final_norm: bool
    max_bytes: int
    further: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of sentences."""
        return len(self.source.ids if isinstance(self.source, Side) else self.source)

    def generate(
        self, prompt: Int[Tensor, "batch prompt"] | None, max_new_tokens: int, num_beams: int
    ) -> Generated:
        """Decodes every sentence from every layer; rows are sentences by layers."""
        target = max_new_tokens + (1 if prompt is None else prompt.shape[1])
        found = []
        for piece in self._pieces(target, num_beams, all_logits=num_beams > 1):
            found.append(
                self.model.decoder.generate(
                    piece.memory,
                    piece.mask,
                    prompt=None if prompt is None else prompt[piece.rows].to(piece.memory.device),
                    max_new_tokens=max_new_tokens,
                    num_beams=num_beams,
                    source=piece.source,
                )
            )
        return _joined(found, self.model.decoder.pad)

    def logits(
        self, ids: Int[Tensor, "batch pos"]
    ) -> Iterator[tuple[Tensor, Float[Tensor, "row pos d_vocab"]]]:
        """Yields sentence numbers and the logits of decoder inputs, in the order of the rows."""
        for piece in self._pieces(ids.shape[1], 1, all_logits=True):
            logits = self.model.decoder.logits(piece.memory, piece.mask, ids[piece.rows])
            yield piece.rows, logits

    def judge(
        self, ids: Int[Tensor, "batch pos"], labels: Int[Tensor, "batch pos"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns how each layer judges given next tokens, every result [batch layer pos].

        Log-probabilities of the labels, KL(last layer || layer), how many tokens are more probable
        than the label, and the most probable token.
        """
        last = self.model.n_layers
        # The last layer comes first: the others are held against it.
        order = (last, *(layer for layer in self.layers if layer != last))
        found: list[list[Tensor]] = [[], [], [], []]
        final = torch.zeros(0)
        for rows, logits in replace(self, layers=order).logits(ids):
            for row, log_probs in zip(rows.tolist(), logits.log_softmax(-1), strict=True):
                if len(found[0]) % len(order) == 0:
                    final = log_probs
                right = labels[row].to(log_probs.device)[:, None]
                gold = log_probs.gather(-1, right)
                # Settings may rule tokens out: what has no probability adds nothing.
                terms = (final.exp() * (final - log_probs)).masked_fill(final == -torch.inf, 0)
                judged = (
                    gold[:, 0],
                    terms.sum(-1),
                    (log_probs > gold).sum(-1),
                    log_probs.argmax(-1),
                )
                for column, numbers in zip(found, judged, strict=True):
                    column.append(numbers.cpu())
        asked = [order.index(layer) for layer in self.layers]
        shape = (self.count, len(order))
        log_probs, kl, ranks, best = (
            torch.stack(column).unflatten(0, shape)[:, asked] for column in found
        )
        return log_probs, kl, ranks, best

    def _pieces(self, target: int, num_beams: int, *, all_logits: bool) -> Iterator[_Piece]:
        """Yields rows that fit together, those of one sentence one after the other."""
        source = self.source
        length = source.ids.shape[1] if isinstance(source, Side) else source.shape[-1]
        row = num_beams * self.model.decoder.bytes_per_row(length, target, all_logits=all_logits)
        fit = max(1, self.max_bytes // row)
        sentences = max(1, fit // len(self.layers))
        starts = range(0, self.count, sentences)
        for start in tqdm(starts, desc="decoding", delay=2, leave=False, disable=None):
            here = self._piece(torch.arange(start, min(start + sentences, self.count)))
            for first in range(0, len(here.rows), fit):
                yield here.part(slice(first, first + fit))

    def _piece(self, rows: Tensor) -> _Piece:
        """Returns what the decoder reads for sentences: a row per sentence and layer."""
        count = len(self.layers)
        if isinstance(self.source, Side):
            mask = self.source.mask[rows]
            # Padding that only other sentences need costs time.
            used = mask.any(0)
            mask, ids = mask[:, used], self.source.ids[rows][:, used]
            further = {name: value[rows][:, used] for name, value in self.further.items()}
            states = self.model.states(Side(ids, mask), **further)
            source = ids.masked_fill(~mask, self.model.decoder.pad).repeat_interleave(count, 0)
        else:
            states = self.model.states(self.source[rows])
            mask = torch.ones(states[0].shape[:2], dtype=torch.bool)
            source = None
        chosen = [states[layer] for layer in self.layers]
        norm = self.model.norm if self.final_norm else None
        chosen = chosen if norm is None else [norm(state) for state in chosen]
        return _Piece(
            rows=rows.repeat_interleave(count),
            memory=torch.stack(chosen, 1).flatten(0, 1),
            mask=mask.repeat_interleave(count, 0),
            source=source,
        )


def _joined(pieces: Sequence[Generated], pad: int) -> Generated:
    """Returns all rows, padded to the longest answer."""

    def rows(name: str, fill: Any) -> Tensor:
        tensors = [getattr(piece, name) for piece in pieces]
        width = max(tensor.shape[1] for tensor in tensors)
        filled = [
            torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)
            for tensor in tensors
        ]
        return torch.cat(filled).cpu()

    used = max(int(piece.mask.sum(1).max()) for piece in pieces)
    return Generated(
        ids=rows("ids", pad)[:, :used],
        mask=rows("mask", False)[:, :used],
        log_probs=rows("log_probs", 0.0)[:, :used],
        finished=torch.cat([piece.finished for piece in pieces]).cpu(),
        prompt=torch.cat([piece.prompt for piece in pieces]).cpu(),
        forced=pieces[0].forced,
    )
