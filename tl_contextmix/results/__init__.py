"""What the methods return: frozen, labelled, able to show, tabulate and save themselves.

Axis words, here and everywhere: batch layer head target source pos d_model. `target` is the
position that is written (a row), `source` the position that is read (a column).

Results are compared with ``equals`` (``==`` is identity, as for tensors it has no yes or no) and
never changed: every operation returns a new one. Nothing is rounded, thresholded or renormalised
unless asked for. NaN means "there is no such number"; it is kept by arithmetic and tables and left
out of rankings.
"""

from tl_contextmix.results.ablation import FlowKnockout, Knockout
from tl_contextmix.results.active_memories import Memories
from tl_contextmix.results.attention_cuts import AttentionKnockout
from tl_contextmix.results.attribution_graph import AttributionGraph, GraphNode
from tl_contextmix.results.base import Result
from tl_contextmix.results.comparison import Comparison, Cost
from tl_contextmix.results.component_readouts import ComponentReadouts
from tl_contextmix.results.components import Components
from tl_contextmix.results.context_map import ContextMap
from tl_contextmix.results.cost_estimate import Estimate, EstimatePart
from tl_contextmix.results.curves import CurvePoint, LayerCurves
from tl_contextmix.results.decodings import LayerwiseDecoding
from tl_contextmix.results.decomposition import Decomposition, HeadDecomposition
from tl_contextmix.results.labels import Provenance, Tokens
from tl_contextmix.results.layer_metrics import LayerFigures, TokenFigures
from tl_contextmix.results.likelihoods import (
    LIKELIHOOD_METRICS,
    LayerwiseLikelihood,
    LayerwiseScores,
)
from tl_contextmix.results.log_prob_contributions import LogProbContributions
from tl_contextmix.results.memory_composition import CompositionFigures
from tl_contextmix.results.pair_changes import Pair, PairChanges
from tl_contextmix.results.probed_layers import ProbedMaps, Probing
from tl_contextmix.results.query_contributions import QueryContributions
from tl_contextmix.results.reliance import ContextReliance
from tl_contextmix.results.scanned import Scan
from tl_contextmix.results.score_contributions import ScoreContributions
from tl_contextmix.results.scores import DifferenceRow, Differences, Score, ScoreRow
from tl_contextmix.results.token_memories import TokenMemory
from tl_contextmix.results.trigger_tables import (
    Pattern,
    Trigger,
    TriggerAgreement,
    TriggerExamples,
    TriggerPatterns,
)
from tl_contextmix.results.value_readouts import ValueReadouts

__all__ = [
    "LIKELIHOOD_METRICS",
    "AttentionKnockout",
    "AttributionGraph",
    "Comparison",
    "ComponentReadouts",
    "Components",
    "CompositionFigures",
    "ContextMap",
    "ContextReliance",
    "Cost",
    "CurvePoint",
    "Decomposition",
    "DifferenceRow",
    "Differences",
    "Estimate",
    "EstimatePart",
    "FlowKnockout",
    "GraphNode",
    "HeadDecomposition",
    "Knockout",
    "LayerCurves",
    "LayerFigures",
    "LayerwiseDecoding",
    "LayerwiseLikelihood",
    "LayerwiseScores",
    "LogProbContributions",
    "Memories",
    "Pair",
    "PairChanges",
    "Pattern",
    "ProbedMaps",
    "Probing",
    "Provenance",
    "QueryContributions",
    "Result",
    "Scan",
    "Score",
    "ScoreContributions",
    "ScoreRow",
    "TokenFigures",
    "TokenMemory",
    "Tokens",
    "Trigger",
    "TriggerAgreement",
    "TriggerExamples",
    "TriggerPatterns",
    "ValueReadouts",
]
