"""What was done to a model's weights, and a fingerprint of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.adapters.recognition import Facts
from tl_contextmix.core.blocks import AttentionSublayer, Block
from tl_contextmix.errors import UnsupportedModel, bad, four_parts

# A model's parameters by name. Walking through its modules takes longer than looking at them.
Weights = Mapping[str, Tensor]

# Mean over d_model of a row of W_O, relative to the row's size: below 1e-4 after centring (in
# bfloat16 too), about 1 / sqrt(d_model) = 0.02 or more before.
_CENTRED = 2e-3

EFFECTS = {
    "fold_ln": "norm gains and biases live in the following weights, so 'mlp_in' is measured "
    "before them; every other point is unchanged",
    "center_writing_weights": "norms of parts change by up to 14 % per entry",
    "fold_value_biases": "values lose their bias, and norms of parts change by up to 11 % per "
    "entry",
}


def find_processing(facts: Facts, blocks: list[Block]) -> tuple[str, ...]:
    """Returns the names of TransformerLens' weight processing steps that were applied."""
    found = []
    if _norms_folded(facts, blocks):
        found.append("fold_ln")
    if _centred(blocks[0].attentions[0].W_O):
        found.append("center_writing_weights")
    attentions = [attention for block in blocks for attention in block.attentions]
    if _any(attentions, "b_Q") and not _any(attentions, "b_V"):
        found.append("fold_value_biases")
    return tuple(found)


def _centred(W_O: Tensor) -> bool:
    rows = W_O.flatten(0, 1)
    size = rows.pow(2).mean(-1).sqrt()
    # Rows of zeros (a head that was switched off) say nothing.
    rows, size = rows[size > 0], size[size > 0]
    return rows.numel() > 0 and bool((rows.mean(-1).abs() / size < _CENTRED).all())


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


def warning_text(name: str, processing: tuple[str, ...]) -> str:
    """Returns the text of the warning for a processed model, or '' where nothing matters."""
    matter = [step for step in processing if step != "fold_ln"]
    if not matter:
        return ""
    effects = "; ".join(f"{step}: {EFFECTS[step]}" for step in processing)
    return (
        f"{name} has processed weights ({effects}). The papers' maps are of the weights as "
        "published: load with from_pretrained_no_processing (HookedTransformer) or without "
        "enable_compatibility_mode (TransformerBridge) to get those."
    )


def fingerprint(weights: Weights) -> str:
    """Returns a hash over every norm and bias and over a sample of every matrix."""
    digest = hashlib.blake2b(digest_size=8)
    samples: dict[torch.device, list[Tensor]] = {}
    for name, weight in weights.items():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        sample = weight.detach()
        if sample.ndim > 1:
            # A few entries along every axis; slicing copies nothing but the sample.
            steps = (max(1, size // 4) for size in sample.shape)
            sample = sample[tuple(slice(None, None, step) for step in steps)]
        samples.setdefault(sample.device, []).append(sample.flatten().to(torch.float64))
    for of_device in samples.values():
        # One transfer for all of them: on a GPU each one waits for the device.
        digest.update(torch.cat(of_device).cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_stamp(weights: Weights) -> tuple[tuple[int, int, torch.device], ...]:
    """Returns where every weight is and PyTorch's counter of its in-place changes.

    The counter misses changes through ``.data``, which the fingerprint sees if they are large; the
    fingerprint misses small ones inside a matrix, which the counter sees.
    """
    return tuple(
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.device)
        for weight in weights.values()
    )


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
