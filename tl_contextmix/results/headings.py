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
    # levels
    "head_position": "head and position",
    "ff_neuron": "feed-forward neuron",
    "attn_neuron": "attention neuron",
    # metrics
    "dot": "alignment with the cue",
}


def in_plain_words(name: str) -> str:
    """Returns a method, point, level, kind of component or metric in words."""
    return _WORDS.get(name, name.replace("_", " "))


def as_heading(text: str) -> str:
    """Returns a text with a capital at its beginning; the rest stays."""
    return f"{text[:1].upper()}{text[1:]}"
