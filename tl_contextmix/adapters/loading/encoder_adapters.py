"""Adapters of encoders that TransformerLens 4 does not have, in its own form.

Imported only where one is needed: it imports TransformerLens.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.bert import BertArchitectureAdapter


class _PostNormEncoderAdapter(BertArchitectureAdapter):
    """BERT's blocks under other names.

    Attributes:
        model: Path of the encoder in the Hugging Face model.
        layers: Path of its blocks in there.
        paths: Paths of a block's modules, by TransformerLens' names.
        segments: Whether there are embeddings of segments.
        head: Paths of the head's dense layer, of its norm and of the unembedding.
    """

    model: str
    layers: str
    paths: dict[str, str]
    segments: bool
    head: tuple[str, str, str]

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        embeddings, paths = f"{self.model}.embeddings", self.paths
        dense, norm, unembed = self.head
        attention: dict[str, GeneralizedComponent]
        mlp: dict[str, GeneralizedComponent]
        attention = {name: LinearBridge(name=paths[name]) for name in "qkvo"}
        mlp = {name: LinearBridge(name=paths[name]) for name in ("in", "out")}
        self.component_mapping = {
            "embed": EmbeddingBridge(name=f"{embeddings}.word_embeddings"),
            "pos_embed": PosEmbedBridge(name=f"{embeddings}.position_embeddings"),
            "embed_ln": self._norm(f"{embeddings}.LayerNorm"),
            "blocks": BlockBridge(
                name=f"{self.model}.{self.layers}",
                # As in BERT: the feed-forward module itself is not called.
                hook_alias_overrides={
                    "hook_mlp_out": "mlp.out.hook_out",
                    "hook_mlp_in": "mlp.in.hook_in",
                },
                submodules={
                    "ln1": self._norm(paths["ln1"]),
                    "ln2": self._norm(paths["ln2"]),
                    "attn": AttentionBridge(
                        name="attention", config=self.cfg, submodules=attention
                    ),
                    "mlp": MLPBridge(name=paths.get("mlp"), config=self.cfg, submodules=mlp),
                },
            ),
            "mlm_head": LinearBridge(name=dense),
            "unembed": UnembeddingBridge(name=unembed),
            "ln_final": self._norm(norm),
        }
        if self.segments:
            segments = EmbeddingBridge(name=f"{embeddings}.token_type_embeddings")
            self.component_mapping["token_type_embed"] = segments

    def _norm(self, name: str) -> NormalizationBridge:
        return NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

    def prepare_model(self, hf_model: Any) -> None:
        """Leaves the model as it is: there is no pooler to look for."""


class DistilBertAdapter(_PostNormEncoderAdapter):
    """DistilBERT."""

    model, layers, segments = "distilbert", "transformer.layer", False
    paths = {
        "ln1": "sa_layer_norm",
        "ln2": "output_layer_norm",
        **{name: f"{name}_lin" for name in "qkv"},
        "o": "out_lin",
        "mlp": "ffn",
        "in": "lin1",
        "out": "lin2",
    }
    head = ("vocab_transform", "vocab_layer_norm", "vocab_projector")


class ElectraAdapter(_PostNormEncoderAdapter):
    """The generator of ELECTRA."""

    model, layers, segments = "electra", "encoder.layer", True
    paths = {
        "ln1": "attention.output.LayerNorm",
        "ln2": "output.LayerNorm",
        "q": "self.query",
        "k": "self.key",
        "v": "self.value",
        "o": "output.dense",
        "in": "intermediate.dense",
        "out": "output.dense",
    }
    head = (
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head",
    )


ADAPTERS: dict[str, type[BertArchitectureAdapter]] = {
    "DistilBertForMaskedLM": DistilBertAdapter,
    "ElectraForMaskedLM": ElectraAdapter,
}
