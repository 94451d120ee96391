"""DecoderLens: what an encoder-decoder says when its decoder reads an earlier encoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from typing_extensions import Unpack

from tl_contextmix.adapters import as_encoder_decoder
from tl_contextmix.adapters.inputs import Given, Input, Text, TokenInputs
from tl_contextmix.core.text_metrics import MetricChoice, UserMetric, metric_items
from tl_contextmix.core.validation import Positive
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.methods.decoder_lens.answers import Lens
from tl_contextmix.methods.decoder_lens.layerwise_decoder import Listening
from tl_contextmix.methods.decoder_lens.references import read_references, read_source, read_tokens
from tl_contextmix.results import (
    LIKELIHOOD_METRICS,
    LayerCurves,
    LayerwiseDecoding,
    LayerwiseLikelihood,
    LayerwiseScores,
)
from tl_contextmix.results.axes import positions
from tl_contextmix.results.curves import category_groups
from tl_contextmix.results.decodings import require_measurable
from tl_contextmix.results.likelihoods import by_token

Mode = Literal["generate", "teacher_forced", "scores"]
Layerwise = LayerwiseDecoding | LayerwiseLikelihood | LayerwiseScores | LayerCurves
Categories = Sequence[str] | Sequence[Sequence[str]]


class _Options(TokenInputs, total=False):
    """What `decoder_lens` takes whatever it returns."""

    layer: int | Sequence[int] | None
    categories: Categories | None
    max_new_tokens: Positive | None
    num_beams: Positive
    final_norm: bool
    target: Sequence[int] | Sequence[str] | None
    tokenizer: Any
    task: str | None
    max_bytes: Positive


@overload
def decoder_lens(
    model: object,
    input: Input,
    references: Text | None = ...,
    *,
    mode: Literal["generate"] = ...,
    metric: None = ...,
    **options: Unpack[_Options],
) -> LayerwiseDecoding: ...


@overload
def decoder_lens(
    model: object,
    input: Input,
    references: Text | None = ...,
    *,
    mode: Literal["teacher_forced"],
    metric: None = ...,
    **options: Unpack[_Options],
) -> LayerwiseLikelihood: ...


@overload
def decoder_lens(
    model: object,
    input: Input,
    references: Text | None = ...,
    *,
    mode: Literal["scores"],
    metric: None = ...,
    **options: Unpack[_Options],
) -> LayerwiseScores: ...


@overload
def decoder_lens(
    model: object,
    input: Input,
    references: Text | None = ...,
    *,
    mode: Mode = ...,
    metric: MetricChoice,
    **options: Unpack[_Options],
) -> LayerCurves: ...


@method(cites=("langedijk2024decoderlens",))
def decoder_lens(
    model: object,
    input: Input,
    references: Text | None = None,
    *,
    layer: int | Sequence[int] | None = None,
    mode: Mode = "generate",
    metric: MetricChoice | None = None,
    categories: Categories | None = None,
    max_new_tokens: Positive | None = None,
    num_beams: Positive = 1,
    final_norm: bool = True,
    target: Sequence[int] | Sequence[str] | None = None,
    tokenizer: Any = None,
    task: str | None = None,
    max_bytes: Positive = 2**30,
    **inputs: Unpack[TokenInputs],
) -> Layerwise:
    r"""Returns what the decoder says, or thinks of an answer, after each encoder layer.

    .. math:: \mathrm{DecoderLens}_l(y_{<t}) = \mathrm{Dec}(\mathrm{LN}_f(e^l),\, y_{<t}),
        \qquad l = 0, \dots, L

    with :math:`e^0` the embeddings, :math:`e^l` the encoder's residual stream after block ``l`` and
    :math:`\mathrm{LN}_f` its final norm, where the architecture has one (T5, mBART, M2M100,
    Pegasus, Whisper; BART and Marian have none). Every decoder layer reads this one state. It is
    the model with the encoder blocks after ``l`` removed; at ``l = L`` it is the model itself
    (Langedijk et al. 2024). Nothing is trained.

    The decoder is given the prompt of ``generate``: its start token and the token that is forced
    after it (a language code), Whisper's language, task and no-timestamps tokens. They are no
    predictions: judged answers and scores begin after them.

    Args:
        model: A HookedEncoderDecoder (TransformerLens 3), an encoder-decoder on a
            TransformerBridge, or a Hugging Face model itself: Whisper, umT5, NLLB-MoE, ProphetNet
            or Pegasus-X, which TransformerLens has no class for, or any like T5, BART or LED. Of a
            bridge that shows too little for maps (LED, LongT5, Switch Transformers) the
            model in it is read.
        input: A text, several, or token ids [batch, pos]; for Whisper features [batch, mel, frame].
        references: The right answers, one per input.
        layer: Encoder layers, 0 (the embeddings) to L, negative from the end; None for all. Each
            is asked once, in their order.
        mode: ``"generate"``: free decoding. ``"teacher_forced"``: how the decoder judges the
            references, or the model's own final output where there are none. ``"scores"``:
            logits of the next ``target`` tokens.
        metric: Return curves over the data set instead: names of `LayerwiseDecoding.metrics` or
            of `LayerwiseLikelihood.metrics` (``"gold NLL"``, ``"KL"``, ``"accuracy"``, ``"MRR"``),
            a function of output, reference and source, several of them, or a mapping from your own
            names to them. ``mode`` follows from the metrics.
        categories: With ``metric``: a category per input, as a list or a column of a table, or per
            token (metrics of a judged answer only).
        max_new_tokens: Longest output; None for 64, or what the model's context allows. An output
            that ran into it is marked (`LayerwiseDecoding.truncated`).
        num_beams: 1 for greedy decoding, more for beam search as in transformers; whatever the
            model's ``generation_config`` says of beams, sampling and length. Its other settings
            (forced first token, suppressed tokens, penalties) are followed; those that cannot be
            (``guidance_scale``, ``stop_strings``, assisted decoding) are refused by name.
        final_norm: Whether to apply the encoder's final norm, where there is one. Hooks of yours
            on it take part; they see one layer after the other.
        target: Ids, or words of one token each, to score; with ``mode="scores"``.
        tokenizer: Tokenizer, or processor, of a Hugging Face model.
        task: ``"transcribe"`` or ``"translate"``, which a speech model's decoder is told; None: by
            the generation config.
        max_bytes: Bound on what a batch takes in the decoder: layers and inputs are decoded in
            pieces that fit.
        **inputs: Mask, padding and the like, see `TokenInputs`. A speech model takes
            ``decoder_input`` and ``language`` alone.

    Returns:
        By mode a `LayerwiseDecoding`, `LayerwiseLikelihood` or `LayerwiseScores`; with ``metric`` a
        `LayerCurves`.

    Raises:
        UnsupportedModel: If the model has no encoder or no decoder, or is refused by name; if it
            carries hooks, or generation settings, that would not be followed.
        InvalidInput: If something given does not fit the model, or would change nothing.
        ContextMixError: If a metric's package is not installed.

    Warns:
        ContextMixWarning: If the tokenizer was told a target language that ``generate`` would not
            use.

    Cost: one pass through the encoder and, per layer, one decoding with cached keys and values:
    at most enc + (L+1) dec operations; finished rows are dropped (greedy decoding).

    Source: Langedijk, Mohebbi, Sarti, Zuidema, Jumelet: DecoderLens: Layerwise Interpretation of
    Encoder-Decoder Transformers (Findings of NAACL 2024).
    """
    plan = _Plan(mode, {} if metric is None else metric_items(metric), references is not None)
    _require_used(
        ("mode", None if mode == "generate" else mode, plan.mode_matters),
        ("references", references, mode != "scores"),
        ("target", target, mode == "scores"),
        ("categories", categories, bool(plan.metrics)),
        ("num_beams", None if num_beams == 1 else num_beams, plan.decodes_freely),
        ("max_new_tokens", max_new_tokens, plan.decodes_freely),
        ("decoder_input", inputs.get("decoder_input"), not (plan.judges and plan.referenced)),
    )
    found = as_encoder_decoder(model, tokenizer, inputs.get("language"), task)
    _require_used(("tokenizer", tokenizer, found.direct))
    found = found.named(inputs.get("labels"))
    # Each once and in order, which is what "the first layer that" counts on.
    numbers = tuple(sorted({*positions("layer", layer, range(found.n_layers + 1))}))
    source, prompt, sources, further = read_source(found, Given(input, **inputs))
    lens = Lens(
        listening=Listening(found, source, numbers, final_norm, max_bytes, further),
        inputs=sources,
        prompt=prompt,
        prompted=found.view is None or inputs.get("decoder_input") is not None,
        references=read_references(found, references, len(sources)),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        provenance=found.provenance(
            {
                "layers": numbers,
                "mode": mode,
                "num_beams": num_beams,
                "final_norm": final_norm,
                "max_new_tokens": max_new_tokens,
            }
        ),
    )
    if plan.metrics:
        return _curves(lens, plan, categories)
    if mode == "scores":
        return lens.scores(read_tokens(found, target))
    return lens.generate() if mode == "generate" else lens.forced()


@dataclass(frozen=True)
class _Plan:
    """What is to be done: the mode and metrics asked for, and whether there are right answers."""

    mode: Mode
    metrics: dict[str, str | UserMetric]
    referenced: bool

    @property
    def forced(self) -> dict[str, str]:
        """The metrics of a judged answer."""
        return {name: str(one) for name, one in self.metrics.items() if one in LIKELIHOOD_METRICS}

    @property
    def free(self) -> dict[str, str | UserMetric]:
        """The metrics of a free output."""
        return {name: one for name, one in self.metrics.items() if name not in self.forced}

    @property
    def judges(self) -> bool:
        """Whether answers are judged."""
        return bool(self.forced) if self.metrics else self.mode == "teacher_forced"

    @property
    def mode_matters(self) -> bool:
        """Whether the mode agrees with the metrics, which know theirs."""
        return not self.metrics or (self.mode == "teacher_forced" and not self.free)

    @property
    def decodes_freely(self) -> bool:
        """Whether the decoder says something of its own, from every layer or from the last."""
        free = bool(self.free) if self.metrics else self.mode == "generate"
        return free or (self.judges and not self.referenced)


def _curves(lens: Lens, plan: _Plan, categories: Any) -> LayerCurves:
    """Returns curves of free outputs, of judged answers, or of both."""
    free, forced = plan.free, plan.forced
    # Before anything is decoded: a data set may take hours.
    if free:
        if by_token(categories):
            raise InvalidInput(
                "categories of tokens do not go with metrics of an output",
                f"a list per input and the metrics {list(free)}",
                f"metrics of a judged answer only: {list(LIKELIHOOD_METRICS)}",
                "Call once for each kind of metric, or give a category per input.",
            )
        require_measurable(
            free,
            referenced=plan.referenced,
            last=lens.listening.layers[-1] == lens.model.n_layers,
        )
    if not by_token(categories):
        category_groups(categories, len(lens.inputs))
    found = [lens.generate().metrics(metric=free, categories=categories)] if free else []
    if forced:
        found.append(lens.forced().metrics(metric=forced, categories=categories))
    return found[0] if len(found) == 1 else found[0] + found[1]


# Where an option does something.
_USED = {
    "mode": "no metric, or metrics of that mode only",
    "references": "answers to compare with, which scores of tokens are not",
    "target": "mode='scores'",
    "categories": "metric=",
    "num_beams": "outputs of the decoder's own",
    "max_new_tokens": "outputs of the decoder's own",
    "decoder_input": "no references to judge",
    "tokenizer": "a Hugging Face model: others have their own",
}


def _require_used(*options: tuple[str, object, bool]) -> None:
    for name, value, used in options:
        if value is not None and not used:
            raise InvalidInput(
                f"{name} would change nothing", repr(value), f"{_USED[name]}", "Leave it out."
            )
