"""Runs the decoder of an encoder-decoder on any encoder states: generation and teacher forcing.

Hugging Face code decodes: a plain copy of the model on the same weights (see `hf_copy`), or the
model inside a bridge. Outputs from the last encoder layer therefore equal those of the model's own
``generate``, including its generation settings (forced first token, suppressed tokens).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_contextmix.adapters.past import empty_cache
from tl_contextmix.adapters.running import lock_of
from tl_contextmix.core.finite import require_predictions
from tl_contextmix.errors import InvalidInput, UnsupportedModel


@dataclass(frozen=True)
class Generated:
    """Output generated from a batch of encoder states.

    Attributes:
        ids: The tokens after the prompt, up to and including the end token; then padding.
        mask: True up to the end token.
        log_probs: Log-probability of each token, before the model's generation settings change
            them; 0 at padding.
        finished: Whether the end token was reached.
        prompt: The decoder's prefix.
        forced: How many of the first tokens the model's settings force; their log-probability is
            zero.
    """

    ids: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    log_probs: Float[Tensor, "row pos"]
    finished: Bool[Tensor, " row"]
    prompt: Int[Tensor, "row prompt"]
    forced: int


@dataclass(frozen=True)
class MemoryDecoder:
    """The decoder of an encoder-decoder, which reads any given encoder states.

    Attributes:
        model: The Hugging Face model that decodes.
        owner: The user's model, which is locked while decoding.
        dtype: Dtype of computation and results.
        start: What the decoder starts with: its start token, and the one that is forced after it.
        ends: End-of-sequence token ids.
        pad: Padding token id.
        n_ctx: Longest decoder input, or None if unlimited.
        masked: Whether there is a mask over encoder positions (Whisper has none).
        alone: Whether only this package runs ``model``: no hook sees its activations.
        stepwise: Whether ``model`` gives other logits of a whole text than of its tokens one by
            one, as it generates (ProphetNet in transformers).
    """

    model: Any = field(repr=False)
    owner: nn.Module = field(repr=False)
    dtype: torch.dtype
    start: tuple[int, ...]
    ends: tuple[int, ...]
    pad: int
    n_ctx: int | None
    masked: bool = True
    alone: bool = False
    stepwise: bool = False

    def bytes_per_row(self, source: int, target: int, *, all_logits: bool) -> int:
        """Returns the approximate bytes per row of a batch.

        Keys and values of every decoder layer for encoder and decoder positions, the encoder
        states themselves, and logits in the model's and in single precision.
        """
        config = getattr(self.model.get_decoder(), "config", self.model.config)
        layers = _size(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers")
        heads = _size(config, "num_heads", "decoder_attention_heads", "num_attention_heads")
        d_model = _size(config, "d_model", "hidden_size")
        width = heads * _size(config, "d_kv", "head_dim", default=d_model // heads)
        cached = 2 * layers * width * (source + target) + d_model * source
        logits = self.d_vocab * (2 * target if all_logits else 4)
        return (cached + logits) * self.dtype.itemsize

    @property
    def d_vocab(self) -> int:
        """Size of the output vocabulary."""
        config = self.model.config
        return int(getattr(config, "decoder_vocab_size", None) or config.vocab_size)

    def generate(
        self,
        memory: Float[Tensor, "row source d_model"],
        mask: Bool[Tensor, "row source"],
        *,
        prompt: Int[Tensor, "row prompt"] | None,
        max_new_tokens: int,
        num_beams: int,
        source: Int[Tensor, "row source"] | None = None,
    ) -> Generated:
        """Decodes every row until its end token, greedily or by beam search.

        Greedy decoding caches keys and values and drops finished rows; beam search is
        transformers', which keeps all rows until the last one ends.

        Args:
            memory: Encoder states.
            mask: Which of their positions are real.
            prompt: Decoder prefix; None for its start token alone. Whisper's is always given.
            max_new_tokens: Longest output.
            num_beams: 1 for greedy decoding.
            source: The source tokens, which some settings need; None for audio.
        """
        loop = _Greedy(self.dtype)
        options: dict[str, Any] = {
            **_unrouted(self.model),
            "past_key_values": empty_cache(),
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "do_sample": False,
            "use_cache": True,
            "return_dict_in_generate": False,
            "output_attentions": False,
            "output_hidden_states": False,
        }
        if num_beams == 1:
            options["custom_generate"] = loop
        else:
            options["logits_processor"] = [loop.see_prompt]
        memory = self._ready(memory)
        if self.masked:
            # Overrides the settings' length, which would cause a warning.
            options["max_length"] = None
            options["attention_mask"] = mask.to(memory.device).long()
            # Of a prefix the first token, which transformers would put in front of others.
            first = self.start[0] if prompt is None else int(prompt[0, 0])
            options["decoder_start_token_id"] = first
            options["forced_bos_token_id"] = self.start[1] if len(self.start) > 1 else None
        else:
            # Otherwise Whisper strips its prompt, and may decode in pieces.
            options["force_unique_generate_call"] = True
        if prompt is not None:
            options["decoder_input_ids"] = prompt
        states = _encoded(memory)
        if source is not None:
            options["inputs"] = source.to(memory.device)
        # Steps of small models are dominated by overhead, 7 % of which this mode saves.
        mode = torch.inference_mode() if self.alone else torch.no_grad()
        with lock_of(self.owner), mode:
            found = self.model.generate(encoder_outputs=states, **options)
        prompt = loop.prompt[::num_beams]
        ids = (loop.ids if num_beams == 1 else found)[:, prompt.shape[1] :]
        ids, real, finished = self._ended(ids)
        log_probs, best = loop.log_probs, loop.best
        if num_beams > 1:
            log_probs, best = self._judged(memory, mask, prompt, ids)
        if ids.shape[1] == max_new_tokens and self.model.generation_config.forced_eos_token_id:
            # BART's settings force an end token at the maximum length.
            forced = real[:, -1] & (best != ids[:, -1])
            finished = finished & ~forced
        log_probs = log_probs.masked_fill(~real, 0)
        unasked = int(self.masked and prompt.shape[1] == 1 < len(self.start))
        log_probs[:, :unasked] = 0
        return Generated(ids, real, log_probs, finished, prompt, unasked)

    def generation_prompt(
        self,
        memory: Float[Tensor, "row source d_model"],
        language: str | None = None,
        task: str | None = None,
    ) -> Int[Tensor, "row prompt"]:
        """Returns what ``generate`` gives Whisper's decoder before it says anything.

        Args:
            memory: Encoder states, from which an open language is heard.
            language: An argument of ``generate``; None: by the settings.
            task: Likewise.

        Raises:
            InvalidInput: If ``generate`` takes no such language or task.
        """

        def stop(model: Any, input_ids: Tensor, *_: Any, **__: Any) -> None:
            raise _PromptReached(input_ids)

        states = _encoded(self._ready(memory))
        given = {"language": language, "task": task}
        named = {name: one for name, one in given.items() if one is not None}
        options: dict[str, Any] = {"num_beams": 1, "do_sample": False, **named}
        with lock_of(self.owner), torch.no_grad():
            try:
                self.model.generate(encoder_outputs=states, custom_generate=stop, **options)
            except _PromptReached as reached:
                return reached.ids.cpu()
            except ValueError as error:
                if not named:
                    raise
                raise InvalidInput(
                    "the decoder cannot be told this",
                    ", ".join(f"{name}={one!r}" for name, one in named.items()),
                    f"what generate() takes ({error})",
                    "Name another.",
                ) from error
        raise AssertionError("generate() without decoding")

    @torch.no_grad()
    def logits(
        self,
        memory: Float[Tensor, "row source d_model"],
        mask: Bool[Tensor, "row source"],
        ids: Int[Tensor, "row pos"],
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Returns the logits at every position of given decoder inputs."""
        memory = self._ready(memory)
        options = _unrouted(self.model)
        if self.masked:
            options["attention_mask"] = mask.to(memory.device).long()
        pieces = [ids.to(memory.device)]
        options["use_cache"] = self.stepwise
        if self.stepwise:
            pieces = [*pieces[0].split(1, dim=1)]
            options["past_key_values"] = empty_cache()
        with lock_of(self.owner):
            found = [
                self.model(encoder_outputs=_encoded(memory), decoder_input_ids=piece, **options)
                for piece in pieces
            ]
        logits = torch.cat([out.logits for out in found], dim=1)
        require_predictions(logits, padded=not bool(mask.all()))
        return logits.to(self.dtype)

    def _ended(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the padded tokens, the mask up to the end token, and whether it was reached."""
        ended = torch.isin(ids, torch.tensor(self.ends, device=ids.device))
        real = ended.cumsum(1) - ended.long() == 0
        return ids.masked_fill(~real, self.pad), real, ended.any(1)

    def _judged(
        self, memory: Tensor, mask: Tensor, prompt: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the log-probability of each generated token, and the top last one."""
        inputs = torch.cat([prompt, ids], dim=1)[:, :-1]
        logits = self.logits(memory, mask, inputs)[:, prompt.shape[1] - 1 :]
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0], logits[:, -1].argmax(-1)

    def _ready(self, memory: Tensor) -> Tensor:
        """Returns encoder states on the decoder's device, in its dtype."""
        first = next(self.model.get_decoder().parameters())
        return memory.to(first.device, first.dtype)


def _encoded(memory: Tensor) -> Any:
    """Returns encoder states as what an encoder returns."""
    from transformers.modeling_outputs import BaseModelOutput

    result: Any = BaseModelOutput(last_hidden_state=memory)
    result.router_logits = None  # mixtures of experts pass them on
    return result


def _unrouted(model: Any) -> dict[str, Any]:
    """Returns what keeps a mixture of experts from asking the encoder for its routing."""
    named = inspect.signature(model.forward).parameters
    return {"output_router_logits": False} if "output_router_logits" in named else {}


def _size(config: Any, *names: str, default: int = 1) -> int:
    found = (getattr(config, name, None) for name in names)
    return next((size for size in found if isinstance(size, int)), default)


class _PromptReached(Exception):
    """Ends ``generate`` where the decoder would begin; holds what it is given."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids


class _Greedy:
    """The loop of greedy decoding, as ``custom_generate`` of transformers' ``generate``.

    It differs from theirs in two ways: finished rows leave the batch and its cache, and each
    token's log-probability is kept.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.prompt = self.ids = torch.zeros(0, 0, dtype=torch.long)
        self.best = torch.zeros(0, dtype=torch.long)  # at the last step
        self.log_probs = torch.zeros(0, 0, dtype=dtype)

    def see_prompt(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Records the prompt; a logits processor that changes nothing."""
        if not self.prompt.numel():
            self.prompt = ids
        return scores

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        if self.ids.numel():
            raise UnsupportedModel(
                "generation needs several decoder runs",
                "generation settings with fallback temperatures or timestamps",
                "one run per input",
                "Reset them in model.generation_config.",
            )
        self.prompt = input_ids
        memory, mask = inputs["encoder_outputs"][0], inputs.get("attention_mask")
        cache, pad = inputs["past_key_values"], generation_config.pad_token_id or 0
        ids, step = input_ids, input_ids
        alive = torch.arange(len(ids), device=ids.device)
        kept, best = [], torch.full_like(ids[:, 0], pad)
        decoded, last = alive, memory.new_zeros(0, 1)
        padded = mask is not None and not bool(mask.all())
        while len(alive):
            options = _unrouted(model)
            if mask is not None:
                options["attention_mask"] = mask
            out = model(
                encoder_outputs=_encoded(memory),
                decoder_input_ids=step,
                past_key_values=cache,
                use_cache=True,
                **options,
            )
            logits = out.logits[:, -1]
            require_predictions(logits, padded=padded)
            # Some processors keep state per row, so they get all rows. float32 as in transformers,
            # so that ties are the same.
            scores = logits.new_zeros(len(ids), logits.shape[-1], dtype=torch.float32)
            scores[alive] = logits.float()
            chosen = logits_processor(ids, scores)[alive].argmax(-1)
            ids = torch.cat([ids, ids.new_full((len(ids), 1), pad)], dim=1)
            ids[alive, -1] = chosen
            column = logits.new_zeros(len(ids), dtype=self.dtype)
            column[alive] = logits.to(self.dtype).log_softmax(-1)[range(len(alive)), chosen]
            kept.append(column)
            decoded, last = alive, logits
            left = (~stopping_criteria(ids, None)[alive]).nonzero()[:, 0]
            step = chosen[left][:, None]
            if len(left) < len(alive):
                alive, memory = alive[left], memory[left]
                mask = None if mask is None else mask[left]
                cache.batch_select_indices(left)
        best[decoded] = last.argmax(-1)
        self.ids, self.log_probs, self.best = ids, torch.stack(kept, 1), best
        return ids
