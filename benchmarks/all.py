"""Every benchmark's summary in one command: counts, growth, comparisons, inseq.

``python benchmarks/all.py [--quick] [--write] [--python INSEQ_ENV/bin/python ...]`` prints the
tables; ``--write`` stores what was measured in results.json beside this file and puts the tables
into benchmarks/README.md and README.md. ``--only`` repeats one part, ``--rows`` some of its rows.
Without ``--python`` nothing is asked of inseq, without ``--peers`` nothing of other published code,
and what was stored about them stays. It needs TransformerLens 4 and captum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import against
import memories
import methods
import peers
import tables
import torch
from meters import command_line, machine, show

PARTS = ("counts", "growth", "against", "mining", "peers", "inseq", "generated")


def comparisons(quick: bool, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns every comparison, or those of some methods, printed as it is made."""
    found = []
    for pair in against.pairs(quick):
        if names is not None and pair.method not in names:
            continue
        found.append(against.compared(pair, 1 if quick else 3))
        show(f"{pair.method} against {pair.other}: {found[-1]['difference']:.0e} apart\n")
    return found


def mining(quick: bool) -> dict[str, Any]:
    """Returns what mining takes beside the body's pass, and a hook with a running top-k."""
    sizes = [(2, 192)] if quick else [(4, 768), (12, 768)]
    ks = (5,) if quick else (10, 25, 50)
    rows = [row for size in sizes for row in memories.mining(*size, 4, ks)]
    return {"columns": memories.MINING, "rows": rows}


def beside_inseq(pythons: list[str], quick: bool) -> dict[str, Any]:
    """Returns what runs in inseq, how far outputs are apart, and what both took."""
    import inseq

    with inseq.working(pythons) as (workers, folder):
        small = inseq.small_models(folder)
        found = inseq.outputs(small[:1] if quick else small, workers, 12)
        names = [] if quick else [*inseq.WIDE]
        wide = [inseq.saved(name, *inseq.WIDE[name], folder / name) for name in names]
        length, runs = (16, 1) if quick else (64, 3)
        subjects = [*wide, *inseq.demos()]
        rows = [row for one in subjects for row in inseq.times(one, workers, [length], runs)]
    return {
        "head": found.head,
        "where": found.where,
        "reasons": found.reasons,
        "columns": inseq.COLUMNS,
        "times": rows,
    }


def generated_text(pythons: list[str], quick: bool) -> dict[str, Any]:
    """Returns how far saliency of a written text is apart here and in inseq, and what it takes."""
    import inseq

    with inseq.working(pythons) as (workers, folder):
        subjects = inseq.without_positions(folder)[-1 if quick else 0 :]
        rows = [inseq.generated(one, workers, 16 if quick else 64) for one in subjects]
    return {"columns": inseq.WRITTEN, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, and stores if asked to."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one run; for a look")
    parser.add_argument("--write", action="store_true", help="store, and update both pages")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part")
    parser.add_argument("--rows", nargs="+", help="of growth and against; others stay as stored")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128], help="tokens")
    parser.add_argument("--peers", type=Path, help="checkouts of published code, see peers.py")
    parser.add_argument("--python", action="append", default=[], help="of inseq's environment")
    given = parser.parse_args(arguments)
    if given.quick and given.write:
        parser.error("what --quick measures is not for the pages")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lengths, width = ([8, 16], 128) if given.quick else (given.lengths, 768)
    parts: dict[str, Callable[[], Any]] = {
        "counts": methods.counts,
        "growth": lambda: methods.growth(
            lengths, 1 if given.quick else 3, width=width, names=given.rows
        ),
        "against": lambda: comparisons(given.quick, given.rows),
        "mining": lambda: mining(given.quick),
        "peers": lambda: peers.all_peers(given.peers, 1 if given.quick else 3, given.rows),
        "inseq": lambda: beside_inseq(given.python, given.quick),
        "generated": lambda: generated_text(given.python, given.quick),
    }
    wanted, found = given.only or PARTS, dict[str, Any]()
    if given.rows is None:
        # Published code takes checkouts, so its rows may be another machine's.
        keys = {"growth": "machine", "peers": "peers machine"}
        found = {key: machine() for part, key in keys.items() if part in wanted}
    with torch.no_grad():
        for name in wanted:
            if name in ("inseq", "generated") and not given.python:
                continue
            if name == "peers" and given.peers is None:
                continue
            found[name] = parts[name]()
            if given.rows is not None or name == "peers":  # of those whose checkout is there
                found[name] = tables.with_stored(name, found[name])
            if given.write:
                tables.keep(found)
            shown = getattr(tables, name, None)
            show(f"\n{shown(tables.stored() | found) if shown else found[name]}\n")
    if given.write:
        tables.write()


if __name__ == "__main__":
    main()
