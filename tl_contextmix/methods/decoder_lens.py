"""DecoderLens: what an encoder-decoder says when its decoder reads an earlier encoder layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tl_contextmix.errors import InvalidInput, four_parts
from tl_contextmix.hosts import EncoderDecoder, as_encoder_decoder
from tl_contextmix.inputs import Given, PaddingSide, Text, make_batch, package_version
from tl_contextmix.layerwise import Listening
from tl_contextmix.model_view import Side, describe
from tl_contextmix.results import (
    LIKELIHOOD_METRICS,
    LayerCurves,
    LayerwiseDecoding,
    LayerwiseLikelihood,
    LayerwiseScores,
    MetricChoice,
    Provenance,
    Tokens,
)
from tl_contextmix.results.axes import layer_positions, require_choice
from tl_contextmix.sequences import words

Mode = Literal["generate", "teacher_forced", "scores"]
Layerwise = LayerwiseDecoding | LayerwiseLikelihood | LayerwiseScores | LayerCurves
_MAX_NEW_TOKENS = 64


def decoder_lens(
    model: object,
    input: Text | Tensor,
    references: Text | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    mode: Mode = "generate",
    metric: MetricChoice | None = None,
    categories: Sequence[str] | Sequence[Sequence[str]] | None = None,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    final_norm: bool = True,
    decoder_input: Text | Tensor | None = None,
    tokens: Sequence[int] | Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    padding_side: PaddingSide = "right",
    tokenizer: Any = None,
    max_bytes: int = 2**30,
) -> Layerwise:
    r"""Returns what the decoder says, or thinks of an answer, after each encoder layer.

    .. math:: \mathrm{DecoderLens}_l(y_{<t}) = \mathrm{Dec}(\mathrm{LN}_f(e^l),\, y_{<t}),
        \qquad l = 0, \dots, L

    with :math:`e^0` the embeddings, :math:`e^l` the encoder's residual stream after block ``l`` and
    :math:`\mathrm{LN}_f` its final norm, where the architecture has one (T5, mBART, M2M100,
    Pegasus, Whisper; BART and Marian have none). Every decoder layer reads this one state. It is
    the model with the encoder blocks behind ``l`` removed; at ``l = L`` it is the model itself
    (Langedijk et al. 2024). Nothing is trained.

    Args:
        model: A HookedEncoderDecoder (TransformerLens 3), an encoder-decoder on a
            TransformerBridge, or a Hugging Face Whisper model, which TransformerLens has no class
            for.
        input: A text, several, or token ids [batch, pos]; for Whisper features [batch, mel, frame].
        references: The right answers, one per input.
        layers: Encoder layers, 0 (the embeddings) to L, negative from the end; None for all. Each
            is asked once, in their order.
        mode: ``"generate"``: free decoding. ``"teacher_forced"``: how the decoder judges the
            references, or the model's own final output where there are none. ``"scores"``:
            logits of the next ``tokens``.
        metric: Return curves over the data set instead: names of `LayerwiseDecoding.metrics` or
            of `LayerwiseLikelihood.metrics` (``"gold NLL"``, ``"KL"``, ``"accuracy"``), a function
            of output, reference and source, or several by name.
        categories: With ``metric``: a category per input, or per token (teacher-forced metrics).
        max_new_tokens: Longest output; None for 64, or what the model's context allows. An output
            that ran into it is marked (`LayerwiseDecoding.truncated`).
        num_beams: 1 for greedy decoding, more for beam search as in transformers. Other settings
            (forced first token, suppressed tokens) are those of the model's ``generation_config``.
        final_norm: Whether to apply the encoder's final norm, where there is one.
        decoder_input: What the decoder has said so far, as text, texts or token ids; None for its
            start token. Not with ``"teacher_forced"`` references, nor for speech.
        tokens: Ids, or words of one token each, to score; with ``mode="scores"``.
        attention_mask: 1 at real tokens, 0 at padding, where ids are given.
        padding_side: Where texts of unequal length are padded.
        tokenizer: Tokenizer or processor of a speech model.
        max_bytes: Bound on what a batch takes in the decoder: layers and inputs are decoded in
            pieces that fit.

    Returns:
        By mode a `LayerwiseDecoding`, `LayerwiseLikelihood` or `LayerwiseScores`; with ``metric`` a
        `LayerCurves`.

    Raises:
        UnsupportedModel: If the model has no encoder or no decoder, or is refused by name.
        InvalidInput: If something given does not fit the model.

    Cost: one pass through the encoder and, per layer, one decoding with cached keys and values:
    at most enc + (L+1) dec operations; finished rows are dropped (greedy decoding).

    Source: Langedijk, Mohebbi, Sarti, Zuidema, Jumelet: DecoderLens: Layerwise Interpretation of
    Encoder-Decoder Transformers (Findings of NAACL 2024).
    """
    require_choice("decoder_lens", "mode", mode, ("generate", "teacher_forced", "scores"))
    _require_sizes(
        ("max_new_tokens", max_new_tokens), ("num_beams", num_beams), ("max_bytes", max_bytes)
    )
    _require_used("tokens", tokens, mode == "scores", "mode='scores'")
    _require_used("categories", categories, metric is not None, "metric=")
    if metric is not None:
        _require_used("mode", mode, mode != "scores", "no metric")
    if mode == "scores":
        _require_used("num_beams", None if num_beams == 1 else num_beams, False, "another mode")
        _require_used("max_new_tokens", max_new_tokens, False, "another mode")
    if mode == "teacher_forced" and references is not None:
        _require_used("decoder_input", decoder_input, False, "no references")
    found = as_encoder_decoder(model, tokenizer)
    # Each once and in order, which is what "the first layer that" counts on.
    numbers = tuple(sorted({*layer_positions(layers, tuple(range(found.n_layers + 1)))}))
    source, prompt, inputs = _source(
        found, Given(input, attention_mask, None, padding_side, decoder_input)
    )
    options = {
        "layers": numbers,
        "mode": mode,
        "num_beams": num_beams,
        "final_norm": final_norm,
        "max_new_tokens": max_new_tokens,
    }
    job = _Job(
        listening=Listening(found, source, numbers, final_norm, max_bytes),
        inputs=inputs,
        prompt=prompt,
        references=_references(found, references, len(inputs)),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        provenance=_provenance(found, options),
    )
    if metric is not None:
        return _curves(job, metric, categories)
    if mode == "scores":
        return job.scores(tokens)
    return job.generate() if mode == "generate" else job.forced()


@dataclass(frozen=True)
class _Job:
    """What was asked, checked against the model."""

    listening: Listening
    inputs: tuple[str, ...]
    prompt: Side | None
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
        said = self.listening.generate(self._even_prompt(), self._length(), self.num_beams)
        shape = (len(self.inputs), len(self.listening.layers))
        ids, mask = said.ids.unflatten(0, shape), said.mask.unflatten(0, shape)
        content = mask & ~torch.isin(ids, torch.tensor(sorted(self.model.special)))
        return LayerwiseDecoding(
            ids=ids,
            mask=mask,
            log_probs=said.log_probs.unflatten(0, shape),
            finished=said.finished.unflatten(0, shape),
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

    def scores(self, tokens: Sequence[int] | Sequence[str] | None) -> LayerwiseScores:
        """Scores a few next tokens from every layer."""
        wanted = _token_ids(self.model, tokens)
        prompt = self.prompt or _start(self.model, len(self.inputs))
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
            rows = [torch.tensor(self.model.encode_target(text)) for text in self.references]
            ids = torch.nn.utils.rnn.pad_sequence(
                rows, batch_first=True, padding_value=self.model.decoder.pad
            )
            lengths = torch.tensor([len(row) for row in rows])
            return ids, torch.arange(ids.shape[1]) < lengths[:, None], 1
        last = replace(self.listening, layers=(self.model.n_layers,))
        said = last.generate(self._even_prompt(), self._length(), self.num_beams)
        ids = torch.cat([said.prompt, said.ids], dim=1)
        mask = torch.cat([torch.ones_like(said.prompt, dtype=torch.bool), said.mask], dim=1)
        return ids, mask, said.prompt.shape[1]

    def _even_prompt(self) -> Tensor | None:
        """Returns what the decoder has said so far, the same number of tokens in every row."""
        if self.prompt is None:
            return None
        if not bool(self.prompt.mask.all()):
            raise _bad(
                "decoding cannot go on from these beginnings",
                f"decoder inputs of {sorted(set(self.prompt.mask.sum(1).tolist()))} tokens",
                "as many tokens in every row",
                "Call once for each length.",
            )
        return self.prompt.ids

    def _length(self) -> int:
        """Returns how many tokens may be said."""
        bound, used = self.model.decoder.n_ctx, 1
        if self.prompt is not None:
            used = self.prompt.ids.shape[1]
        room = None if bound is None else bound - used
        wanted = self.max_new_tokens
        if wanted is None:
            wanted = _MAX_NEW_TOKENS if room is None else min(_MAX_NEW_TOKENS, room)
        if room is not None and not 0 < wanted <= room:
            raise _bad(
                "the decoder cannot say as much",
                f"max_new_tokens={self.max_new_tokens} behind {used} tokens",
                f"at most {bound} tokens together, the longest text of this model",
                "Lower max_new_tokens.",
            )
        return wanted


def _curves(
    job: _Job, metric: MetricChoice, categories: Sequence[str] | Sequence[Sequence[str]] | None
) -> LayerCurves:
    """Returns curves of free outputs, of judged answers, or of both."""
    names = [metric] if isinstance(metric, str) else metric
    if callable(names) or isinstance(names, Mapping):
        return job.generate().metrics(metric=names, categories=categories)
    forced = [name for name in names if name in LIKELIHOOD_METRICS]
    free = [name for name in names if name not in LIKELIHOOD_METRICS]
    found = [job.generate().metrics(metric=free, categories=categories)] if free else []
    if forced:
        found.append(job.forced().metrics(metric=forced, categories=categories))
    return found[0] if len(found) == 1 else found[0] + found[1]


def _source(
    model: EncoderDecoder, given: Given
) -> tuple[Side | Tensor, Side | None, tuple[str, ...]]:
    """Returns what the encoder reads, what the decoder has said, and the inputs as text."""
    if model.view is not None:
        batch = make_batch(model.view, given)
        texts = given.input
        if isinstance(texts, Tensor):
            rows = zip(batch.main.ids, batch.main.mask, strict=True)
            texts = [model.to_text(ids[mask].tolist()) for ids, mask in rows]
        inputs = (texts,) if isinstance(texts, str) else tuple(texts)
        return batch.main, None if given.decoder_input is None else batch.decoder, inputs
    features = given.input
    if not isinstance(features, Tensor) or features.ndim != 3 or not features.is_floating_point():
        raise _bad(
            "a speech model cannot read this",
            describe(features),
            "features of shape [batch, mel, frame]",
            "Make them with the model's feature extractor.",
        )
    if given.decoder_input is not None or given.attention_mask is not None:
        raise _bad(
            "this has no meaning for a speech model",
            "decoder_input or attention_mask",
            "None",
            "Set language and task in model.generation_config.",
        )
    return features, None, ("",) * len(features)


def _references(model: EncoderDecoder, given: Text | None, count: int) -> tuple[str, ...] | None:
    if given is None:
        return None
    found = (given,) if isinstance(given, str) else tuple(given)
    if len(found) != count:
        raise _bad(
            "references and inputs do not fit each other",
            f"{len(found)} references for {count} inputs",
            "one reference per input",
            "Give as many.",
        )
    for text in found:
        # A speech model without a tokenizer compares words only.
        if not words(text) or (model.view is not None and not _content(model, text)):
            raise _bad(
                "a reference has no tokens",
                repr(text),
                "at least one token beside the special ones",
                "Leave the input out, or correct its reference.",
            )
    return found


def _content(model: EncoderDecoder, text: str) -> list[int]:
    """Returns the tokens of a text without special ones."""
    return [token for token in model.encode_target(text) if token not in model.special]


def _token_ids(model: EncoderDecoder, given: Sequence[int] | Sequence[str] | None) -> list[int]:
    """Returns the ids of the tokens to be scored."""
    found: list[int] = []
    for one in given or ():
        ids = _content(model, one) if isinstance(one, str) else [int(one)]
        if len(ids) != 1 or not 0 <= ids[0] < model.decoder.d_vocab:
            raise _bad(
                "this is not one token",
                f"{one!r}, {len(ids)} tokens" if isinstance(one, str) else repr(one),
                f"words of one token each, or ids from 0 to {model.decoder.d_vocab - 1}",
                "Score the first token of longer words.",
            )
        found.append(ids[0])
    if not found:
        raise _bad(
            "there is nothing to score",
            f"tokens={given!r}",
            "at least one token with mode='scores'",
            "Pass ids or words, the right one first.",
        )
    return found


def _start(model: EncoderDecoder, count: int) -> Side:
    ids = torch.full((count, 1), model.decoder.start)
    return Side(ids, torch.ones_like(ids, dtype=torch.bool))


def _require_sizes(*sizes: tuple[str, int | None]) -> None:
    for name, value in sizes:
        if value is not None and (isinstance(value, bool) or value < 1):
            raise _bad("nothing can be decoded", f"{name}={value}", "at least 1", "Raise it.")


def _require_used(name: str, value: object, used: bool, with_what: str) -> None:
    if value is not None and not used:
        raise _bad(
            f"{name} would change nothing", repr(value), f"{with_what} beside it", "Leave it out."
        )


def _require_length(model: EncoderDecoder, length: int, name: str) -> None:
    bound = model.decoder.n_ctx
    if bound is not None and length > bound:
        raise _bad(
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
    return Tokens(ids=ids, strings=strings, mask=mask, sides=(("decoder", ids.shape[1]),))


def _provenance(model: EncoderDecoder, options: dict[str, Any]) -> Provenance:
    return Provenance(
        method="decoder_lens",
        options=options,
        model=model.name,
        host=model.host,
        host_version=model.host_version,
        version=package_version(),
        processing=model.processing,
        fingerprint=model.fingerprint,
    )


def _bad(failed: str, seen: str, expected: str, remedy: str) -> InvalidInput:
    return InvalidInput(four_parts(failed, seen, expected, remedy))
