"""What mkdocs makes beside the pages: the reference, the tutorials, and equations as MathML.

Every public object has a page of the reference. Tutorials are the notebooks with the outputs that
they are committed with. Browsers show MathML themselves, so that no page needs a script or a font
from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "demos").glob("*.ipynb"))
# What a reader sees without a script, of all that a cell shows.
STILL = ("image/svg+xml", "image/png", "text/markdown", "text/plain")

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
    "Experiments": """
        evaluation.corpus_figures.over_corpus evaluation.corpus_on_ray.over_corpus_on_ray
        evaluation.corpus_state.merge_figures evaluation.word_labels.by_kind
        evaluation.word_labels.label_tokens evaluation.norm_statistics.alignment_error_rate
        evaluation.norm_statistics.frequency_correlation
        evaluation.norm_statistics.expansion_rates evaluation.annotations.read_annotations
        evaluation.log_prob_curves.log_prob_path evaluation.log_prob_curves.knockout_curve
        evaluation.answer_metrics.alias_match evaluation.answer_metrics.assigns_variables
        evaluation.answer_metrics.satisfies evaluation.answer_metrics.in_language""",
    "Pages and citations": """
        reporting.report reporting.write_report reporting.write_results
        reporting.lit_fields.lit_model exploring.explore engine.citations.cite""",
    "Results": """
        results.base.Result results.labelled_arrays.LabelledArray
        results.context_map.ContextMap results.decomposition.Decomposition
        results.decomposition.HeadDecomposition results.attribution_graph.AttributionGraph
        results.log_prob_contributions.LogProbContributions
        results.query_contributions.QueryContributions
        results.score_contributions.ScoreContributions
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
        results.scores.ScoreTable results.token_groups.Groups results.token_groups.Group
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
    tutorials = ["tutorials/index.md", *(f"tutorials/{path.stem}.md" for path in NOTEBOOKS)]
    for entry in config["nav"]:
        if "Tutorials" in entry:
            entry["Tutorials"] = tutorials
    config["nav"].append({"API reference": ["api/index.md", *sections]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the reference, the tutorials, CONTRIBUTING.md and the report's pictures."""
    made = [*_reference(), *_tutorials(), ("contributing.md", _contributing())]
    for path, content in made:
        files.append(File.generated(config, path, content=content))
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_content(text: str, **others: Any) -> str:
    """Turns the LaTeX that Markdown left between its marks into MathML."""
    # On a phone, a wide equation scrolls, not the page.
    scrolled = '<div style="overflow-x: auto">{}</div>'
    text = _DISPLAY.sub(lambda found: scrolled.format(_math(found[1], "block")), text)
    return _INLINE.sub(lambda found: _math(found[1], "inline"), text)


def _reference() -> Iterator[tuple[str, str]]:
    """Yields a page for each public object, and their table."""
    lines = ["# API reference", ""]
    for heading, paths in REFERENCE.items():
        lines += [f"## {heading}", ""]
        for path in paths.split():
            lines.append(f"- [`{_name(path)}`][tl_contextmix.{path}]")
            directive = f"::: tl_contextmix.{path}\n    options: {{heading_level: 1}}\n"
            yield _page(path), f"---\ntitle: {_name(path)}\n---\n{directive}"
        lines.append("")
    yield "api/index.md", "\n".join(lines)


def _tutorials() -> Iterator[tuple[str, str | bytes]]:
    """Yields a page for each notebook, its pictures, and their table."""
    settings = Config({"NbConvertBase": {"display_data_priority": list(STILL)}})
    rows = ["| | notebook | about |", "|---|---|---|"]
    for number, path in enumerate(NOTEBOOKS, 1):
        notebook = nbformat.read(path, as_version=4)
        first = str(notebook.cells[0].source).splitlines()
        about = " ".join(first[2:]).split(". ")[0].split("? ")[0]
        rows.append(f"| {number} | [{first[0].lstrip('# ')}]({path.stem}.md) | {about} |")
        exporter = MarkdownExporter(config=settings)
        text, found = exporter.from_notebook_node(notebook, {"unique_key": path.stem})
        yield f"tutorials/{path.stem}.md", text
        yield from ((f"tutorials/{name}", data) for name, data in found["outputs"].items())
    head = "# Tutorials\n\nNotebooks in `demos/`, in the order to read them; all run offline.\n\n"
    yield "tutorials/index.md", head + "\n".join(rows) + "\n"


def _contributing() -> str:
    """Returns CONTRIBUTING.md with the links that it has from here."""
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/pages/", "](")


def _math(latex: str, display: str) -> str:
    return convert(html.unescape(latex).strip(), display=display)


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _page(path: str) -> str:
    return f"api/{_name(path)}.md"
