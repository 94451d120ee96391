"""Evaluates maps: alignment with known cues, faithfulness to the model, agreement."""

from tl_contextmix.evaluation.agreement import agreement
from tl_contextmix.evaluation.alignment import Cues, cue_alignment
from tl_contextmix.evaluation.faithfulness import (
    Drop,
    blank_token,
    blanked,
    faithfulness,
    faithfulness_of,
    warn_of_short,
)
from tl_contextmix.evaluation.minimal_pairs import (
    MinimalPair,
    demo_pairs,
    load_minimal_pairs,
    overlapping,
    place_tokens,
)
from tl_contextmix.evaluation.sentences import Sentence, Unusable, sentences_of

__all__ = [
    "Cues",
    "Drop",
    "MinimalPair",
    "Sentence",
    "Unusable",
    "agreement",
    "blank_token",
    "blanked",
    "cue_alignment",
    "demo_pairs",
    "faithfulness",
    "faithfulness_of",
    "load_minimal_pairs",
    "overlapping",
    "place_tokens",
    "sentences_of",
    "warn_of_short",
]
