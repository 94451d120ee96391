"""Models whose numbers would be wrong: refused by name, with the reason and the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tl_contextmix.adapters.recognition import Facts
from tl_contextmix.errors import UnsupportedModel, four_parts


@dataclass(frozen=True)
class Refusal:
    """One kind of model that is refused.

    Attributes:
        name: What it is, in the user's words.
        found: Returns what was seen, or an empty string where the refusal does not apply.
        reason: Why its numbers would be wrong.
        remedy: What the user can do.
    """

    name: str
    found: Callable[[Facts], str]
    reason: str
    remedy: str


def _t5_on_2(facts: Facts) -> str:
    old = facts.major < 3 and facts.host == "HookedEncoderDecoder"
    return "HookedEncoderDecoder of TransformerLens 2" if old else ""


def _t5_on_bridge_3(facts: Facts) -> str:
    old = facts.major == 3 and facts.bridge and "T5For" in facts.architecture
    return f"{facts.architecture} on TransformerBridge 3" if old else ""


def _scaled_residual(facts: Facts) -> str:
    for path, block in facts.block_modules():
        scale = getattr(block, "residual_contribution_scale", 1.0)
        if scale != 1.0:
            return f"a factor of {scale} in {path}"
    return ""


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "T5 on HookedEncoderDecoder 2.x",
        _t5_on_2,
        "its decoder's self-attention attends to the future, so its maps are not T5's",
        "Use TransformerLens 3.x (HookedEncoderDecoder) or 4.x (TransformerBridge).",
    ),
    Refusal(
        "T5 on TransformerBridge 3.x",
        _t5_on_bridge_3,
        "its attention pattern hooks hold the position bias instead of probabilities",
        "Use HookedEncoderDecoder on 3.x, or TransformerLens 4.x.",
    ),
    # Before MoE: the bridge wraps even the dense layers of DeepSeek in its MoE class.
    Refusal(
        "multi-head latent attention (MLA)",
        lambda facts: facts.has_class("MLA"),
        "its value vectors are compressed, and the hooked ones are not what the pattern mixes",
        "Use a model with ordinary attention heads.",
    ),
    Refusal(
        "mixture of experts (MoE)",
        lambda facts: facts.has_class("MoE", "SparseMoe", "Experts"),
        "a token's neurons depend on a router, so there is no one feed-forward block to read",
        "Use a dense model.",
    ),
    Refusal(
        "state-space model (Mamba, SSM) or a hybrid with one",
        lambda facts: (
            facts.has_class("SSM", "Mamba", "GatedDeltaNet", "RWKV", "RecurrentGemma")
            or facts.blocks_without_attention()
        ),
        "it mixes tokens by a recurrence, not by attention patterns and values",
        "Use a transformer.",
    ),
    Refusal(
        "LED",
        lambda facts: facts.architecture if facts.architecture.startswith("LED") else "",
        "its encoder attends in windows and has no attention pattern to read",
        "Use BART or T5 (the encoder-decoders with full attention).",
    ),
    Refusal(
        "T5Gemma",
        lambda facts: facts.architecture if facts.architecture.startswith("T5Gemma") else "",
        "its bridge shows no embedding matrix, and each block has a norm before and behind every "
        "sublayer under names of its own",
        "Use T5, BART, Marian, mBART, M2M100 or Pegasus.",
    ),
    Refusal(
        "Granite's residual scale",
        _scaled_residual,
        "its sublayers are multiplied by a constant before they are added to the residual stream",
        "Use a model without a residual multiplier.",
    ),
)


def require_supported(facts: Facts) -> None:
    """Checks that the model is not one that is refused by name.

    Raises:
        UnsupportedModel: If it is.
    """
    for refusal in REFUSALS:
        seen = refusal.found(facts)
        if seen:
            raise UnsupportedModel(
                four_parts(
                    f"{refusal.name} is not supported, because {refusal.reason}",
                    seen,
                    "a model whose blocks are attention and a dense feed-forward layer",
                    refusal.remedy,
                )
            )


def solu_refusal(model: nn.Module) -> str:
    """Returns why the feed-forward of this model cannot be decomposed, or an empty string."""
    name = str(getattr(getattr(model, "cfg", None), "act_fn", ""))
    if not name.startswith("solu"):
        return ""
    return four_parts(
        "the feed-forward block cannot be decomposed through SoLU",
        f"act_fn={name!r}",
        "an activation that acts on each neuron alone",
        "SoLU is a softmax over the layer, so no slope per neuron exists. Ask for "
        "'attn_out', 'resid_mid' or 'mlp_in', which do not pass it.",
    )
