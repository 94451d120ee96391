"""Which token, which memory, which component made the model say this?

Context-mixing and decomposition methods for TransformerLens models of any class and version.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tl_contextmix.compare import compare, demo_pairs
from tl_contextmix.decompose import decompose
from tl_contextmix.errors import (
    ContextMixError,
    ContextMixWarning,
    FileFormatError,
    InvalidInput,
    UnsupportedModel,
)
from tl_contextmix.evaluate import (
    MinimalPair,
    agreement,
    cue_alignment,
    faithfulness,
    load_minimal_pairs,
)
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
from tl_contextmix.methods.ff_memories import ff_memories
from tl_contextmix.methods.ff_values import ff_values
from tl_contextmix.methods.globenc import globenc
from tl_contextmix.methods.gradients import gradient_x_input, integrated_gradients
from tl_contextmix.methods.knockout import knockout
from tl_contextmix.methods.log_prob import log_prob_contributions
from tl_contextmix.methods.norms import attention_norms, mixing_ratio
from tl_contextmix.methods.queries import query_contributions
from tl_contextmix.methods.readouts import component_readouts
from tl_contextmix.methods.token_memory import token_memory
from tl_contextmix.methods.value_zeroing import value_zeroing
from tl_contextmix.report import report
from tl_contextmix.results import (
    Comparison,
    ComponentReadouts,
    CompositionFigures,
    ContextMap,
    Decomposition,
    Knockout,
    LayerCurves,
    LayerFigures,
    LayerwiseDecoding,
    LayerwiseLikelihood,
    LayerwiseScores,
    LogProbContributions,
    Memories,
    PairChanges,
    QueryContributions,
    Score,
    TokenFigures,
    TokenMemory,
    TriggerAgreement,
    TriggerExamples,
    TriggerPatterns,
    ValueReadouts,
)
from tl_contextmix.rollout import rollout

if TYPE_CHECKING:
    from tl_contextmix.corpus import (
        Triggers,
        composition,
        load_triggers,
        merge_triggers,
        mine_on_ray,
        mine_triggers,
    )

__all__ = [
    "Comparison",
    "ComponentReadouts",
    "CompositionFigures",
    "ContextMap",
    "ContextMixError",
    "ContextMixWarning",
    "Decomposition",
    "FileFormatError",
    "InvalidInput",
    "Knockout",
    "LayerCurves",
    "LayerFigures",
    "LayerwiseDecoding",
    "LayerwiseLikelihood",
    "LayerwiseScores",
    "LogProbContributions",
    "Memories",
    "MinimalPair",
    "PairChanges",
    "QueryContributions",
    "Score",
    "TokenFigures",
    "TokenMemory",
    "TriggerAgreement",
    "TriggerExamples",
    "TriggerPatterns",
    "Triggers",
    "UnsupportedModel",
    "ValueReadouts",
    "agreement",
    "alti",
    "amplified_pairs",
    "attention",
    "attention_norms",
    "cancellation",
    "check",
    "compare",
    "component_readouts",
    "composition",
    "contextualization_change",
    "cue_alignment",
    "decoder_lens",
    "decompose",
    "decompx",
    "decompx_vectors",
    "demo_pairs",
    "faithfulness",
    "ff_memories",
    "ff_values",
    "globenc",
    "gradient_x_input",
    "integrated_gradients",
    "knockout",
    "load_demo",
    "load_minimal_pairs",
    "load_model",
    "load_triggers",
    "log_prob_contributions",
    "merge_triggers",
    "mine_on_ray",
    "mine_triggers",
    "mixing_ratio",
    "query_contributions",
    "report",
    "rollout",
    "token_memory",
    "value_zeroing",
]

# Read when first asked for: mining needs more than everything else, and fewer need it.
_CORPUS = frozenset(
    (
        "Triggers",
        "composition",
        "load_triggers",
        "merge_triggers",
        "mine_on_ray",
        "mine_triggers",
    )
)


def __getattr__(name: str) -> Any:
    if name in _CORPUS:
        return getattr(import_module("tl_contextmix.corpus"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
