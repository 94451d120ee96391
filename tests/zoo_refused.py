"""Models the package must refuse by name, because a plausible answer about them would be wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import zoo_build
import zoo_configs as rows


@dataclass(frozen=True)
class RefusedCase:
    """One model to refuse.

    Attributes:
        family: What the model is.
        host: Class name it has in TransformerLens.
        match: Regular expression the refusal must contain.
        majors: TransformerLens versions in which it can be built, and must be refused.
        model: Class name of the Hugging Face model; empty for one built from a
            TransformerLens config.
        config: Class name of its configuration.
        options: Arguments of the configuration.
        tokenizer: Kind of its tokenizer.
    """

    family: str
    host: str
    match: str
    majors: tuple[int, ...]
    model: str = ""
    config: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    tokenizer: rows.TokenizerKind = "llama"

    @property
    def id(self) -> str:
        """Name of the case in test ids."""
        return f"{self.family}-{self.host}"

    def __str__(self) -> str:
        return self.id

    def build(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        """A fresh random model in eval mode."""
        with zoo_build.quiet(), torch.random.fork_rng(devices=[]):
            return self._load(dtype, seed).eval()

    def _load(self, dtype: torch.dtype, seed: int) -> Any:
        if not self.model:
            return zoo_build.config_built(self.options, dtype=dtype, seed=seed)
        hf = zoo_build.hugging_face(self.model, self.config, self.options, dtype=dtype, seed=seed)
        if self.host == "TransformerBridge":
            return zoo_build.bridge(hf, self.tokenizer, dtype=dtype, processed=False)
        return zoo_build.hooked(hf, self.tokenizer, self.host, dtype=dtype, processed=False)


_BRIDGE = "TransformerBridge"
_STATE_SPACE = {
    "vocab_size": rows.D_VOCAB,
    "hidden_size": rows.D_MODEL,
    "num_hidden_layers": rows.N_LAYERS,
    "state_size": 8,
}
_LED = {
    **rows.BART_LIKE,
    "max_encoder_position_embeddings": 2 * rows.N_CTX,
    "max_decoder_position_embeddings": rows.N_CTX,
    "attention_window": 4,
}
del _LED["max_position_embeddings"]

_VIT: dict[str, Any] = {
    "hidden_size": rows.D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": rows.N_HEADS,
    "intermediate_size": rows.D_MLP,
    "image_size": 32,
    "patch_size": 8,
}
_SPEECH: dict[str, Any] = {
    "hidden_size": rows.D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": rows.N_HEADS,
    "intermediate_size": rows.D_MLP,
    "vocab_size": rows.D_VOCAB,
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_ROWS = [
    RefusedCase(
        "mamba", _BRIDGE, "SSM", (3, 4), "MambaForCausalLM", "MambaConfig", _STATE_SPACE, "gpt"
    ),
    # 3.x shows the norms behind the sublayers as if they stood before them.
    RefusedCase(
        "olmo2",
        _BRIDGE,
        "not read correctly",
        (3,),
        rows.FAMILIES["olmo2"].model,
        rows.FAMILIES["olmo2"].config,
        rows.FAMILIES["olmo2"].options,
    ),
    # The encoder attends in windows and shows no pattern.
    RefusedCase(
        "led",
        _BRIDGE,
        "pattern|LED",
        (3, 4),
        "LEDForConditionalGeneration",
        "LEDConfig",
        _LED,
        "bart",
    ),
    *(
        RefusedCase(family, _BRIDGE, match, (4,), model, config, options)
        for family, match, model, config, options in (
            ("vit", "reads images", "ViTForImageClassification", "ViTConfig", _VIT),
            ("wav2vec2", "reads sound", "Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH),
            ("hubert", "reads sound", "HubertForCTC", "HubertConfig", _SPEECH),
        )
    ),
    # The decoder attends to the future; no check against the model itself can see it.
    RefusedCase(
        "t5",
        "HookedEncoderDecoder",
        "future|causal",
        (2,),
        "T5ForConditionalGeneration",
        "T5Config",
        rows.T5_LIKE,
        "t5",
    ),
    # The forward fails, or its pattern hook holds the position bias, by version of transformers.
    RefusedCase(
        "t5",
        _BRIDGE,
        "HookedEncoderDecoder",
        (3,),
        "T5ForConditionalGeneration",
        "T5Config",
        rows.T5_LIKE,
        "t5",
    ),
]

REFUSED: list[RefusedCase] = [case for case in _ROWS if zoo_build.major() in case.majors]
"""What the installed TransformerLens can build and the package must refuse."""
