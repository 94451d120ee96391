"""Which token, which memory, which component made the model say this?

Context-mixing and decomposition methods for TransformerLens models of any class and version.
"""

from tl_contextmix.decompose import decompose
from tl_contextmix.errors import (
    ContextMixError,
    ContextMixWarning,
    FileFormatError,
    InvalidInput,
    UnsupportedModel,
)
from tl_contextmix.evaluate import agreement, cue_alignment, faithfulness
from tl_contextmix.hosts import check
from tl_contextmix.loading import load_demo, load_model
from tl_contextmix.methods.alti import alti
from tl_contextmix.methods.attention import attention
from tl_contextmix.methods.changes import (
    amplified_pairs,
    cancellation,
    contextualization_change,
)
from tl_contextmix.methods.decoder_lens import decoder_lens
from tl_contextmix.methods.decompx import decompx, decompx_vectors
from tl_contextmix.methods.globenc import globenc
from tl_contextmix.methods.gradients import gradient_x_input, integrated_gradients
from tl_contextmix.methods.norms import attention_norms, mixing_ratio
from tl_contextmix.methods.value_zeroing import value_zeroing
from tl_contextmix.report import report
from tl_contextmix.results import (
    ContextMap,
    Decomposition,
    LayerCurves,
    LayerFigures,
    LayerwiseDecoding,
    LayerwiseLikelihood,
    LayerwiseScores,
    PairChanges,
    Score,
    TokenFigures,
)
from tl_contextmix.rollout import rollout

__all__ = [
    "ContextMap",
    "ContextMixError",
    "ContextMixWarning",
    "Decomposition",
    "FileFormatError",
    "InvalidInput",
    "LayerCurves",
    "LayerFigures",
    "LayerwiseDecoding",
    "LayerwiseLikelihood",
    "LayerwiseScores",
    "PairChanges",
    "Score",
    "TokenFigures",
    "UnsupportedModel",
    "agreement",
    "alti",
    "amplified_pairs",
    "attention",
    "attention_norms",
    "cancellation",
    "check",
    "contextualization_change",
    "cue_alignment",
    "decoder_lens",
    "decompose",
    "decompx",
    "decompx_vectors",
    "faithfulness",
    "globenc",
    "gradient_x_input",
    "integrated_gradients",
    "load_demo",
    "load_model",
    "mixing_ratio",
    "report",
    "rollout",
    "value_zeroing",
]
