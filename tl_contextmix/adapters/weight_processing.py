"""Detects weight processing, and fingerprints weights."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.adapters.recognition import Facts
from tl_contextmix.core.blocks import AttentionSublayer, Block
from tl_contextmix.core.model_view import ModelView, Notice
from tl_contextmix.errors import InvalidInput, UnsupportedModel, warn

# A model's parameters by name: collecting them takes longer than reading them.
Weights = Mapping[str, Tensor]

# Mean over d_model of a row of W_O, relative to the row's size: below 1e-4 after centring (in
# bfloat16 too), about 1 / sqrt(d_model) = 0.02 or more before.
_CENTRED = 2e-3
_ROWS = 64

# The effect of each step on the numbers of this package, where `_matters` says that it has one.
_EFFECTS = {
    "fold_ln": "norms' gains and biases are folded into the next weights",
    "center_writing_weights": "embeddings and sublayer outputs have zero mean over d_model",
    "center_unembed": "all logits of a position are shifted by the same amount",
    "fold_value_biases": "value biases are folded into the output bias, which belongs to no source",
    "refactor_factored_attn_matrices": "the dimensions of a head's values are changed",
}
# Values of log_prob_contributions' `by` whose components carry values.
_OF_VALUES = ("head", "position", "head_position", "attn_neuron")


def find_processing(facts: Facts, blocks: list[Block]) -> tuple[str, ...]:
    """Returns the names of TransformerLens' weight processing steps that were applied."""
    found = []
    if _norms_folded(facts, blocks):
        found.append("fold_ln")
    attentions = [attention for block in blocks for attention in block.attentions]
    if _centred(attentions[0].W_O):
        found.append("center_writing_weights")
    W_U = getattr(facts.model, "W_U", None)
    if W_U is not None and _centred(W_U):
        found.append("center_unembed")
    if _any(attentions, "b_Q") and not _any(attentions, "b_V"):
        found.append("fold_value_biases")
        if all(_orthonormal(attention.W_O) for attention in attentions):
            found.append("refactor_factored_attn_matrices")
    return tuple(found)


def _centred(matrix: Tensor) -> bool:
    """Whether the rows of a matrix have no mean; those of zeros (ablated heads) are ignored."""
    result, every = False, matrix.flatten(0, -2)
    for rows in (every[:1], *every[1:].split(_ROWS)):  # the first tells in most models
        mean, size = rows.mean(-1).abs(), rows.pow(2).mean(-1).sqrt()
        some = size > 0
        if not bool((mean[some] / size[some] < _CENTRED).all()):
            return False
        result = result or bool(some.any())
    return result


def _orthonormal(W_O: Tensor) -> bool:
    """Whether every head's W_O is orthonormal, up to rounding in half precision."""
    products = W_O @ W_O.mT
    return torch.allclose(products, torch.eye(W_O.shape[-2]).to(products), atol=2e-2)


def _any(attentions: list[AttentionSublayer], name: str) -> bool:
    biases = (attention.weights(name) for attention in attentions)
    return any(bias is not None and bool(bias.any()) for bias in biases)


def _norms_folded(facts: Facts, blocks: list[Block]) -> bool:
    if str(getattr(facts.model.cfg, "normalization_type", "")).endswith("Pre"):
        return True
    # A bridge keeps its norms, with unit gain. So is an untrained norm, and one on the other
    # classes, where folding changes the type.
    if not getattr(facts.model, "_weights_processed", False):
        return False
    sublayers = [one for block in blocks for one in (*block.attentions, block.feed_forward)]
    norms = [one.norm_in for one in sublayers if one is not None and one.norm_in is not None]
    plain = [
        norm.weight is None
        or (bool((norm.weight == 1).all()) and (norm.bias is None or not bool(norm.bias.any())))
        for norm in norms
    ]
    return bool(plain) and all(plain)


def changed_by(method: str, options: Mapping[str, Any], processing: Iterable[str]) -> list[str]:
    """Returns the steps that change a method's numbers; none changes predictions.

    Its options have the `by` of given components in ``removed`` or ``neurons``.
    """
    return [step for step in processing if _matters(step, method, options)]


def _matters(step: str, method: str, options: Mapping[str, Any]) -> bool:
    at, none = options.get("at"), options.get("projection") == "none"
    cuts = [options.get(name) for name in ("by", "removed", "neurons")]
    ratio = options.get("share") == "ratio"
    if method in ("attention_norms", "mixing_ratio", "decompose"):
        # A norm removes the mean anyway, and only its output has its gain.
        one = "fold_ln" if at == "mlp_in" else "center_writing_weights"
        return step in (one, "fold_value_biases")
    if step == "fold_ln":
        return none or ratio or (method == "value_zeroing" and bool(options.get("final_norm")))
    if step == "center_writing_weights":
        # The final norm removes the mean before a readout; lengths include it.
        lengths = str(options.get("score")).endswith("norm")
        return none or ratio or lengths or method in _CENTRED_TOO
    if step == "center_unembed":
        return options.get("of") == "logit" or method in ("component_readouts", "ff_values")
    if step == "fold_value_biases":
        # Mean ablation is unaffected: the mean of a head's values has the same bias.
        cut = any(cut in _OF_VALUES for cut in cuts) and options.get("replace_with") != "mean"
        return cut or method in ("globenc", "alti", "value_zeroing", "token_memory")
    return "attn_neuron" in cuts


_CENTRED_TOO = (
    *("globenc", "alti", "decompx", "value_zeroing", "ff_memories", "ff_values"),
    *("gradient_x_input", "integrated_gradients"),
)


def make_notice(facts: Facts, view: ModelView) -> Notice:
    """Returns a function that warns, once per method, if processing changes its numbers."""
    warned = _WARNED.setdefault(facts.model, set())
    # A model configured with plain norms was trained with them.
    trained = not facts.bridge and getattr(facts.model.cfg, "original_architecture", None) is None
    processing = [step for step in view.processing if step != "fold_ln" or not trained]
    # The closure must not keep the model or the view alive.
    name = view.name
    remedy = f"HookedTransformer.from_pretrained_no_processing({name!r})"
    if facts.bridge:
        remedy = (
            "TransformerBridge.boot_transformers without enable_compatibility_mode(), or with "
            "enable_compatibility_mode(no_processing=True)"
        )

    def notice(method: str, options: Mapping[str, Any]) -> None:
        steps = changed_by(method, options, processing)
        if not steps or (method, *steps) in warned:
            return
        warned.add((method, *steps))
        effects = "; ".join(f"{step}: {_EFFECTS[step]}" for step in steps)
        warn(
            f"{method} of {name} is not that of the published weights",
            f"weights processed by TransformerLens ({effects})",
            "unprocessed weights",
            f"Load the model with {remedy}, or tl_contextmix.load_model.",
        )

    return notice


_WARNED: weakref.WeakKeyDictionary[Any, set[tuple[str, ...]]] = weakref.WeakKeyDictionary()


def fingerprint(weights: Weights) -> str:
    """Returns a hash of all vectors and a sample of every matrix."""
    digest = hashlib.blake2b(digest_size=8)
    samples: dict[torch.device, list[Tensor]] = {}
    for name, weight in weights.items():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        samples.setdefault(weight.device, []).append(sampled(weight).flatten())
    for of_device in samples.values():
        # One transfer for all: on a GPU, each synchronizes.
        digest.update(torch.cat(of_device).to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()


def sampled(weight: Tensor) -> Tensor:
    """Returns a view of all of a vector, or of a few entries along every axis of a matrix."""
    weight = weight.detach()
    if weight.ndim < 2:
        return weight
    return weight[tuple(slice(None, None, max(1, size // 4)) for size in weight.shape)]


def require_present(weights: Weights) -> None:
    """Checks that the weights are in memory.

    Raises:
        UnsupportedModel: If one is not.
    """
    absent = next((name for name, weight in weights.items() if weight.is_meta), None)
    if absent is not None:
        raise UnsupportedModel(
            "cannot read a model with offloaded weights",
            f"no data in {absent}: offloaded, or never loaded",
            "weights in memory, on one device or several",
            "Load it without offloading to CPU or disk in the device map.",
        )


def require_finite(weights: Weights) -> None:
    """Checks that every weight is finite.

    Raises:
        InvalidInput: If one contains NaN or infinity.
    """
    # A sum is finite only if all of its terms are.
    sums = [weight.detach().sum() for weight in weights.values()]
    if bool(torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all()):
        return
    for name, weight in weights.items():
        # Minimum and maximum are NaN if any entry is.
        ends = weight.detach().aminmax() if weight.numel() else ()
        if not all(bool(torch.isfinite(end)) for end in ends):
            raise InvalidInput(
                f"the weight {name} is not finite",
                "NaN or infinity",
                "finite weights",
                "float16 holds numbers up to 65504: load the model in float32 or bfloat16."
                if weight.dtype == torch.float16
                else "Load the weights: HookedEncoder(cfg) and HookedEncoderDecoder(cfg) do not "
                "initialize theirs.",
            )
