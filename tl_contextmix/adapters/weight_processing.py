"""What was done to a model's weights, and a fingerprint of them."""

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
from tl_contextmix.errors import UnsupportedModel, bad, four_parts, warn

# A model's parameters by name. Walking through its modules takes longer than looking at them.
Weights = Mapping[str, Tensor]

# Mean over d_model of a row of W_O, relative to the row's size: below 1e-4 after centring (in
# bfloat16 too), about 1 / sqrt(d_model) = 0.02 or more before.
_CENTRED = 2e-3

# What each step does to the numbers of this package where `_matters` says that it does any.
_EFFECTS = {
    "fold_ln": "what a norm puts out has lost its gain and bias to the weights behind it",
    "center_writing_weights": "embeddings and all that a block writes have lost their mean over "
    "d_model",
    "center_unembed": "all logits of a position have moved by the same amount",
    "fold_value_biases": "values have lost their bias to the output bias, which no head and no "
    "source owns",
    "refactor_factored_attn_matrices": "the dimensions of a head's values are other ones",
}
# Cuts of log_prob_contributions whose parts carry values.
_OF_VALUES = ("head", "position", "head_position", "attn_neuron")


def find_processing(facts: Facts, blocks: list[Block]) -> tuple[str, ...]:
    """Returns the names of TransformerLens' weight processing steps that were applied."""
    found = []
    if _norms_folded(facts, blocks):
        found.append("fold_ln")
    if _centred(blocks[0].attentions[0].W_O):
        found.append("center_writing_weights")
    W_U = getattr(facts.model, "W_U", None)
    if W_U is not None and _centred(W_U):
        found.append("center_unembed")
    attentions = [attention for block in blocks for attention in block.attentions]
    if _any(attentions, "b_Q") and not _any(attentions, "b_V"):
        found.append("fold_value_biases")
        if all(_orthonormal(attention.W_O) for attention in attentions):
            found.append("refactor_factored_attn_matrices")
    return tuple(found)


def _centred(matrix: Tensor) -> bool:
    rows = matrix.flatten(0, -2)
    size = rows.pow(2).mean(-1).sqrt()
    # Rows of zeros (a head that was switched off) say nothing.
    rows, size = rows[size > 0], size[size > 0]
    return rows.numel() > 0 and bool((rows.mean(-1).abs() / size < _CENTRED).all())


def _orthonormal(W_O: Tensor) -> bool:
    """Whether every head has a rotation for W_O, up to rounding in half precision."""
    products = W_O @ W_O.mT
    return torch.allclose(products, torch.eye(W_O.shape[-2]).to(products), atol=2e-2)


def _any(attentions: list[AttentionSublayer], name: str) -> bool:
    biases = (attention.weights(name) for attention in attentions)
    return any(bias is not None and bool(bias.any()) for bias in biases)


def _norms_folded(facts: Facts, blocks: list[Block]) -> bool:
    if str(getattr(facts.model.cfg, "normalization_type", "")).endswith("Pre"):
        return True
    # A bridge keeps its norms and makes them plain. So is a norm before any training, and on the
    # other classes, where folding changes the type.
    if not getattr(facts.model, "_weights_processed", False):
        return False
    norms = [
        norm
        for block in blocks
        for norm in (*(a.norm_in for a in block.attentions), _ff_norm(block))
        if norm is not None
    ]
    plain = [
        norm.weight is None
        or (bool((norm.weight == 1).all()) and (norm.bias is None or not bool(norm.bias.any())))
        for norm in norms
    ]
    return bool(plain) and all(plain)


def _ff_norm(block: Block) -> Any:
    return None if block.feed_forward is None else block.feed_forward.norm_in


def changed_by(method: str, options: Mapping[str, Any], processing: Iterable[str]) -> list[str]:
    """Returns the steps that change the numbers of a method; all leave predictions alone.

    Args:
        method: Name of the method.
        options: Its options, and in ``removed`` or ``neurons`` the cut of what it was given.
        processing: The steps that were applied.
    """
    return [step for step in processing if _matters(step, method, options)]


def _matters(step: str, method: str, options: Mapping[str, Any]) -> bool:
    at, none = options.get("at"), options.get("projection") == "none"
    cuts = [options.get(name) for name in ("by", "removed", "neurons")]
    ratio = options.get("share") == "ratio"
    if method in ("attention_norms", "mixing_ratio", "decompose"):
        # A norm removes the mean itself, and is the one place that has its gain.
        one = "fold_ln" if at == "mlp_in" else "center_writing_weights"
        return step in (one, "fold_value_biases")
    if step == "fold_ln":
        return none or ratio or (method == "value_zeroing" and bool(options.get("final_norm")))
    if step == "center_writing_weights":
        # Readouts behind the final norm do not see a mean; lengths do.
        lengths = str(options.get("score")).endswith("norm")
        return none or ratio or lengths or method in _CENTRED_TOO
    if step == "center_unembed":
        return options.get("of") == "logit" or method in ("component_readouts", "ff_values")
    if step == "fold_value_biases":
        # The mean of a head's values, which may stand in for them, has the bias that they have.
        cut = any(cut in _OF_VALUES for cut in cuts) and options.get("replace_with") != "mean"
        return cut or method in ("globenc", "alti", "value_zeroing", "token_memory")
    return "attn_neuron" in cuts


_CENTRED_TOO = (
    *("globenc", "alti", "decompx", "value_zeroing", "ff_memories", "ff_values"),
    *("gradient_x_input", "integrated_gradients"),
)


def make_notice(facts: Facts, view: ModelView) -> Notice:
    """Returns the function that speaks up, once for each method, where processing changes it."""
    told = _TOLD.setdefault(facts.model, set())
    # One that was configured with plain norms was trained with them, too.
    trained = not facts.bridge and getattr(facts.model.cfg, "original_architecture", None) is None
    processing = [step for step in view.processing if step != "fold_ln" or not trained]
    # Neither the model nor the view may be kept alive by what it holds.
    name, remedy = view.name, _remedy(facts, view)

    def notice(method: str, options: Mapping[str, Any]) -> None:
        steps = changed_by(method, options, processing)
        if not steps or (method, *steps) in told:
            return
        told.add((method, *steps))
        effects = "; ".join(f"{step}: {_EFFECTS[step]}" for step in steps)
        warn(
            four_parts(
                f"{method} of {name} is not that of the weights as published",
                f"weights processed by TransformerLens ({effects})",
                "unprocessed weights. By how much they differ cannot be told: weights that "
                "give any other numbers become these same ones",
                f"Load them with {remedy}, or tl_contextmix.load_model.",
            )
        )

    return notice


_TOLD: weakref.WeakKeyDictionary[Any, set[tuple[str, ...]]] = weakref.WeakKeyDictionary()


def _remedy(facts: Facts, view: ModelView) -> str:
    if facts.bridge:
        return (
            "TransformerBridge.boot_transformers without enable_compatibility_mode(), or with "
            "enable_compatibility_mode(no_processing=True)"
        )
    return f"HookedTransformer.from_pretrained_no_processing({view.name!r})"


def fingerprint(weights: Weights) -> str:
    """Returns a hash over every norm and bias and over a sample of every matrix."""
    digest = hashlib.blake2b(digest_size=8)
    samples: dict[torch.device, list[Tensor]] = {}
    for name, weight in weights.items():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        sample = sampled(weight).flatten().to(torch.float64)
        samples.setdefault(sample.device, []).append(sample)
    for of_device in samples.values():
        # One transfer for all of them: on a GPU each one waits for the device.
        digest.update(torch.cat(of_device).cpu().numpy().tobytes())
    return digest.hexdigest()


def sampled(weight: Tensor) -> Tensor:
    """Returns a view of a few entries along every axis of a matrix, of all of a vector."""
    weight = weight.detach()
    if weight.ndim < 2:
        return weight
    return weight[tuple(slice(None, None, max(1, size // 4)) for size in weight.shape)]


def require_present(weights: Weights) -> None:
    """Checks that the weights are in memory whenever they are looked at.

    Raises:
        UnsupportedModel: If one is not, naming it.
    """
    absent = next((name for name, weight in weights.items() if weight.is_meta), None)
    if absent is not None:
        raise UnsupportedModel(
            four_parts(
                "a model whose weights come and go cannot be read",
                f"no numbers in {absent}: offloaded, or never loaded",
                "weights in memory, on one device or several",
                "Load it without a part of the device map on the CPU or the disk.",
            )
        )


def require_finite(weights: Weights) -> None:
    """Checks every weight.

    Raises:
        InvalidInput: If one holds NaN or infinity, naming it.
    """
    for name, weight in weights.items():
        # Least and greatest are NaN where any entry is.
        ends = weight.detach().aminmax() if weight.numel() else ()
        if not all(bool(torch.isfinite(end)) for end in ends):
            raise bad(
                f"the weight {name} is not finite",
                "NaN or infinity in it",
                "finite weights",
                "Load the weights; HookedEncoder(cfg) and HookedEncoderDecoder(cfg) leave "
                "theirs uninitialised.",
            )
