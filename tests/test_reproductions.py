"""The papers, reproduced in small: every script runs, and what is published is what was found."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import published
import pytest
import transformers
import zoo_build

from tl_contextmix.demo_models import demo_folder
from tl_contextmix.errors import ContextMixWarning
from tl_contextmix.evaluation import MinimalPair

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "reproductions"))

import claims  # noqa: E402


def script(name: str) -> Any:
    """A script as a module under a name of its own: benchmarks/ has some of the same names."""
    spec = importlib.util.spec_from_file_location(
        f"reproductions_{name}", ROOT / "reproductions" / f"{name}.py"
    )
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


value_zeroing = script("value_zeroing")

pytestmark = pytest.mark.once

SCRIPTS = {
    "decoder_lens": ["--task", "mt,logic,asr", "--steps", "2", "--limit", "2"],
    "feed_forward_maps": ["--model", "causal-lm", "--limit", "3"],
    "feed_forward_memories": ["--limit", "16", "--draws", "2"],
    "log_prob_increase": ["--limit", "3", "--neurons", "3"],
    "norms": ["--model", "masked-lm", "--limit", "3"],
    "value_zeroing": ["--model", "masked-lm", "--limit", "2", "--texts", "24", "--seeds", "1"],
}


def test_there_is_a_script_for_every_file_that_is_published() -> None:
    scripts = {path.stem for path in (ROOT / "reproductions").glob("*.py")}
    assert {*SCRIPTS} == scripts - {"claims", "tiny_tasks"}
    assert {*SCRIPTS} == {one["script"] for one in claims.stored()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_scores_its_claims(name: str, tmp_path: Path) -> None:
    module = script(name)
    found = module.main([*SCRIPTS[name], "-o", str(tmp_path)])
    assert json.loads((tmp_path / f"{name}.json").read_text("utf-8")) == found
    assert found["claims"][0]["words"] in (tmp_path / f"{name}.html").read_text("utf-8")
    published = next(one for one in claims.stored() if one["script"] == name)
    names = {one["name"] for one in published["claims"]}
    assert {one["name"] for one in found["claims"]} <= names
    for one in [*found["claims"], *published["claims"]]:
        assert one["verdict"] == verdict(one), one["name"]


def verdict(one: dict[str, Any]) -> str:
    """What follows from an interval and a bound."""
    low, high = (math.nan if one[end] is None else one[end] for end in ("low", "high"))
    if one["count"] >= 6 and low > one["above"]:
        return "holds"
    return "does not hold" if one["count"] >= 6 and high < one["above"] else "cannot be said here"


SMALL: dict[str, dict[str, int]] = {
    "causal-lm": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "masked-lm": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "encoder-decoder": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 1,
    },
}
AUTO = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny random models, as Hugging Face saves them."""
    found = {}
    for name, sizes in SMALL.items():
        folder = tmp_path_factory.mktemp(name)
        config = transformers.AutoConfig.from_pretrained(demo_folder(name), **sizes)
        model = AUTO[name].from_config(config)
        zoo_build.randomize(model, seed=1)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(demo_folder(name)).save_pretrained(folder)
        found[name] = str(folder)
    return found


BLIMP_SETS = tuple(dict.fromkeys(uid for uid, *_ in published.BLIMP))
# A script, its model, options, and what writes its data.
PUBLISHED: list[tuple[str, str, str, Callable[[Path], str]]] = [
    ("decoder_lens", "encoder-decoder", "", published.trivia_qa),
    ("decoder_lens", "encoder-decoder", "", published.parallel),
    ("feed_forward_maps", "masked-lm", "", published.glue),
    ("feed_forward_maps", "masked-lm", "", published.segments),
    ("feed_forward_memories", "causal-lm", "--draws 2", published.wikitext),
    ("log_prob_increase", "causal-lm", "--neurons 3", published.known_facts),
    ("norms", "masked-lm", "", published.segments),
    (
        "value_zeroing",
        "masked-lm",
        "--texts 20 --seeds 1",
        partial(published.blimp, uids=BLIMP_SETS),
    ),
]


@pytest.mark.parametrize(("name", "model", "more", "data"), PUBLISHED)
def test_every_script_reads_what_its_paper_had(
    name: str,
    model: str,
    more: str,
    data: Callable[[Path], str],
    folders: dict[str, str],
    tmp_path: Path,
) -> None:
    options = ["--model", folders[model], "--data", data(tmp_path), *more.split()]
    options += ["-o", str(tmp_path)]
    if name == "norms":
        options += ["--translator", folders["encoder-decoder"]]
        options += ["--bitext", published.gold_alignment(tmp_path)]
    found = script(name).main(options)
    figures = [row for table in found["tables"].values() for row in table]
    assert any(isinstance(value, float) for row in figures for value in row.values())
    for one in found["claims"]:
        assert one["model"] in folders.values()
        assert one["verdict"] == verdict(one), one["name"]


def test_cue_metrics_come_from_sets_of_blimp_alone(folders: dict[str, str], tmp_path: Path) -> None:
    files = published.blimp(tmp_path, BLIMP_SETS[:2])
    some = ["--model", folders["masked-lm"], "--limit", "4", "--texts", "20", "--seeds", "1"]
    found = value_zeroing.main([*some, "--data", files, "-o", str(tmp_path)])
    table = found["tables"][f"{folders['masked-lm']}: by set"]
    assert {row["set"] for row in table} == {Path(file).stem for file in files.split(",")}
    assert {row["metric"] for row in table} == {"dot", "average precision"}
    whole = found["tables"][f"{folders['masked-lm']}: every figure"]
    (dot,) = [
        one["value"]
        for one in whole
        if (one["method"], one["layer"], one["metric"]) == ("alti", "1", "dot")
    ]
    parts = [r for r in table if (r["method"], r["layer"], r["metric"]) == ("alti", "1", "dot")]
    sums = sum(row["mean"] * row["count"] for row in parts), sum(row["count"] for row in parts)
    assert sums[0] / sums[1] == pytest.approx(dot, abs=1e-4)

    other = tmp_path / "other.jsonl"
    lines = Path(files.split(",")[0]).read_text("utf-8")
    other.write_text(lines.replace(BLIMP_SETS[0], "wh_island"))
    found = value_zeroing.main([*some, "--data", str(other), "-o", str(tmp_path)])
    page = (tmp_path / "value_zeroing.html").read_text("utf-8")
    assert "No dot and average precision: the sentences have no cues." in page
    assert not any("nearer to cues" in one["name"] for one in found["claims"])
    assert any("more faithful" in one["name"] for one in found["claims"])


def test_a_model_without_a_head_has_cue_alignment(folders: dict[str, str], tmp_path: Path) -> None:
    encoder = transformers.AutoModel.from_pretrained(folders["masked-lm"], add_pooling_layer=False)
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["masked-lm"])
    tokenizer.save_pretrained(tmp_path / "encoder")
    some = ["--limit", "4", "--texts", "20", "--seeds", "1", "-o", str(tmp_path)]
    some += ["--data", published.blimp(tmp_path, BLIMP_SETS[:2]), "--model"]
    with pytest.warns(ContextMixWarning, match="its head is random"):
        found = value_zeroing.main([*some, str(tmp_path / "encoder")])
    kinds = {one["name"].split(" ")[0] for one in found["claims"]}
    assert kinds == {"nearer", "the"}, "cues and probing, nothing about predictions"
    whole = value_zeroing.main([*some, folders["masked-lm"]])
    for name in ("every figure", "by set"):
        alone, beside = (
            {
                (row.get("set"), row["method"], row["layer"], row["metric"]): row.get(
                    "value", row.get("mean")
                )
                for row in one["tables"][f"{model}: {name}"]
            }
            for one, model in (
                (found, str(tmp_path / "encoder")),
                (whole, folders["masked-lm"]),
            )
        )
        assert alone == {key: pytest.approx(beside[key], abs=2e-4) for key in alone}


@pytest.mark.parametrize(
    ("right", "wrong", "singular"),
    [
        ("herself", "themselves", True),
        ("these", "this", False),
        ("that", "those", True),
        ("kisses", "kiss", True),
        ("kiss", "kisses", False),
        ("has", "have", True),
        ("were", "was", False),
    ],
)
def test_number_of_the_word_that_is_asked_for(right: str, wrong: str, singular: bool) -> None:
    pair = MinimalPair(f"they say {right} then", f"they say {wrong} then")
    assert value_zeroing.is_singular(pair) == singular


def test_contractions_are_written_out() -> None:
    pair = MinimalPair(
        "He won't say she hasn't left.", "He won't say she haven't left.", ((13, 16),)
    )
    found = value_zeroing.expanded(pair)
    assert found.good == "He will not say she has not left."
    assert (found.answer, found.wrong) == ("has", "have")
    assert [found.good[slice(*span)] for span in found.cues] == ["she"]


def test_links_between_words_are_counted_from_one(tmp_path: Path) -> None:
    norms = script("norms")
    bitext = norms.read_bitext(published.gold_alignment(tmp_path), 2)
    assert bitext.target[0] == "la batte brûlait ."
    assert bitext.sure[1] == [(0, 0), (1, 1), (3, 3)]
    assert bitext.possible[1] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_subtasks_of_a_file_are_scored(folders: dict[str, str], tmp_path: Path) -> None:
    lens = script("decoder_lens")
    folder, rows = str(demo_folder("encoder-decoder")), []
    for number, (english, french) in enumerate(published.TRANSLATIONS * 2):
        kind = "easy" if number < 2 else "hard"
        rows.append({"source": english, "target": [french], "category": kind})
    data = tmp_path / "some.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    found = lens.main(
        ["--model", folder, "--data", str(data), "--order", "easy,hard", "-o", str(tmp_path)]
    )
    assert [one["name"] for one in found["claims"]] == ["easy before hard", "easy: high precision"]
    curves = found["tables"][f"{folder}: answers"]
    assert {row["metric"] for row in curves} == {"exact match", "chrF", "MRR"}
    assert {row["category"] for row in curves} == {"all", "easy", "hard"}


def test_the_page_shows_what_was_found() -> None:
    page = claims.PAGE.read_text("utf-8")
    assert claims.rewritten(page) == page
    assert page.count("| cannot be said here |") >= 1
    assert page.count("| does not hold |") >= 1


def test_a_verdict_needs_the_whole_interval() -> None:
    claim = claims.Claim("c", "words", "place", "figure", 0.5)
    rows = [(0.7, 0.6, 0.8, 9), (0.3, 0.2, 0.4, 9), (0.6, 0.4, 0.8, 9), (0.7, 0.7, 0.7, 5)]
    found = [claims.Scored(claim, "model", *row).verdict for row in rows]
    assert found == ["holds", "does not hold", "cannot be said here", "cannot be said here"]
    nothing = claims.Scored(claim, "model", math.nan, math.nan, math.nan, 9)
    assert nothing.verdict == "cannot be said here"
