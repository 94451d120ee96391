"""What stands for a name of the code where it heads a picture or a table."""

from __future__ import annotations

_WORDS = {
    # methods
    "value_zeroing": "Value Zeroing",
    "alti": "ALTI",
    "decompx": "DecompX",
    "globenc": "GlobEnc",
    "log_prob_contributions": "log-probability contributions",
    "gradient_x_input": "gradient times input",
    # points
    "attn_out": "attention output",
    "resid_mid": "stream after attention",
    "mlp_in": "feed-forward input",
    "mlp_out": "feed-forward output",
    "resid_post": "stream after the block",
    "block_out": "block output",
    "resid_in": "input of the model",
    # kinds of components
    "attn": "attention",
    "cross_attn": "cross-attention",
    "mlp": "feed-forward block",
    "embed": "embedding",
    "per_layer_embed": "embedding of the layer",
    # levels
    "head_position": "head and position",
    "ff_neuron": "feed-forward neuron",
    "attn_neuron": "attention neuron",
    # whose top token an output has
    "residual": "residual stream",
    "ffn": "feed-forward output",
    # metrics
    "dot": "alignment with the cue",
}


def in_plain_words(name: str) -> str:
    """Returns a method, point, level, kind of component or metric in words."""
    return _WORDS.get(name, name.replace("_", " "))


def known_in_words(name: str) -> str:
    """Returns a name of this package in words; what others named, such as a category, stays."""
    return _WORDS.get(name, name)


def as_heading(text: str) -> str:
    """Returns a text with a capital at its beginning; the rest stays."""
    return f"{text[:1].upper()}{text[1:]}"
