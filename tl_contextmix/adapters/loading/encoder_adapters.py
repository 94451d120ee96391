"""Adapters of encoders that TransformerLens 4 does not have, in its own form.

Imported only where one is needed: it imports TransformerLens.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.bert import BertArchitectureAdapter

from tl_contextmix.adapters.loading.classifiers import OF_TEXTS, OF_TOKENS

# Where BERT's blocks have their modules, by TransformerLens' names.
_BERT = {
    "ln1": "attention.output.LayerNorm",
    "ln2": "output.LayerNorm",
    "attn": "attention",
    "q": "self.query",
    "k": "self.key",
    "v": "self.value",
    "o": "output.dense",
    "in": "intermediate.dense",
    "out": "output.dense",
}


class _EncoderAdapter(BertArchitectureAdapter):
    """An encoder, by the paths of its modules.

    Attributes:
        model: Path of the encoder in the Hugging Face model.
        layers: Path of its blocks in there.
        embeddings: Paths of what the embeddings are made of in there; those that a model does not
            have are left out.
        paths: Paths in a block: of its norms, of ``attn``, of ``q k v o`` in there, of ``mlp``
            where there is one, of ``in out`` in there, of ``gate`` where it is gated.
        head: Paths of the masked-LM head's dense layer and of its norm, empty without them, and of
            the unembedding.
        final_norm: Path of the norm after the last block in the encoder, or an empty string.
        attention: The bridge's class of attention.
    """

    model: str
    layers = "encoder.layer"
    embeddings: ClassVar[dict[str, str]] = {
        "embed": "embeddings.word_embeddings",
        "token_type_embed": "embeddings.token_type_embeddings",
        "pos_embed": "embeddings.position_embeddings",
        "embed_ln": "embeddings.LayerNorm",
    }
    paths = _BERT
    head: tuple[str, str, str]
    final_norm = ""
    attention: type[AttentionBridge] = AttentionBridge

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.gated_mlp = "gate" in self.paths
        self.weight_processing_conversions = {**self._qkvo_weight_conversions(include_biases=True)}
        embedded = {name: f"{self.model}.{path}" for name, path in self.embeddings.items()}
        dense, norm, unembed = self.head
        final = f"{self.model}.{self.final_norm}" if self.final_norm else ""
        # Where a head has a layer of its own, its norm is "ln_final"; what is before it is the
        # encoder's.
        norms = {"ln_final": norm, "encoder_ln_final": final} if dense else {"ln_final": final}
        self.component_mapping = {
            "embed": EmbeddingBridge(name=embedded.pop("embed")),
            **{name: self._embedding(name, path) for name, path in embedded.items()},
            "blocks": self._blocks(f"{self.model}.{self.layers}"),
            **({"mlm_head": LinearBridge(name=dense)} if dense else {}),
            "unembed": UnembeddingBridge(name=unembed),
            **{name: self._norm(path) for name, path in norms.items() if path},
        }

    def _embedding(self, name: str, path: str) -> GeneralizedComponent:
        if name == "embed_ln":
            return self._norm(path)
        return PosEmbedBridge(name=path) if name == "pos_embed" else EmbeddingBridge(name=path)

    def _blocks(self, name: str) -> BlockBridge:
        paths = self.paths
        attention: dict[str, GeneralizedComponent]
        mlp: dict[str, GeneralizedComponent]
        attention = {name: LinearBridge(name=paths[name]) for name in "qkvo"}
        mlp = {one: LinearBridge(name=paths[one]) for one in ("gate", "in", "out") if one in paths}
        kind = GatedMLPBridge if "gate" in paths else MLPBridge
        called = paths.get("mlp")
        # As in BERT: where there is no feed-forward module, its layers' hooks stand for its own.
        aliases = {"hook_mlp_out": "mlp.out.hook_out", "hook_mlp_in": "mlp.in.hook_in"}
        return BlockBridge(
            name=name,
            hook_alias_overrides=aliases,
            submodules={
                "ln1": self._norm(paths["ln1"]),
                "ln2": self._norm(paths["ln2"]),
                "attn": self.attention(
                    name=paths["attn"], config=self.cfg, submodules=attention, is_causal=False
                ),
                "mlp": kind(name=called, config=self.cfg, submodules=mlp),
            },
        )

    def _norm(self, name: str) -> NormalizationBridge:
        return NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

    def prepare_model(self, hf_model: Any) -> None:
        """Leaves out embeddings that a model does not have, and rows for padding's positions."""
        modules: dict[str, Any] = dict(hf_model.named_modules())
        for name in ("pos_embed", "token_type_embed"):
            path = f"{self.model}.{self.embeddings.get(name, '')}"
            if name in self.components and path not in modules:
                del self.components[name]
        if "pos_embed" in self.components:
            table = modules[f"{self.model}.{self.embeddings['pos_embed']}"]
            if table.padding_idx is not None:
                self.cfg.n_ctx = table.num_embeddings - (table.padding_idx + 1)


class DistilBertAdapter(_EncoderAdapter):
    """DistilBERT."""

    model, layers = "distilbert", "transformer.layer"
    paths = {
        "ln1": "sa_layer_norm",
        "ln2": "output_layer_norm",
        "attn": "attention",
        **{name: f"{name}_lin" for name in "qkv"},
        "o": "out_lin",
        "mlp": "ffn",
        "in": "lin1",
        "out": "lin2",
    }
    head = ("vocab_transform", "vocab_layer_norm", "vocab_projector")


class ElectraAdapter(_EncoderAdapter):
    """The generator of ELECTRA."""

    model = "electra"
    head = (
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head",
    )


# ALBERT runs a few layers many times


class _Unrolled(nn.Module):
    """ALBERT's encoder with a module for every layer that is run; they share their weights."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.embedding_hidden_mapping_in = encoder.embedding_hidden_mapping_in
        groups, count = encoder.albert_layer_groups, encoder.config.num_hidden_layers
        runs = [
            layer
            for run in range(count)
            for layer in groups[int(run / (count / len(groups)))].albert_layers  # as it computes it
        ]
        weights = {id(one): one for one in (*encoder.parameters(), *encoder.buffers())}
        self.layers = nn.ModuleList(copy.deepcopy(layer, {**weights}) for layer in runs)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **given: Any) -> Any:
        """Runs the layers one after the other."""
        from transformers.modeling_outputs import BaseModelOutput

        hidden_states = self.embedding_hidden_mapping_in(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **given)
        return BaseModelOutput(last_hidden_state=hidden_states)


class AlbertAdapter(_EncoderAdapter):
    """ALBERT, each layer read as often as it is run."""

    model, layers = "albert", "encoder.layers"
    paths = {
        "ln1": "attention.LayerNorm",
        "ln2": "full_layer_layer_norm",
        "attn": "attention",
        "q": "query",
        "k": "key",
        "v": "value",
        "o": "dense",
        "in": "ffn",
        "out": "ffn_output",
    }
    head = ("predictions.dense", "predictions.LayerNorm", "predictions.decoder")

    def prepare_model(self, hf_model: Any) -> None:
        """Gives every layer that is run a module of its own."""
        super().prepare_model(hf_model)
        albert = getattr(hf_model, self.model)
        albert.encoder = _Unrolled(albert.encoder)
        self.cfg.n_layers = len(albert.encoder.layers)


# MPNet and DeBERTa show their patterns when asked


class AskedAttention(AttentionBridge):
    """Attention that returns its pattern only where ``output_attentions`` says so.

    `adapters.running` knows it by name: it uses the pattern before it shows it.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it, asking for the pattern."""
        return super().forward(*args, **{**kwargs, "output_attentions": True})


class MPNetAdapter(_EncoderAdapter):
    """MPNet."""

    model, attention = "mpnet", AskedAttention
    paths = {**_BERT, "ln1": "attention.LayerNorm", **{name: f"attn.{name}" for name in "qkvo"}}
    head = ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")


class _TiedHead(nn.Module):
    """DeBERTa-v3's head, its unembedding a layer of its own that has the embeddings' weights."""

    def __init__(self, head: Any, embedding: nn.Embedding) -> None:
        super().__init__()
        self.transform_act_fn, self.dense = head.transform_act_fn, head.dense
        self.LayerNorm = head.LayerNorm
        count, width = embedding.weight.shape
        self.decoder = nn.utils.skip_init(nn.Linear, width, count)
        self.decoder.weight, self.decoder.bias = embedding.weight, head.bias

    def forward(self, x: Tensor, word_embeddings: nn.Module) -> Tensor:
        """Returns the logits."""
        return self.decoder(self.LayerNorm(self.transform_act_fn(self.dense(x))))


class DebertaV2Adapter(_EncoderAdapter):
    """DeBERTa-v2 and v3, whose pattern knows of relative positions."""

    model, attention = "deberta", AskedAttention
    paths = {**_BERT, "q": "self.query_proj", "k": "self.key_proj", "v": "self.value_proj"}
    head = (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
    )

    def prepare_model(self, hf_model: Any) -> None:
        """Finds v3's head, which has other names and no unembedding of its own."""
        super().prepare_model(hf_model)
        predictions = getattr(hf_model, "lm_predictions", None)
        if predictions is not None:
            embedding = getattr(hf_model, self.model).embeddings.word_embeddings
            predictions.lm_head = _TiedHead(predictions.lm_head, embedding)
            self._reprefix_components("cls.predictions.transform.", "lm_predictions.lm_head.")
            self._reprefix_components("cls.predictions.", "lm_predictions.lm_head.")


# Pre-LN encoders with rotary positions


class _RotaryAdapter(_EncoderAdapter):
    """An encoder whose queries and keys are rotated, and whose norms are in front of sublayers."""

    # What is read in front of the first norm, or by an RMSNorm, must keep its mean.
    supports_center_writing_weights = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.positional_embedding_type = "rotary"


class EuroBertAdapter(_RotaryAdapter):
    """EuroBERT: Llama's blocks, attending both ways."""

    model, layers, final_norm = "model", "layers", "norm"
    embeddings = {"embed": "embed_tokens"}
    paths = {
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "attn": "self_attn",
        **{name: f"{name}_proj" for name in "qkvo"},
        "mlp": "mlp",
        "gate": "gate_proj",
        "in": "up_proj",
        "out": "down_proj",
    }
    head = ("", "", "lm_head")

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.normalization_type, self.cfg.uses_rms_norm = "RMS", True


class _Beside(nn.Module):
    """Linear layers in place of one that has their weights one under the other."""

    def __init__(self, whole: nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__()
        for index, name in enumerate(names):
            weight = whole.weight.detach().chunk(len(names))[index]
            part = nn.utils.skip_init(
                nn.Linear, weight.shape[1], weight.shape[0], bias=whole.bias is not None
            )
            part.weight = nn.Parameter(weight)  # the same memory
            if whole.bias is not None:
                part.bias = nn.Parameter(whole.bias.detach().chunk(len(names))[index])
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the one layer would."""
        return torch.cat([part(x) for part in self.children()], dim=-1)


class ModernBertAdapter(_RotaryAdapter):
    """ModernBERT; its fused layers are taken apart."""

    model, layers, final_norm = "model", "layers", "final_norm"
    embeddings = {"embed": "embeddings.tok_embeddings", "embed_ln": "embeddings.norm"}
    paths = {
        "ln1": "attn_norm",
        "ln2": "mlp_norm",
        "attn": "attn",
        **{name: f"Wqkv.{name}" for name in "qkv"},
        "o": "Wo",
        "mlp": "mlp",
        "gate": "Wi.gate",
        "in": "Wi.up",
        "out": "Wo",
    }
    head = ("head.dense", "head.norm", "decoder")

    def prepare_model(self, hf_model: Any) -> None:
        """Takes W_QKV and W_in apart."""
        super().prepare_model(hf_model)
        for layer in getattr(hf_model, self.model).layers:
            layer.attn.Wqkv = _Beside(layer.attn.Wqkv, ("q", "k", "v"))
            layer.mlp.Wi = _Beside(layer.mlp.Wi, ("gate", "up"))


# Classifiers


class BertAdapter(_EncoderAdapter):
    """BERT, for its classifiers: TransformerLens has its own of the masked model."""

    model = "bert"


class RobertaAdapter(_EncoderAdapter):
    """RoBERTa, XLM-R and CamemBERT, likewise."""

    model = "roberta"


def _classifier(adapter: type[_EncoderAdapter], kind: str) -> type[_EncoderAdapter]:
    """Returns the adapter of an encoder with a `classifiers.Head`, of texts or of tokens."""
    modern = adapter is ModernBertAdapter
    layers = kind == OF_TEXTS or modern
    dense, norm = "head.dense" if layers else "", "head.norm" if modern else ""
    own = {"head": (dense, norm, "head.classifier"), "__doc__": f"{adapter.__doc__} {kind}."}
    made: Any = type(f"{adapter.__name__}{kind}", (adapter,), own)
    return made


_ENCODERS: dict[str, type[_EncoderAdapter]] = {
    "Albert": AlbertAdapter,
    "Bert": BertAdapter,
    "Camembert": RobertaAdapter,
    "DebertaV2": DebertaV2Adapter,
    "DistilBert": DistilBertAdapter,
    "Electra": ElectraAdapter,
    "EuroBert": EuroBertAdapter,
    "MPNet": MPNetAdapter,
    "ModernBert": ModernBertAdapter,
    "Roberta": RobertaAdapter,
    "XLMRoberta": RobertaAdapter,
}
ADAPTERS: dict[str, type[BertArchitectureAdapter]] = {
    **{
        f"{name}ForMaskedLM": adapter
        for name, adapter in _ENCODERS.items()
        if adapter not in (BertAdapter, RobertaAdapter)
    },
    **{
        f"{name}{kind}": _classifier(adapter, kind)
        for name, adapter in _ENCODERS.items()
        for kind in (OF_TEXTS, OF_TOKENS)
    },
}
