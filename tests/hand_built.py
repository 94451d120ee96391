"""Results built by hand: small, random, labelled, and of every class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_contextmix.results import (
    AttentionKnockout,
    AttributionGraph,
    ComponentReadouts,
    Components,
    ContextMap,
    ContextReliance,
    Decomposition,
    Estimate,
    EstimatePart,
    FlowKnockout,
    GraphNode,
    HeadDecomposition,
    Knockout,
    LayerFigures,
    LogProbContributions,
    Pair,
    PairChanges,
    Probing,
    Provenance,
    QueryContributions,
    Scan,
    ScoreContributions,
    TokenFigures,
    Tokens,
)
from tl_contextmix.results.components import KINDS, Grid, join

PROVENANCE = Provenance(
    method="by_hand",
    options={"at": "block_out", "heads": False, "layer": None, "spans": [1, [2, 3]], "of": (1,)},
    model="no model",
    host="NoTransformer",
    host_version="0.0",
    version="0.1",
    processing=("fold_ln",),
    fingerprint="0123",
)


def tokens(
    batch: int = 1,
    pos: int = 4,
    *,
    side: str = "decoder",
    padding: int = 0,
    left: bool = False,
    first: int = 0,
) -> Tokens:
    """Words named after row and position; the last (or first) ``padding`` of row 0 are padding."""
    mask = torch.ones(batch, pos, dtype=torch.bool)
    if padding:
        mask[0, slice(0, padding) if left else slice(pos - padding, pos)] = False
    return Tokens(
        ids=torch.arange(first, first + batch * pos).view(batch, pos),
        strings=tuple(
            tuple(f"{side[0]}{row}.{place}" for place in range(pos)) for row in range(batch)
        ),
        mask=mask,
        sides=((side, pos),),
    )


def sentence(*words: str, mask: list[bool] | None = None, spaced: bool | None = None) -> Tokens:
    """These words as tokens."""
    ids = torch.arange(len(words))[None]
    real = torch.tensor([mask or [True] * len(words)])
    return Tokens(ids, (words,), real, (("decoder", len(words)),), spaced=spaced)


def masked(scores: Tensor, target: Tokens, source: Tokens) -> Tensor:
    """Scores with zeros at padding."""
    real = target.mask[:, :, None] & source.mask[:, None, :]
    return scores.masked_fill(~real[:, None, None], 0)


def map_of(
    scores: Tensor, target: Tokens | None = None, source: Tokens | None = None, **changes: Any
) -> ContextMap:
    """A map of these scores [batch layer head target source] (or [target source])."""
    scores = scores[None, None, None] if scores.ndim == 2 else scores
    batch, layer, head, rows, columns = scores.shape
    target = target or tokens(batch, rows)
    if source is None:
        source = target if rows == columns else tokens(batch, columns, side="encoder")
    given = {
        "scores": masked(scores, target, source),
        "layers": tuple(range(layer)),
        "heads": ("all",) if head == 1 else tuple(str(number) for number in range(head)),
        "point": "block_out",
        "stack": "decoder",
        "target": target,
        "source": source,
        "unit": "norm",
        "includes_residual": True,
        "provenance": PROVENANCE,
    }
    return ContextMap(**(given | changes))


def random_map(
    batch: int = 2,
    layer: int = 3,
    head: int = 1,
    target: int = 5,
    source: int | None = None,
    *,
    causal: bool = False,
    padding: int = 0,
    left: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **changes: Any,
) -> ContextMap:
    """A random map; square unless ``source`` is given."""
    generator = torch.Generator().manual_seed(seed)
    columns = target if source is None else source
    shape = (batch, layer, head, target, columns)
    scores = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) + 0.01
    rows = tokens(batch, target, padding=padding, left=left)
    if bias:
        numbers = torch.rand(shape[:4], generator=generator, dtype=torch.float64).to(dtype)
        changes["bias"] = numbers * rows.mask[:, None, None]
    return map_of(scores.tril() if causal else scores, rows, **changes)


def components(batch: int = 2) -> Components:
    """Six components of different kinds, the last one a bias."""
    table = torch.tensor(
        # kind, layer, pos, head, source, neuron; kinds as in `results.components.KINDS`
        [
            [0, -1, 3, -1, -1, -1],
            [2, 0, 3, 1, -1, -1],
            [2, 1, 3, 0, 2, -1],
            [3, 1, 3, 0, 1, 5],
            [4, 1, 3, -1, -1, 7],
            [9, 1, 3, -1, -1, -1],
        ]
    )
    columns = table.T[:, None].expand(-1, batch, -1)
    return Components(*columns.contiguous().unbind(0))


def contributions(words: Tokens | None = None) -> list[Any]:
    """One result of every class about components of the stream."""
    words = words or tokens(2, 4, padding=1)
    scores = torch.tensor([[0.5, -0.25, 1.5, 0.125, 2.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    scores[1, 2] = torch.nan
    both = {"tokens": words, "encoder": tokens(2, 3, side="encoder", first=50)}
    some = Components(*(getattr(components(), n)[:, 3:5] for n in vars(components())))
    three = torch.rand(2, 2, 6)
    target = tokens(2, 1)
    quantities = torch.rand(2, 3)
    named = tuple((("<b>", "é"),) * 6 for _ in range(2))
    ids = torch.zeros(2, 6, 2, dtype=torch.long)
    return [
        LogProbContributions(
            scores=scores,
            coefficients=torch.full_like(scores, torch.nan),
            logits=scores / 2,
            components=components(),
            by="head_position",
            score="log_prob_increase",
            norm="frozen+beta",
            steps=("nothing", "embed", "L0 attn"),
            trajectory=torch.tensor([[-4.0, -3.0, -1.0], [-4.0, -5.0, -0.5]]),
            gaps=torch.tensor([[torch.nan, torch.nan, 0.25]] * 2),
            log_prob=torch.tensor([-1.0, -0.5]),
            evaluated=torch.tensor([6, 6]),
            possible=torch.tensor([6, 5]),
            note="",
            pos=torch.tensor([2, 3]),
            target=target,
            provenance=PROVENANCE,
            foil=target,
            sentence=torch.tensor([0, 1]),
            **both,
        ),
        QueryContributions(
            scores=scores,
            components=components(),
            by="layer",
            share="exact",
            inner=three,
            linear=three,
            shares=three,
            neurons=some,
            weights=torch.rand(2, 2),
            pre=torch.rand(2, 2),
            activation=torch.rand(2, 2),
            constant=torch.rand(2, 2),
            provenance=PROVENANCE,
            sentence=torch.tensor([0, 1]),
            **both,
        ),
        ComponentReadouts(
            top_logits=torch.rand(2, 6, 2),
            top_ids=ids,
            top_words=named,
            bottom_logits=-torch.rand(2, 6, 2),
            bottom_ids=ids,
            bottom_words=named,
            components=components(),
            scores=scores,
            unit="nats",
            provenance=PROVENANCE,
            **both,
        ),
        Knockout(
            before=quantities,
            after=quantities / 2,
            controls=torch.rand(2, 4, 3),
            components=some,
            target=target,
            best=target,
            provenance=PROVENANCE,
        ),
    ]


def scan() -> Scan:
    """Means of two heads, their bias and three neurons in two categories."""
    place = torch.zeros(1, dtype=torch.long)
    heads = Grid("attn", 0, place, (("head", range(2)),))
    neurons = Grid("mlp", 1, place, (("neuron", range(3)),))
    table = join([heads.table(), Grid("attn bias", 0, place).table(), neurons.table()])
    numbers = torch.rand(2, 6, dtype=torch.float64)
    return Scan(
        mean=numbers - 0.5,
        squares=numbers,
        mean_rank=torch.where(table.is_bias(), torch.nan, numbers + 1),
        prompts=torch.tensor([3, 1]),
        log_prob=torch.tensor([1.5, -0.5], dtype=torch.float64),
        components=table,
        categories=("<b>", "d\u00e9j\u00e0"),
        read=5,
        skipped=1,
        reasons=("row 4 of a list: <i>",),
        finished=True,
        digest="00",
        provenance=PROVENANCE,
    )


def without_nodes() -> FlowKnockout:
    """What an answer loses without the embeddings and the head of a graph."""
    made = graph()
    return FlowKnockout(
        scores=made.scores[:3],
        alone=torch.tensor([1.25, -0.25, 0.5]),
        together=torch.tensor([1.25, 1.0, 1.5]),
        linear=torch.tensor([1.5, 1.75, 1.75]),
        random=torch.tensor([[0.5, 0.25], [0.5, 0.75], [1.0, 1.25]]),
        nodes=made.nodes[:3],
        counts=(1, 2, 3),
        log_prob=-0.5,
        target=made.target,
        foil=None,
        provenance=PROVENANCE,
    )


def graph() -> AttributionGraph:
    """A graph of two embeddings, a head, what was pruned, and the answer."""
    edges = torch.zeros(5, 5)
    edges[2, :2], edges[3, 1], edges[4, 1:4] = torch.tensor([1.5, -0.5]), 0.25, 0.5
    edges[4, 2], edges[4, 3] = 1.0, 0.25
    nodes = (
        GraphNode("embed", -1, 0, token="déjà"),
        GraphNode("embed", -1, 1, token="</script>"),
        GraphNode("attn", 0, 1, head=2, token="</script>", promotes=("<b>", " x"), pattern=(1.0,)),
        GraphNode("rest", 0),
        GraphNode("answer", 1, 1, token="'<i>'"),
    )
    return AttributionGraph(
        scores=torch.tensor([1.5, 0.25, 1.0, 0.25, 1.75]),
        edges=edges,
        nodes=nodes,
        score=1.75,
        explained=1.5,
        possible=9,
        log_prob=-0.5,
        pos=1,
        target=tokens(1, 1),
        foil=None,
        tokens=tokens(1, 2),
        encoder=None,
        provenance=PROVENANCE,
    )


def score() -> ScoreContributions:
    """The score of a head between two tokens, of two components and biases."""
    column = torch.tensor([[KINDS.index("embed"), KINDS.index("mlp"), KINDS.index("bias")]])
    nothing = torch.full_like(column, -1)
    side = Components(
        kind=column,
        layer=torch.tensor([[-1, 0, 1]]),
        pos=torch.ones_like(column),
        head=nothing,
        source=nothing,
        neuron=nothing,
    )
    words = tokens(1, 4)
    return ScoreContributions(
        scores=torch.tensor([[0.5, -0.25, 0.0], [1.0, 2.0, 0.125], [0.0, 0.0, 0.25]]),
        targets=side,
        sources=side,
        position=-0.5,
        score=3.125,
        weight=0.75,
        soft_cap=None,
        layer=1,
        head=2,
        target=3,
        source=1,
        kind="attn",
        by="layer",
        tokens=words,
        read=words,
        provenance=PROVENANCE,
    )


def one_of_each() -> list[Any]:
    """One result of every class, with padding, None, NaN, other dtypes and shared tensors."""
    words = tokens(2, 4, padding=1)
    both = words.cat(tokens(2, 3, side="encoder", first=50))
    numbers = torch.rand(2, 3, 4)
    figures = {"layers": (0, 2, 5), "title": "Title", "caption": "<i>é\n", "unit": "u"}
    pair = Pair(0, 2, 3, 1, "déjà", '"\\\u2028', 0.25, 0.5)
    holed = numbers.clone()
    holed[0, 0, 0] = torch.nan
    return [
        random_map(head=2, padding=2, bias=True, layers=(1, 3, 4)),
        random_map(dtype=torch.float32, source=7, normalized="max", includes_residual=False),
        random_map(dtype=torch.bfloat16),
        Decomposition(
            parts=torch.rand(2, 2, 4, 7, 6),
            bias=torch.rand(2, 2, 4, 6),
            layers=(0, 1),
            point="attn_out",
            stack="cross",
            target=words,
            source=both,
            provenance=PROVENANCE,
        ),
        HeadDecomposition(
            parts=torch.rand(2, 2, 3, 4, 7, 6),
            bias=torch.rand(2, 2, 4, 6),
            layers=(0, 1),
            point="resid_mid",
            stack="cross",
            target=words,
            source=both,
            heads=("0", "cross 0", "residual"),
            provenance=PROVENANCE,
        ),
        LayerFigures(
            values=holed, quantities=("a", "b", "c", "d"), provenance=PROVENANCE, **figures
        ),
        TokenFigures(
            values=numbers * words.mask[:, None], tokens=words, provenance=PROVENANCE, **figures
        ),
        Estimate(
            method="<b>",
            batch=2,
            n_tokens=4,
            n_decoder_tokens=0,
            flops=30,
            peak_bytes=5000,
            passes=1,
            parts=(EstimatePart("forward passes", 10, 2000), EstimatePart("work", 20, 3000)),
            provenance=PROVENANCE,
        ),
        PairChanges((pair, pair), (), "mlp_in", "mlp_out", "norm", PROVENANCE),
        *contributions(words),
        AttentionKnockout(
            log_probs=-torch.rand(2, 2, 1, 4),
            probs=torch.rand(2, 2, 1, 4),
            log_prob=-torch.rand(2),
            prob=torch.rand(2),
            layers=(0, 2),
            windows=((0, 1), (1, 2, 3)),
            heads=("all",),
            source=words,
            stack="decoder",
            pos=torch.tensor([1, 2]),
            target=tokens(2, 1),
            provenance=PROVENANCE,
            foil=None,
            sentence=torch.tensor([0, 1]),
        ),
        ContextReliance(
            scores=torch.rand(1, 3, 2),
            kl=torch.rand(1, 3),
            log_prob=-torch.rand(1, 3),
            log_prob_without=-torch.rand(1, 3),
            flagged=torch.tensor([[True, False, False]]),
            target=tokens(1, 3),
            without=(("a", "<b>", "d0.2"),),
            source=tokens(1, 2),
            by="value_zeroing",
            metric="kl",
            provenance=PROVENANCE,
        ),
        Probing(
            bits=torch.rand(2, 1, 3) + 1,
            control_bits=torch.rand(2, 1, 3) + 1,
            accuracy=torch.rand(2, 1, 3),
            control_accuracy=torch.rand(2, 1, 3),
            points=("block_out",),
            layers=(0, 2, 5),
            classes=("<b>", "d\u00e9j\u00e0"),
            counts=(3, 2),
            provenance=PROVENANCE,
        ),
        scan(),
        graph(),
        score(),
        without_nodes(),
    ]
