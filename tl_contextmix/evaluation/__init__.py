"""Evaluates maps: alignment with known cues, faithfulness to the model, agreement."""

from tl_contextmix.evaluation.agreement import agreement
from tl_contextmix.evaluation.alignment import Cues, cue_alignment
from tl_contextmix.evaluation.annotations import read_annotations
from tl_contextmix.evaluation.answer_metrics import (
    alias_match,
    assigns_variables,
    in_language,
    satisfies,
)
from tl_contextmix.evaluation.corpus_figures import over_corpus
from tl_contextmix.evaluation.corpus_on_ray import over_corpus_on_ray
from tl_contextmix.evaluation.corpus_state import merge_figures
from tl_contextmix.evaluation.faithfulness import (
    Drop,
    blank_token,
    blanked,
    faithfulness,
    faithfulness_of,
    warn_of_short,
)
from tl_contextmix.evaluation.hook_names import hook_names
from tl_contextmix.evaluation.log_prob_curves import knockout_curve, log_prob_path
from tl_contextmix.evaluation.minimal_pairs import (
    MinimalPair,
    demo_pairs,
    load_minimal_pairs,
    overlapping,
    place_tokens,
)
from tl_contextmix.evaluation.norm_statistics import (
    alignment_error_rate,
    expansion_rates,
    frequency_correlation,
)
from tl_contextmix.evaluation.sentences import Sentence, Unusable, sentences_of
from tl_contextmix.evaluation.word_labels import by_kind, label_tokens

__all__ = [
    "Cues",
    "Drop",
    "MinimalPair",
    "Sentence",
    "Unusable",
    "agreement",
    "alias_match",
    "alignment_error_rate",
    "assigns_variables",
    "blank_token",
    "blanked",
    "by_kind",
    "cue_alignment",
    "demo_pairs",
    "expansion_rates",
    "faithfulness",
    "faithfulness_of",
    "frequency_correlation",
    "hook_names",
    "in_language",
    "knockout_curve",
    "label_tokens",
    "load_minimal_pairs",
    "log_prob_path",
    "merge_figures",
    "over_corpus",
    "over_corpus_on_ray",
    "overlapping",
    "place_tokens",
    "read_annotations",
    "satisfies",
    "sentences_of",
    "warn_of_short",
]
