"""What mkdocs makes beside the pages: a reference page for each public object, equations as MathML.

Browsers show MathML themselves, so that no page needs a script or a font from elsewhere.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)

REFERENCE = {
    "Models": """
        adapters.loading.load_model adapters.loading.load_demo adapters.views.check
        evaluation.hook_names.hook_names evaluation.cost.estimate.estimate
        adapters.inputs.tokens.Inputs adapters.dictionaries.Dictionary""",
    "Questions": """
        adapters.questions.Asked adapters.questions.directions.Direction""",
    "Context mixing": """
        methods.norms.attention_norms methods.value_zeroing.value_zeroing
        methods.attention.attention methods.attention_flow.attention_flow methods.globenc.globenc
        methods.alti.alti methods.decompx.decompx methods.decompx.decompx_vectors
        methods.gradients.gradient_x_input methods.gradients.integrated_gradients
        methods.decompose.decompose methods.norms.mixing_ratio""",
    "Feed-forward blocks": """
        methods.norm_changes.contextualization_change methods.norm_changes.amplified_pairs
        methods.norm_changes.cancellation methods.memories.ff_memories.ff_memories
        methods.memories.ff_values.ff_values methods.memories.mining.mine_triggers
        methods.memories.mining.merge_triggers methods.memories.on_ray.mine_on_ray
        methods.memories.triggers.load_triggers methods.memories.composition.composition
        methods.memories.token_memory.token_memory methods.memories.triggers.Triggers""",
    "The answer": """
        methods.log_prob.contributions.log_prob_contributions
        methods.log_prob.queries.query_contributions methods.log_prob.readouts.component_readouts
        methods.log_prob.knockout.knockout methods.attention_knockout.attention_knockout
        methods.flow.flow methods.flow_knockout.flow_knockout
        methods.information_flow_routes.information_flow_routes evaluation.scan.scan
        evaluation.context_reliance.context_reliance methods.decoder_lens.lens.decoder_lens""",
    "Evaluation": """
        evaluation.compare.compare evaluation.alignment.cue_alignment
        evaluation.faithfulness.faithfulness evaluation.agreement.agreement
        evaluation.probing.probe evaluation.minimal_pairs.MinimalPair
        evaluation.minimal_pairs.load_minimal_pairs evaluation.minimal_pairs.demo_pairs""",
    "Pages and citations": """
        reporting.report reporting.build_report reporting.write_report engine.citations.cite""",
    "Results": """
        results.base.Result results.labelled_arrays.LabelledArray
        results.context_map.ContextMap results.decomposition.Decomposition
        results.decomposition.HeadDecomposition results.attribution_graph.AttributionGraph
        results.log_prob_contributions.LogProbContributions
        results.query_contributions.QueryContributions
        results.component_readouts.ComponentReadouts results.ablation.Knockout
        results.ablation.FlowKnockout results.attention_cuts.AttentionKnockout
        results.scanned.Scan results.reliance.ContextReliance results.active_memories.Memories
        results.value_readouts.ValueReadouts results.token_memories.TokenMemory
        results.memory_composition.CompositionFigures results.pair_changes.PairChanges
        results.layer_metrics.LayerFigures results.layer_metrics.TokenFigures
        results.curves.LayerCurves results.decodings.LayerwiseDecoding
        results.likelihoods.LayerwiseLikelihood results.likelihoods.LayerwiseScores
        results.comparison.Comparison results.scores.Score results.scores.Differences
        results.probed_layers.Probing results.probed_layers.ProbedMaps
        results.trigger_tables.TriggerExamples results.trigger_tables.TriggerAgreement
        results.trigger_tables.TriggerPatterns results.cost_estimate.Estimate
        results.labels.Tokens""",
    "Errors and warnings": """
        errors.ContextMixError errors.InvalidInput errors.UnsupportedModel errors.FileFormatError
        errors.ContextMixWarning""",
}
"""Headings of the reference, and what stands below each: public objects, where they are defined."""


def on_config(config: Any) -> Any:
    """Puts the pages of the reference at the end of the navigation."""
    sections = [
        {heading: [{_name(path): _page(path)} for path in paths.split()]}
        for heading, paths in REFERENCE.items()
    ]
    config["nav"].append({"API reference": ["api/index.md", *sections]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each public object, and their table."""
    lines = ["# API reference", ""]
    for heading, paths in REFERENCE.items():
        lines += [f"## {heading}", ""]
        for path in paths.split():
            text = f"---\ntitle: {_name(path)}\n---\n::: tl_contextmix.{path}\n"
            text += "    options: {heading_level: 1}\n"
            files.append(File.generated(config, _page(path), content=text))
            lines.append(f"- [`{_name(path)}`][tl_contextmix.{path}]")
        lines.append("")
    files.append(File.generated(config, "api/index.md", content="\n".join(lines)))
    return files


def on_page_content(text: str, **others: Any) -> str:
    """Turns the LaTeX that Markdown left between its marks into MathML."""
    text = _DISPLAY.sub(lambda found: _math(found[1], "block"), text)
    return _INLINE.sub(lambda found: _math(found[1], "inline"), text)


def _math(latex: str, display: str) -> str:
    return convert(html.unescape(latex).strip(), display=display)


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _page(path: str) -> str:
    return f"api/{_name(path)}.md"
