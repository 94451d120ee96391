"""The stored measurements as Markdown, in benchmarks/README.md and in the README."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meters import markdown

HERE = Path(__file__).parent
STORED = HERE / "results.json"
PAGES = (HERE / "README.md", HERE.parent / "README.md", HERE.parent / "docs/pages/numbers.md")
_BLOCK = re.compile(r"(<!-- ([\w ]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
MARGIN = 4
"""How much larger a stated bound is than the largest error that was measured."""
# README's rows: ours, as the tables name it, and what it answers.
_SHOWN = {
    "attention_norms, mlp_in": "norms up to the feed-forward block",
    "attention_norms, block_out": "norms through the feed-forward block",
    "value_zeroing": "Value Zeroing",
    "globenc": "GlobEnc",
    "alti": "ALTI, aggregation of layer-wise token-to-token interactions",
    "decompx": "DecompX",
    "gradient_x_input": "gradient x input",
    "integrated_gradients, 10 steps": "integrated gradients, 10 steps",
    "log_prob_contributions, layer": "log-prob contributions by sublayer",
    "log_prob_contributions, head": "log-prob contributions by head",
    "log_prob_contributions, head, foil": "log-prob contributions by head, against a foil",
    "log_prob_contributions, head_position": "log-prob contributions by head and position",
    "log_prob_contributions, best 10 head_position": "the best 10 pairs of head and position",
    "log_prob_contributions, best 10 ff_neurons": "the best 10 feed-forward neurons",
    "query_contributions, ff_neuron": "what activates a neuron",
    "attention_knockout, every layer and source": "attention knockout, every layer and source",
    "information_flow_routes": "information flow routes",
    "mine_triggers, one sentence": "mining memories",
    "decoder_lens, 20 tokens": "DecoderLens, 20 tokens",
}


def stored() -> dict[str, Any]:
    """Returns what was measured last; nothing where nothing was."""
    return json.loads(STORED.read_text()) if STORED.exists() else {}


def keep(found: Mapping[str, Any]) -> None:
    """Stores measurements; parts that were not measured stay as they are."""
    STORED.write_text(json.dumps(stored() | dict(found), indent=1) + "\n")


def with_stored(part: str, rows: Any) -> Any:
    """Returns the stored rows of a part with those that were measured again in their place."""
    known = stored().get(part, type(rows)())
    if isinstance(rows, dict):
        return known | rows
    again = {(row["method"], row["other"]): row for row in rows}
    kept = [again.pop((row["method"], row["other"]), row) for row in known]
    return [*kept, *again.values()]


def rewritten(text: str, found: Mapping[str, Any]) -> str:
    """Returns a page with every block between markers as the measurements say.

    Blocks of what was never measured stay as they are.
    """

    def block(match: re.Match[str]) -> str:
        part, make = _MAKERS.get(match[2], ("", None))
        if make is None or part not in found:
            return match[0]
        return f"{match[1]}{make(found)}{match[3]}"

    return _BLOCK.sub(block, text)


def growth(found: Mapping[str, Any]) -> str:
    """Returns the table of every method against the length of its input."""
    rows = found["growth"]
    lengths = next(iter(rows.values()))["lengths"]
    head = ["method", *(f"GFLOP, n={n}" for n in lengths), "/ bound", "/ pass", "own work ~"]
    head += [f"MiB, n={lengths[-1]}", "MiB ~", f"seconds, n={lengths[-1]}"]
    return f"{found['machine']}.\n\n{markdown(head, _growth_rows(rows))}"


def _growth_rows(rows: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, row in rows.items():
        operations = row["operations"]
        bound = f"{operations[-1] / row['bound'][-1]:.2f}" if row["bound"] else "-"
        yield [
            name,
            *(f"{count / 1e9:.3g}" for count in operations),
            bound,
            f"{operations[-1] / _pass(rows, name):.2f}",
            _power(row["own_exponent"]),
            f"{row['bytes'][-1] / 2**20:.3g}",
            _power(row["bytes_exponent"]),
            f"{row['seconds']:.3g}",
        ]


def _pass(rows: Mapping[str, Any], name: str) -> int:
    return rows[f"forward pass, {rows[name]['kind']}"]["operations"][-1]


def _power(exponent: float | None) -> str:
    return "-" if exponent is None else f"n^{exponent:.2f}"


def against(found: Mapping[str, Any]) -> str:
    """Returns the table of literal formulations and of captum."""
    head = ["method", "against", "on", "difference", "GFLOP", "/ bound", "theirs / ours"]
    head += ["seconds", "theirs / ours, seconds", "note"]
    rows = ([*_against_row(row), row.get("note") or "-"] for row in found["against"])
    return markdown(head, rows)


def _against_row(row: Mapping[str, Any]) -> list[str]:
    (ours, theirs), (here, there) = row["operations"], row["seconds"]
    return [
        row["method"],
        row["other"],
        row["on"],
        f"{row['difference']:.0e}",
        f"{ours / 1e9:.3g}",
        f"{ours / row['bound']:.2f}" if row["bound"] else "-",
        f"{theirs / ours:.3g}",
        f"{here:.3g}",
        f"{there / here:.3g}",
    ]


def peers(found: Mapping[str, Any]) -> str:
    """Returns the table of published code, with what has to be known to read it."""
    head = ["method", "beside", "on", "difference", "GFLOP", "theirs / ours", "seconds"]
    head += ["theirs / ours, seconds", "note"]
    return f"{found['peers machine']}.\n\n{markdown(head, map(_peers_row, found['peers']))}"


def _peers_row(row: Mapping[str, Any]) -> list[str]:
    cells = _against_row(row)
    del cells[5]  # nobody has said what the least is
    return [*cells, row["note"] or "-"]


def mining(found: Mapping[str, Any]) -> str:
    """Returns the table of mining beside the body's pass."""
    return markdown(found["mining"]["columns"], iter(found["mining"]["rows"]))


def inseq_outputs(found: Mapping[str, Any]) -> str:
    """Returns the table of how far Value Zeroing here and in inseq is off the literal one."""
    part = found["inseq"]
    reasons = "".join(f"- ({number}) {why}\n" for why, number in part["reasons"].items())
    return f"{markdown(part['head'], iter(part['where']))}\n{reasons}"


def inseq_times(found: Mapping[str, Any]) -> str:
    """Returns the table of what both take."""
    return markdown(found["inseq"]["columns"], iter(found["inseq"]["times"]))


def inseq(found: Mapping[str, Any]) -> str:
    """Returns both tables."""
    return f"{inseq_outputs(found)}\n{inseq_times(found)}"


def generated(found: Mapping[str, Any]) -> str:
    """Returns the table of generated text here and in inseq."""
    return markdown(found["generated"]["columns"], iter(found["generated"]["rows"]))


def speed(found: Mapping[str, Any]) -> str:
    """Returns README's table: what a method takes, and how much less than what it replaces."""
    rows = found["growth"]
    n = next(iter(rows.values()))["lengths"][-1]
    head = ["question", f"operations, in forward passes (n={n})", "own work grows as", "seconds"]
    head += ["compared with", "fewer operations", "faster"]
    where, other = found["machine"], found.get("peers machine", found["machine"])
    also = "" if where == other else f" Published code and ours beside it: {other.split('; ')[1]}."
    return f"{markdown(head, _speed_rows(found))}\n{where}.{also}\n"


def _speed_rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    rows = found["growth"]
    for name, says in _SHOWN.items():
        if name not in rows:  # not measured yet
            continue
        row = rows[name]
        first = [
            says,
            f"{row['operations'][-1] / _pass(rows, name):.1f}",
            _power(row["own_exponent"]),
            f"{row['seconds']:.2g}",
        ]
        for others in _others(found, name) or [["-", "-", "-"]]:
            yield [*first, *others]
            first = ["", "", "", ""]


def _others(found: Mapping[str, Any], name: str) -> list[list[str]]:
    cells = []
    for row in (*found.get("against", []), *found.get("peers", [])):
        if row["method"].split(", ")[0] == name.split(", ")[0] == "decoder_lens" or (
            row.get("shown", row["method"]) == name and "word by word" not in row["other"]
        ):
            (ours, theirs), (here, there) = row["operations"], row["seconds"]
            less = min(theirs / ours, there / here) < 1
            other = f"{row['other']} ({row['note']})" if less and row["note"] else row["other"]
            cells.append([other, f"{theirs / ours:.3g}x", f"{there / here:.3g}x"])
    if name == "value_zeroing" and "inseq" in found:
        columns = found["inseq"]["columns"]
        places = [columns.index(column) for column in ("inseq / ours", "method / ours")]
        for row in found["inseq"]["times"]:
            if row[0] in ("GPT-2", "GPT-NeoX"):
                cells.append([f"inseq, {row[0]}, n={row[1]}", *(f"{row[p]}x" for p in places)])
    return cells


def bound(error: float) -> float:
    """Returns what is stated where this was the largest error: `MARGIN` of it, one digit, up."""
    if error == 0:
        return 0.0
    step = 10.0 ** math.floor(math.log10(MARGIN * error))
    return math.ceil(MARGIN * error / step) * step


def numbers(found: Mapping[str, Any]) -> str:
    """Returns the tables of errors in every dtype, and of the identities."""
    part = found["numbers"]
    errors, gaps = part["errors"], part["gaps"]
    names = list(next(iter(errors.values())))
    low = list(errors)
    head = ["method", *low, *(f"ours, {dtype}" for dtype in low)]
    rows = ([name, *_pairs(errors, low, name)] for name in names)
    told = (
        [name, equation, *(_pair(gaps[d][name]) for d in gaps)]
        for name, equation in part["identities"].items()
    )
    return (
        f"{part['machine']}; {part['families']}, {part['draws']} draws of weights.\n\n"
        f"{markdown(head, rows)}\nWith ReLU (T5), where errors are larger than these bounds:\n\n"
        f"{markdown(['method', *low], _kinked(part, low))}\n"
        f"{markdown(['method', 'identity', *gaps], told)}"
    )


def _kinked(part: Mapping[str, Any], low: list[str]) -> Iterator[list[str]]:
    whole = {dtype: {n: row["whole"] for n, row in part["kinked"][dtype].items()} for dtype in low}
    usual = {dtype: {n: row["whole"] for n, row in part["errors"][dtype].items()} for dtype in low}
    for name in usual[low[0]]:
        if any(whole[dtype][name] > bound(usual[dtype][name]) for dtype in low):
            yield [name, *(f"{whole[dtype][name]:.0e}" for dtype in low)]


def products(found: Mapping[str, Any]) -> str:
    """Returns the table of errors of products in bfloat16."""
    head = ["models", "point", "largest error", "median error"]
    rows = (
        [model, f"`{at}`", _pair(largest), f"{median:.0e}"]
        for model, points in found["products"].items()
        for at, (largest, median) in points.items()
    )
    return markdown(head, rows)


def _pairs(errors: Mapping[str, Any], low: list[str], name: str) -> list[str]:
    cells = [_pair(errors[dtype][name]["whole"]) for dtype in low]
    return cells + [_pair(errors[dtype][name].get("ours")) for dtype in low]


def _pair(error: float | None) -> str:
    """Returns the bound and, in brackets, what was measured."""
    return "-" if error is None else f"{bound(error):.0e} ({error:.0e})"


# What a block of a page is made of, and the part of the measurements that it needs.
_MAKERS = {
    "speed": ("growth", speed),
    "growth": ("growth", growth),
    "against": ("against", against),
    "numbers": ("numbers", numbers),
    "products": ("products", products),
    "mining": ("mining", mining),
    "peers": ("peers", peers),
    "inseq outputs": ("inseq", inseq_outputs),
    "inseq times": ("inseq", inseq_times),
    "generated": ("generated", generated),
}


def write() -> None:
    """Puts the stored measurements into the pages."""
    found = stored()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(rewritten(text, found), encoding="utf-8")
