"""Classifiers of texts, or of each token, that were made of encoders by fine-tuning.

The head of a classifier of texts reads the first token. Here it reads every token, as heads of
masked language models do, and the answer is what it says of the first. Whether that is what the
model itself says is seen on a few tokens, before anything is asked.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tl_contextmix.errors import UnsupportedModel

OF_TEXTS, OF_TOKENS = "ForSequenceClassification", "ForTokenClassification"
ENCODERS = (
    *("albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "eurobert"),
    *("modernbert", "mpnet", "roberta", "xlm-roberta"),
)
"""Types of the models whose classifiers are read."""
_ACTIVATIONS = (nn.Tanh, nn.GELU, nn.ReLU)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def classifies(architecture: str, model_type: str) -> bool:
    """Whether an architecture is a classifier that is read here."""
    return architecture.endswith((OF_TEXTS, OF_TOKENS)) and model_type in ENCODERS


class Head(nn.Module):
    """A classifier's head on every token: dense layer, activation and norm, if any, classifier."""

    def __init__(
        self, dense: nn.Module | None, activation: Any, norm: nn.Module | None, last: nn.Module
    ) -> None:
        super().__init__()
        self.dense, self.norm, self.classifier = dense, norm, last
        self.activation = activation if isinstance(activation, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of each class."""
        x = x if self.dense is None else self.activation(self.dense(x))
        return self.classifier(x if self.norm is None else self.norm(x))


def on_every_token(hf_model: Any) -> Any:
    """Returns a classifier whose logits are of every token, with the model's own modules.

    Raises:
        UnsupportedModel: If its answer is not what its head says of the first token (a mean over
            tokens), or no class (a regression, several labels at a time).
    """
    _require_classes(hf_model)
    hf_model.eval()
    ids = torch.tensor([[11, 18, 25, 32]], device=hf_model.device) % hf_model.config.vocab_size
    with torch.no_grad():
        expected = hf_model(ids).logits
    result = _with_head(hf_model)
    each = expected.ndim == 3
    errors = []
    # What may stand between the layers of a head: its own, or what a function does there.
    for activation in (result.head.activation, *(kind() for kind in _ACTIVATIONS)):
        result.head.activation = activation
        with torch.no_grad():
            logits = result(ids).logits
        errors.append(_error(logits if each else logits[:, 0], expected))
        if errors[-1] <= _TOLERANCE.get(expected.dtype, 2e-2):
            return result
    raise UnsupportedModel(
        f"the answer of {type(hf_model).__name__} is not its head's on the first token",
        f"a relative error of {min(errors):.2g}"
        + _setting(hf_model.config, "classifier_pooling", ", classifier_pooling="),
        "a head of one or two layers on the first token",
        "Ask about the same encoder with a masked-LM head, or with a head on the first token.",
    )


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _require_classes(hf_model: Any) -> None:
    config = hf_model.config
    several = config.problem_type == "multi_label_classification"
    if config.num_labels > 1 and not several and config.problem_type != "regression":
        return
    raise UnsupportedModel(
        f"what {type(hf_model).__name__} answers is not one class of several",
        f"num_labels={config.num_labels}{_setting(config, 'problem_type', ', problem_type=')}",
        "two classes or more, of which one is right",
        "Its probabilities would not be a softmax: ask about the encoder itself.",
    )


def _setting(config: Any, name: str, before: str) -> str:
    value = getattr(config, name, None)
    return "" if value is None else f"{before}{value!r}"


def _with_head(hf_model: Any) -> Any:
    """Returns a model of the same class with its encoder and a head on every token.

    The model itself keeps its own head, and an encoder that pools.
    """
    prefix, base = hf_model.base_model_prefix, hf_model.base_model
    head = _head(hf_model, base)
    modules = dict(base._modules)
    if modules.get("pooler") is not None:
        modules["pooler"] = None  # its layers are the head's
    base = _like(base, type(base), modules)
    return _like(hf_model, _answering_everywhere(type(hf_model)), {prefix: base, "head": head})


def _like(module: nn.Module, kind: type, modules: dict[str, Any]) -> Any:
    """Returns a module with another's attributes and weights and modules of its own."""
    result: Any = object.__new__(kind)
    own = module.__dict__.items()
    result.__dict__.update((k, v.copy() if isinstance(v, dict) else v) for k, v in own)
    result._modules = modules
    return result


@functools.cache
def _answering_everywhere(kind: type) -> type:
    """Returns the class, by its name, of such models that give the logits of every token."""
    return type(kind.__name__, (kind,), {"forward": _forward, "__module__": kind.__module__})


def _forward(self: Any, *given: Any, **named: Any) -> Any:
    """Returns the logits of every token."""
    from transformers.modeling_outputs import TokenClassifierOutput

    found = self.base_model(*given, **named)
    return TokenClassifierOutput(
        logits=self.head(found[0]), hidden_states=found.hidden_states, attentions=found.attentions
    )


def _head(hf_model: Any, base: Any) -> Head:
    """Returns the layers of a classifier's head, wherever its class keeps them."""
    last = hf_model.classifier
    if hasattr(last, "out_proj"):  # RoBERTa, ELECTRA, MPNet
        return Head(last.dense, getattr(last, "activation", None), None, last.out_proj)
    own = hf_model._modules
    if (head := own.get("head")) is not None:  # ModernBERT
        return Head(head.dense, head.act, head.norm, last)
    if own.get("dense") is not None:  # EuroBERT
        return Head(own["dense"], own.get("activation"), None, last)
    if type(hf_model).__name__.endswith(OF_TOKENS):
        return Head(None, None, None, last)
    pooler = own.get("pooler") or getattr(base, "pooler", None)  # DeBERTa, or BERT and ALBERT
    dense = own.get("pre_classifier") or getattr(pooler, "dense", pooler)  # DistilBERT
    return Head(dense, getattr(base, "pooler_activation", None), None, last)
