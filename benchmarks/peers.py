"""Methods beside the code that was published for them: outputs first, then what both take.

``python benchmarks/peers.py --peers FOLDER`` prints a Markdown table. In FOLDER are checkouts of
the repositories, under their own names, and the environments that README.md beside this file says
how to make. Nobody's code is in this repository: `peer_worker.py` calls it there, as it is, on
weights that are saved here.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from memories import K, documents_of, miner_of
from meters import command_line, flops, machine, seconds, show
from processes import Process
from safetensors.torch import load_file, save_file
from saved_models import WIDE, Subject, saved, zoo_build
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters import as_view

Numbers = dict[str, Tensor]
# Seconds of both after which a row is not measured again.
PATIENCE = 20.0

_BERT = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
# Name, family and options, and which biases are zero.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "BERT's widths, 2 layers": ("bert", _BERT, ""),
    "BERT's widths, 2 layers, b_V of the first 0": ("bert", _BERT, "layer.0.attention.self.value"),
    "GPT-2's widths, 2 layers, b_V 0": (*WIDE["GPT-2"], "attn.c_attn"),
    "GPT-2's widths, 2 layers": (*WIDE["GPT-2"], ""),
    "GPT-2 small": (*WIDE["GPT-2, 12 layers, 50257 words"], ""),
}


@dataclass(frozen=True)
class Peer:
    """Published code, and what gives the same numbers here.

    Attributes:
        method: Ours, as the tables name it.
        other: Theirs, in words.
        key: Its name in `peer_worker.py`.
        repository: On GitHub.
        environment: Name of its environment.
        on: Key of the model.
        ours: Takes the model and token ids; returns numbers by name, which theirs has too.
        rows: Sentences.
        n: Tokens of each.
        part: What of it is asked for, where it has parts.
        shown: The row of README's table that it belongs to; empty for none.
        note: What has to be known to read the row.
    """

    method: str
    other: str
    key: str
    repository: str
    environment: str
    on: str
    ours: Callable[[Any, Tensor], Numbers]
    rows: int = 1
    n: int = 64
    part: str = ""
    shown: str = ""
    note: str = ""


def _norms(model: Any, ids: Tensor) -> Numbers:
    """Returns all that the class for Kobayashi et al. 2021 returns but two of its three ratios."""
    maps = cm.attention_norms(model, ids, at=["attn_out", "resid_mid", "mlp_in"])
    heads = cm.attention_norms(model, ids, at="attn_out", heads=True).scores[0]
    ratio = cm.mixing_ratio(model, ids).values[0]
    return {at: one.scores[0, :, 0] for at, one in maps.items()} | {"heads": heads, "ratio": ratio}


def _map(name: str, method: Callable[..., Any], **options: Any) -> Callable[[Any, Tensor], Numbers]:
    return lambda model, ids: {name: method(model, ids, **options).scores[0, :, 0]}


def _increases(by: str, name: str) -> Callable[[Any, Tensor], Numbers]:
    """Returns what gives scores in the notebook's order: by layer, the embedding's left out."""

    def ours(model: Any, ids: Tensor) -> Numbers:
        found = cm.log_prob_contributions(model, ids, by=by, norm="frozen")  # type: ignore[arg-type]
        kinds = ("attn", "mlp") if by == "layer" else ("attn",) if by == "head" else ("mlp",)
        columns = [found.scores[0][found.components.of_kind(kind)[0]] for kind in kinds]
        return {name: torch.stack(columns, dim=-1).squeeze(-1)}

    return ours


def _edges(model: Any, ids: Tensor) -> Numbers:
    """Returns importances [layer target source] of all heads and of the residual, added up.

    In the last layer of the target that is asked about: others lead to other predictions.
    """
    found = cm.information_flow_routes(model, ids, threshold=0.0, pos=-1)
    count, layers = ids.shape[1], len(as_view(model).blocks())
    edges = torch.zeros(layers, count, count)
    places = found.edges.nonzero().tolist()
    for target, source in places:
        one, read = found.nodes[target], found.nodes[source]
        below = read.kind in ("embed", "resid_post")
        if below and one.kind in ("attn", "resid_mid"):
            edges[one.layer, one.pos, read.pos] += found.edges[target, source]
    return {"edges": edges[:-1], "last": edges[-1, -1]}


def _mined(model: Any, ids: Tensor) -> Numbers:
    view = as_view(model)
    miner, tops = miner_of(view, len(ids))
    miner.take(tops, documents_of(view, ids))
    return {"top": torch.stack([top.values for top in tops.values()]).clamp(min=0)}


_BERT_MODEL, _NO_BIAS = list(MODELS)[:2]
PEERS = (
    Peer(
        "attention_norms, three points and heads; mixing_ratio",
        "Kobayashi et al. 2021, published class",
        "kobayashi",
        "gorokoba560/norm-analysis-of-transformer",
        "published",
        _BERT_MODEL,
        _norms,
        shown="attention_norms, mlp_in",
        note="three calls of ours, each with a pass of "
        "its own; one of theirs, which has two more ratios",
    ),
    Peer(
        "globenc",
        "GlobEnc, published class",
        "globenc",
        "mohsenfayyaz/GlobEnc",
        "published",
        _BERT_MODEL,
        _map("globenc", cm.globenc),
        shown="globenc",
        note="theirs returns the maps of Kobayashi et al. with it, "
        "and weights vectors one number at a time: no product",
    ),
    Peer(
        "alti",
        "ALTI, published class",
        "alti",
        "mt-upc/transformer-contributions",
        "published",
        _BERT_MODEL,
        _map("alti", cm.alti),
        shown="alti",
        note="its wrapper computes everything twice; once is measured",
    ),
    Peer(
        "decompx",
        "DecompX, published class",
        "decompx",
        "mohsenfayyaz/DecompX",
        "published",
        _NO_BIAS,
        _map("norms", cm.decompx),
        shown="decompx",
        note="the published code lets the first layer's value bias travel with its token",
    ),
    Peer(
        "attention_norms, block_out",
        "DecompX, published class, per block",
        "decompx block",
        "mohsenfayyaz/DecompX",
        "published",
        _BERT_MODEL,
        _map("norms", cm.attention_norms, at="block_out"),
        shown="attention_norms, block_out",
    ),
    *(
        Peer(
            f"log_prob_contributions, {by}",
            f"Yu and Ananiadou 2024, notebook, {cell[1:]}",
            "notebook",
            "zepingyu0512/neuron-attribution",
            "published",
            "GPT-2 small",
            _increases(by, name),
            part=cell,
            shown=f"log_prob_contributions, {by}",
            note=note,
        )
        for by, name, cell, note in (
            ("layer", "layer", "#layer-level increase", ""),
            ("head", "head", "#head-level increase", "theirs rounds to four digits"),
            ("ff_neuron", "neuron", "#FFN neuron", ""),
        )
    ),
    Peer(
        "information_flow_routes, every edge",
        "LLM Transparency Tool, contribution graph",
        "llm-tt",
        "facebookresearch/llm-transparency-tool",
        "llm-tt",
        "GPT-2's widths, 2 layers, b_V 0",
        _edges,
        n=32,
        shown="information_flow_routes",
        note="theirs adds b_V twice and floors every share; ours also "
        "freezes the model and descends it twice: what reaches the answer",
    ),
    Peer(
        "mine_triggers",
        "delphi, cache of activations",
        "delphi",
        "EleutherAI/delphi",
        "delphi",
        "GPT-2's widths, 2 layers",
        _mined,
        rows=16,
        shown="mine_triggers, one sentence",
        note=f"theirs keeps every activation, ours the {K} largest of each neuron",
    ),
)
MISSING = (
    ("Kobayashi et al. 2024", "no code is published for the maps through feed-forward blocks"),
    ("Yu and Ananiadou 2023", "the repository holds a README without code"),
    ("DecoderLens", "no library is published"),
)
"""Papers whose authors' code could not be compared with, and why."""


def prepared(name: str, folder: Path) -> Subject:
    """Saves one of `MODELS` and returns it."""
    family, options, zero = MODELS[name]
    subject = saved(name, family, options, folder)
    if zero:
        file = folder / "model.safetensors"
        found = load_file(file)
        for key, tensor in found.items():
            if f"{zero}.bias" in key:  # of GPT-2, behind those of queries and keys
                tensor[-options.get("n_embd", len(tensor)) :] = 0
        save_file(found, file, metadata={"format": "pt"})
    return subject


@contextmanager
def asked(peer: Peer, place: Path, folder: Path) -> Iterator[Process]:
    """Starts a peer with a model loaded."""
    python = place / "env" / peer.environment / "bin" / "python"
    checkout = place / peer.repository.split("/")[1]
    process = Process(python, "peer_worker.py", peer.key, checkout.resolve())
    try:
        process.ask("load", folder=str(folder))
        if peer.part:
            process.ask("only", part=peer.part)
        yield process
    finally:
        process.close()


def relative(mine: Numbers, theirs: Mapping[str, Any]) -> float:
    """Returns the largest difference, relative to the largest number of its kind.

    Raises:
        AssertionError: If something else than rounding differs.
    """
    apart = 0.0
    for name, one in mine.items():
        there = torch.tensor(theirs[name])
        assert one.shape == there.shape, (name, one.shape, there.shape)
        apart = max(apart, float((one - there).abs().max() / there.abs().max()))
    assert apart < 1e-3, apart
    return apart


def beside(peer: Peer, place: Path, subject: Subject, runs: int) -> dict[str, Any]:
    """Returns a row: how far both are apart and what they take, ours first."""
    with zoo_build.quiet():
        model = cm.load_model(subject.folder)
    generator = torch.Generator().manual_seed(peer.n)
    ids = torch.randint(5, subject.config.vocab_size, (peer.rows, peer.n), generator=generator)
    given = {"ids": ids.tolist()}
    here = partial(peer.ours, model, ids)
    peer.ours(model, ids[:1, : peer.n // 2])  # what a model keeps is made by the first question
    found: list[Numbers] = []
    ours = flops(lambda: found.append(here()), elementwise=False)
    with asked(peer, place, subject.folder) as process:
        answer = process.ask("numbers", **given)
        apart = relative(found[0], answer["numbers"])
        taken: list[tuple[float, float]] = []
        while len(taken) < runs and sum(map(sum, taken)) < PATIENCE:
            mine = seconds(here, time.process_time)
            taken.append((mine, process.ask("seconds", **given)["seconds"]))
    length = f"{peer.rows} x {peer.n} tokens" if peer.rows > 1 else f"n={peer.n}"
    return {
        "method": peer.method,
        "other": peer.other,
        "on": f"{peer.on}, {length}",
        "difference": apart,
        "operations": (ours, answer["flops"]),
        "bound": 0,
        "seconds": [statistics.median(column) for column in zip(*taken, strict=True)],
        "shown": peer.shown,
        "note": peer.note,
    }


def all_peers(
    place: Path, runs: int = 3, names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of all peers whose checkout is in a folder, or of some methods."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, models = [], dict[str, Subject]()
    with tempfile.TemporaryDirectory() as scratch:
        for peer in PEERS:
            there = (place / peer.repository.split("/")[1]).exists()
            if not there or (names is not None and peer.method not in names):
                continue
            if peer.on not in models:
                models[peer.on] = prepared(peer.on, Path(scratch, str(len(models))))
            rows.append(beside(peer, place, models[peer.on], runs))
            show(f"{peer.method} beside {peer.other}: {rows[-1]['difference']:.0e} apart\n")
    return rows


def main() -> None:
    """Prints the table."""
    import tables

    parser = command_line(__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="checkouts and environments")
    parser.add_argument("--rows", nargs="+", help="methods")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = all_peers(given.peers, given.runs, given.rows)
    show(tables.peers({"peers": rows, "peers machine": machine()}))


if __name__ == "__main__":
    main()
