"""Which token, which memory, which component made the model say this?

Context-mixing and decomposition methods for TransformerLens models of any class and version.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_contextmix.cite import (
        cite,
    )
    from tl_contextmix.compare import (
        compare,
        demo_pairs,
    )
    from tl_contextmix.corpus import (
        Triggers,
        composition,
        load_triggers,
        merge_triggers,
        mine_on_ray,
        mine_triggers,
    )
    from tl_contextmix.decompose import (
        decompose,
    )
    from tl_contextmix.errors import (
        ContextMixError,
        ContextMixWarning,
        FileFormatError,
        InvalidInput,
        UnsupportedModel,
    )
    from tl_contextmix.estimate import (
        estimate,
    )
    from tl_contextmix.evaluate import (
        MinimalPair,
        agreement,
        cue_alignment,
        faithfulness,
        load_minimal_pairs,
    )
    from tl_contextmix.hosts import (
        check,
    )
    from tl_contextmix.loading import (
        load_demo,
        load_model,
    )
    from tl_contextmix.methods.alti import (
        alti,
    )
    from tl_contextmix.methods.attention import (
        attention,
    )
    from tl_contextmix.methods.changes import (
        amplified_pairs,
        cancellation,
        contextualization_change,
    )
    from tl_contextmix.methods.decoder_lens import (
        decoder_lens,
    )
    from tl_contextmix.methods.decompx import (
        decompx,
        decompx_vectors,
    )
    from tl_contextmix.methods.ff_memories import (
        ff_memories,
    )
    from tl_contextmix.methods.ff_values import (
        ff_values,
    )
    from tl_contextmix.methods.globenc import (
        globenc,
    )
    from tl_contextmix.methods.gradients import (
        gradient_x_input,
        integrated_gradients,
    )
    from tl_contextmix.methods.knockout import (
        knockout,
    )
    from tl_contextmix.methods.log_prob import (
        log_prob_contributions,
    )
    from tl_contextmix.methods.norms import (
        attention_norms,
        mixing_ratio,
    )
    from tl_contextmix.methods.queries import (
        query_contributions,
    )
    from tl_contextmix.methods.readouts import (
        component_readouts,
    )
    from tl_contextmix.methods.token_memory import (
        token_memory,
    )
    from tl_contextmix.methods.value_zeroing import (
        value_zeroing,
    )
    from tl_contextmix.report import (
        report,
    )
    from tl_contextmix.results import (
        Comparison,
        ComponentReadouts,
        CompositionFigures,
        ContextMap,
        Decomposition,
        Estimate,
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
    from tl_contextmix.rollout import (
        rollout,
    )

__all__ = [
    "Comparison",
    "ComponentReadouts",
    "CompositionFigures",
    "ContextMap",
    "ContextMixError",
    "ContextMixWarning",
    "Decomposition",
    "Estimate",
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
    "cite",
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
    "estimate",
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

# Read when first asked for, so that the import costs next to nothing; nobody needs all of it.
_WHERE = {
    "cite": "tl_contextmix.cite",
    "compare": "tl_contextmix.compare",
    "demo_pairs": "tl_contextmix.compare",
    "Triggers": "tl_contextmix.corpus",
    "composition": "tl_contextmix.corpus",
    "load_triggers": "tl_contextmix.corpus",
    "merge_triggers": "tl_contextmix.corpus",
    "mine_on_ray": "tl_contextmix.corpus",
    "mine_triggers": "tl_contextmix.corpus",
    "decompose": "tl_contextmix.decompose",
    "ContextMixError": "tl_contextmix.errors",
    "ContextMixWarning": "tl_contextmix.errors",
    "FileFormatError": "tl_contextmix.errors",
    "InvalidInput": "tl_contextmix.errors",
    "UnsupportedModel": "tl_contextmix.errors",
    "estimate": "tl_contextmix.estimate",
    "MinimalPair": "tl_contextmix.evaluate",
    "agreement": "tl_contextmix.evaluate",
    "cue_alignment": "tl_contextmix.evaluate",
    "faithfulness": "tl_contextmix.evaluate",
    "load_minimal_pairs": "tl_contextmix.evaluate",
    "check": "tl_contextmix.hosts",
    "load_demo": "tl_contextmix.loading",
    "load_model": "tl_contextmix.loading",
    "alti": "tl_contextmix.methods.alti",
    "attention": "tl_contextmix.methods.attention",
    "amplified_pairs": "tl_contextmix.methods.changes",
    "cancellation": "tl_contextmix.methods.changes",
    "contextualization_change": "tl_contextmix.methods.changes",
    "decoder_lens": "tl_contextmix.methods.decoder_lens",
    "decompx": "tl_contextmix.methods.decompx",
    "decompx_vectors": "tl_contextmix.methods.decompx",
    "ff_memories": "tl_contextmix.methods.ff_memories",
    "ff_values": "tl_contextmix.methods.ff_values",
    "globenc": "tl_contextmix.methods.globenc",
    "gradient_x_input": "tl_contextmix.methods.gradients",
    "integrated_gradients": "tl_contextmix.methods.gradients",
    "knockout": "tl_contextmix.methods.knockout",
    "log_prob_contributions": "tl_contextmix.methods.log_prob",
    "attention_norms": "tl_contextmix.methods.norms",
    "mixing_ratio": "tl_contextmix.methods.norms",
    "query_contributions": "tl_contextmix.methods.queries",
    "component_readouts": "tl_contextmix.methods.readouts",
    "token_memory": "tl_contextmix.methods.token_memory",
    "value_zeroing": "tl_contextmix.methods.value_zeroing",
    "report": "tl_contextmix.report",
    "Comparison": "tl_contextmix.results",
    "ComponentReadouts": "tl_contextmix.results",
    "CompositionFigures": "tl_contextmix.results",
    "ContextMap": "tl_contextmix.results",
    "Decomposition": "tl_contextmix.results",
    "Estimate": "tl_contextmix.results",
    "Knockout": "tl_contextmix.results",
    "LayerCurves": "tl_contextmix.results",
    "LayerFigures": "tl_contextmix.results",
    "LayerwiseDecoding": "tl_contextmix.results",
    "LayerwiseLikelihood": "tl_contextmix.results",
    "LayerwiseScores": "tl_contextmix.results",
    "LogProbContributions": "tl_contextmix.results",
    "Memories": "tl_contextmix.results",
    "PairChanges": "tl_contextmix.results",
    "QueryContributions": "tl_contextmix.results",
    "Score": "tl_contextmix.results",
    "TokenFigures": "tl_contextmix.results",
    "TokenMemory": "tl_contextmix.results",
    "TriggerAgreement": "tl_contextmix.results",
    "TriggerExamples": "tl_contextmix.results",
    "TriggerPatterns": "tl_contextmix.results",
    "ValueReadouts": "tl_contextmix.results",
    "rollout": "tl_contextmix.rollout",
}


class _Package(ModuleType):
    """This package: importing its module `compare` must not hide the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _WHERE):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        # What sends functions to other processes (cloudpickle: Ray, Dask, joblib) knows how to
        # send the modules they name, but no classes of modules.
        return import_module, (self.__name__,)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    if isinstance(value, FunctionType):
        from tl_contextmix.arguments import guarded

        value = guarded(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
