r"""DecoderLens.

The `DecoderLens <https://aclanthology.org/2024.findings-naacl.296>`_ (Langedijk, Mohebbi, Sarti,
Zuidema, Jumelet 2024) asks what an encoder-decoder would say if its encoder stopped earlier: the
decoder, all of its layers, reads the encoder's residual stream after block ``l``, through the
encoder's final norm where there is one,

.. math:: \mathrm{DecoderLens}_l(y_{<t}) = \mathrm{Dec}(\mathrm{LN}_f(e^l), y_{<t}),
    \qquad l = 0, \dots, L,

with :math:`e^0` the embeddings. At ``l = L`` it is the model itself. Nothing is trained. It is to
encoders what the logit lens is to decoders, and its readout is text.

:func:`decoder_lens` decodes every layer in one batch with cached keys and values, and has every
layer judge one answer, the model's own or a given one, token by token.

Example::

    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.decoder_lens import decoder_lens

    model = TransformerBridge.boot_transformers("google-t5/t5-small", device="cpu")
    tokens = model.tokenizer("translate English to German: The house is small.",
                             return_tensors="pt").input_ids
    result = decoder_lens(model, tokens)
    print(result.to_dataframe(model.tokenizer)[["layer", "text", "log_prob"]])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from transformer_lens.tools.analysis._model_state import (
    compute_dtype,
    require_eval_mode,
    require_int,
)

from tl_contextmix.adapters.encoder_decoder.decoding import MemoryDecoder
from tl_contextmix.core.blocks import Side
from tl_contextmix.methods.decoder_lens.layerwise_decoder import Listening

# Relative to the largest logit; the last layer through the decoder measures 0 to 2e-6 in float32
# and under 2e-2 in half precision, a skipped norm 0.1 and more.
_IDENTITY_RTOL = {torch.float64: 1e-5, torch.float32: 1e-4}
_IDENTITY_RTOL_HALF = 8e-2


@dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder bridge as an encoder of ``n_layers`` blocks and a decoder that reads any.

    Attributes:
        n_layers: Number of encoder blocks.
        states: Token ids and mask to the encoder states of layers 0 to ``n_layers``, before the
            final norm.
        norm: The encoder's final norm, or None.
        decoder: Runs the decoder on encoder states.
    """

    n_layers: int
    states: Callable[[Any], list[torch.Tensor]]
    norm: Callable[[torch.Tensor], torch.Tensor] | None
    decoder: MemoryDecoder


@dataclass(frozen=True)
class DecoderLensResult:
    """Result of :func:`decoder_lens`.

    Attributes:
        ids: What the decoder says from each layer, padding after its end, ``[layer, batch, pos]``.
        mask: True up to and including the end token, ``[layer, batch, pos]``.
        finished: Whether the end token was reached, ``[layer, batch]``.
        target_ids: The answer that every layer judges, ``[batch, target_pos]``.
        target_mask: True at its tokens, ``[batch, target_pos]``.
        log_probs: Log-probability of each token of the answer given those before it, in nats,
            ``[layer, batch, target_pos]``; 0 at padding.
        ranks: How many tokens are more probable than the answer's, ``[layer, batch, target_pos]``.
        kl: KL divergence of each layer's next-token distribution from the last layer's, in nats,
            ``[layer, batch, target_pos]``; 0 at padding.
        labels: Name of each layer, as in ``accumulated_resid``: ``"0_pre"`` the embeddings,
            ``"1_pre"`` after the first block, ``"final_post"`` after the last.
    """

    ids: Int[torch.Tensor, "layer batch pos"]
    mask: Bool[torch.Tensor, "layer batch pos"]
    finished: Bool[torch.Tensor, "layer batch"]
    target_ids: Int[torch.Tensor, "batch target_pos"]
    target_mask: Bool[torch.Tensor, "batch target_pos"]
    log_probs: Float[torch.Tensor, "layer batch target_pos"]
    ranks: Int[torch.Tensor, "layer batch target_pos"]
    kl: Float[torch.Tensor, "layer batch target_pos"]
    labels: list[str]

    def answer_log_probs(self) -> Float[torch.Tensor, "layer batch"]:
        """Log-probability of the whole answer under every layer, in nats."""
        return self.log_probs.sum(dim=-1)

    def top(self, k: int = 5, *, batch: int = 0) -> list[tuple[str, float]]:
        """Return the ``k`` layers that find the answer most probable, as ``(label, log_prob)``.

        Args:
            k: How many.
            batch: Which input.
        """
        k = require_int(k, "k")
        values, places = self.answer_log_probs()[:, batch].topk(min(k, len(self.labels)))
        return [(self.labels[i], v) for i, v in zip(places.tolist(), values.tolist(), strict=True)]

    def to_dataframe(self, tokenizer: Any | None = None) -> Any:
        """One row per (layer, input) as a pandas DataFrame.

        Args:
            tokenizer: Decodes the column ``text``; without one it holds the token ids.
        """
        import pandas as pd

        answers = self.answer_log_probs()
        kl = self.kl.sum(-1) / self.target_mask.sum(-1).clamp(min=1)
        rows = []
        for layer, label in enumerate(self.labels):
            for batch in range(self.ids.shape[1]):
                said = self.ids[layer, batch][self.mask[layer, batch]].tolist()
                rows.append(
                    {
                        "layer": label,
                        "batch": batch,
                        "text": said
                        if tokenizer is None
                        else tokenizer.decode(said, skip_special_tokens=True),
                        "finished": bool(self.finished[layer, batch]),
                        "log_prob": float(answers[layer, batch]),
                        "mean_kl": float(kl[layer, batch]),
                    }
                )
        return pd.DataFrame(rows)


@torch.no_grad()
def decoder_lens(
    model: Any,
    input: Int[torch.Tensor, "batch pos"],
    *,
    targets: Int[torch.Tensor, "batch target_pos"] | None = None,
    target_mask: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 20,
    num_beams: int = 1,
    final_norm: bool = True,
    max_bytes: int = 2**30,
) -> DecoderLensResult:
    """What the decoder says, and makes of an answer, when it reads each encoder layer.

    One pass through the encoder; the states of all layers are then rows of one batch for the
    decoder, in pieces that fit ``max_bytes``. Before anything is returned, the last layer's states
    through the decoder are compared with the logits of the model's own forward pass.

    Args:
        model: An encoder-decoder ``TransformerBridge`` in eval mode.
        input: Source token ids ``[batch, pos]``, as the tokenizer frames them. Texts are not
            taken: ``to_tokens`` does not add an encoder-decoder's special tokens.
        targets: Answers to judge ``[batch, target_pos]``, start token left out, end token in;
            ``None`` for what the model itself says from its last layer.
        target_mask: 1 at the answers' tokens and 0 at padding, ``[batch, target_pos]``.
        attention_mask: 1 at source tokens and 0 at padding, ``[batch, pos]``.
        layers: Encoder layers from 0 (embeddings) to L, negative ones from the end; ``None``
            for all.
        max_new_tokens: Longest answer.
        num_beams: 1 for greedy decoding; other settings are those of ``generation_config``.
        final_norm: Whether the encoder's final norm is applied, where there is one.
        max_bytes: Bound on what one batch of the decoder takes.

    Returns:
        A :class:`DecoderLensResult`, its leading axis aligned with ``labels``.

    Raises:
        ValueError: If an argument is invalid or the model is in training mode.
        NotImplementedError: If the model is no encoder-decoder bridge over token ids, or its
            logits are not its decoder's on the last encoder layer.
    """
    max_new_tokens = require_int(max_new_tokens, "max_new_tokens")
    num_beams = require_int(num_beams, "num_beams")
    max_bytes = require_int(max_bytes, "max_bytes")
    require_eval_mode(model, operation="decoder_lens")
    if targets is None and target_mask is not None:
        raise ValueError("target_mask needs targets")
    whole = _encoder_decoder(model)
    source = Side(input, _mask("attention_mask", attention_mask, input))
    numbers = _state_layers(layers, whole.n_layers)
    _require_identity(model, whole, source)
    listening = Listening(whole, source, numbers, final_norm, max_bytes)
    said = listening.generate(None, max_new_tokens, num_beams)
    shape = (len(input), len(numbers))
    answers, real = targets, target_mask
    if answers is None:
        last = said
        if numbers[-1] != whole.n_layers or not final_norm:
            last = Listening(whole, source, (whole.n_layers,), True, max_bytes).generate(
                None, max_new_tokens, num_beams
            )
        rows = slice(len(last.ids) // len(input) - 1, None, len(last.ids) // len(input))
        answers, real = last.ids[rows], last.mask[rows]
    real = _mask("target_mask", real, answers)
    used = int(real.any(0).nonzero().max()) + 1 if bool(real.any()) else 0
    if used == 0:
        raise ValueError("targets hold no token")
    answers, real = answers[:, :used], real[:, :used]
    start = torch.full_like(answers[:, :1], whole.decoder.start[0])
    inputs = torch.cat([start, answers[:, :-1]], dim=1)
    log_probs, kl, ranks, _ = listening.judge(inputs, answers)

    def by_layer(numbers: torch.Tensor) -> torch.Tensor:
        # From [batch, layer, pos], and zero at padding.
        return numbers.masked_fill(~real[:, None].cpu(), 0).transpose(0, 1)

    names = [f"{layer}_pre" for layer in range(whole.n_layers)] + ["final_post"]
    return DecoderLensResult(
        ids=said.ids.unflatten(0, shape).transpose(0, 1),
        mask=said.mask.unflatten(0, shape).transpose(0, 1),
        finished=said.finished.unflatten(0, shape).transpose(0, 1),
        target_ids=answers,
        target_mask=real,
        log_probs=by_layer(log_probs),
        ranks=by_layer(ranks),
        kl=by_layer(kl),
        labels=[names[layer] for layer in numbers],
    )


def _encoder_decoder(model: Any) -> EncoderDecoder:
    blocks = getattr(model, "_modules", {}).get("encoder_blocks")
    original = getattr(model, "original_model", None)
    if blocks is None or original is None:
        raise NotImplementedError(
            f"decoder_lens needs an encoder-decoder TransformerBridge, got {type(model).__name__}; "
            "for the layers of a decoder use logit_lens"
        )
    if getattr(original, "main_input_name", "input_ids") != "input_ids":
        raise NotImplementedError(
            f"decoder_lens reads token ids; this model reads {original.main_input_name}"
        )
    settings, config = original.generation_config, original.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise NotImplementedError("decoder_lens needs config.decoder_start_token_id")
    end, forced = settings.eos_token_id, settings.forced_bos_token_id
    decoder = MemoryDecoder(
        model=original,
        owner=model,
        dtype=compute_dtype(next(model.parameters()).dtype),
        start=(int(start),) if forced is None else (int(start), int(forced)),
        ends=() if end is None else tuple(end) if isinstance(end, (list, tuple)) else (int(end),),
        pad=settings.pad_token_id or 0,
        n_ctx=None,
    )
    norm = model._modules.get("encoder_ln_final")

    def normed(state: torch.Tensor) -> torch.Tensor:
        assert norm is not None
        return norm(state)

    return EncoderDecoder(
        n_layers=len(blocks),
        states=lambda side: _states(model, len(blocks), int(start), side),
        norm=None if norm is None else normed,
        decoder=decoder,
    )


def _states(model: Any, n_layers: int, start: int, side: Side) -> list[torch.Tensor]:
    """The encoder's residual stream before its first block and after every block."""
    names = ["encoder_blocks.0.hook_in"]
    names += [f"encoder_blocks.{layer}.hook_out" for layer in range(n_layers)]
    _, cache = model.run_with_cache(
        side.ids,
        attention_mask=side.mask.long(),
        decoder_input=torch.full_like(side.ids[:, :1], start),
        names_filter=names,
    )
    return [cache[name] for name in names]


def _require_identity(model: Any, whole: EncoderDecoder, source: Side) -> None:
    """Refuse a model whose logits are not its decoder's on the last encoder layer."""
    start = torch.full_like(source.ids[:, :1], whole.decoder.start[0])
    logits = model(source.ids, attention_mask=source.mask.long(), decoder_input=start)
    state = whole.states(source)[-1]
    memory = state if whole.norm is None else whole.norm(state)
    found = whole.decoder.logits(memory, source.mask, start)
    error = float((found - logits).abs().max() / logits.abs().max())
    tolerance = _IDENTITY_RTOL.get(next(model.parameters()).dtype, _IDENTITY_RTOL_HALF)
    if not error <= tolerance:
        raise NotImplementedError(
            f"the decoder on the last encoder layer is off by {error:.3g} of the largest logit "
            f"(tolerance {tolerance:g}): this model does something else between its stacks"
        )


def _mask(name: str, mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise ValueError("input and targets must be token ids of shape [batch, pos]")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, the ids {tuple(ids.shape)}")
    return mask.bool()


def _state_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(depth + 1))
    wrong = [layer for layer in layers if not -depth - 1 <= layer <= depth]
    if wrong or len(layers) == 0:
        raise ValueError(f"layers must be some of 0 (embeddings) to {depth}, got {list(layers)}")
    return tuple(sorted({layer % (depth + 1) for layer in layers}))
