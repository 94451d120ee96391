"""One result of every class that shows itself, full of hostile text, built without a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from hand_built import PROVENANCE, contributions, one_of_each
from hostile import HOSTILE

from tl_contextmix.adapters.verification.identity_report import CheckRow, IdentityReport
from tl_contextmix.engine.memory_coefficients import CASES
from tl_contextmix.methods.memories import Triggers
from tl_contextmix.results import (
    Comparison,
    CompositionFigures,
    Cost,
    CurvePoint,
    DifferenceRow,
    Differences,
    LayerCurves,
    LayerwiseDecoding,
    LayerwiseLikelihood,
    LayerwiseScores,
    Memories,
    Pattern,
    ProbedMaps,
    Score,
    ScoreRow,
    TokenMemory,
    Tokens,
    Trigger,
    TriggerAgreement,
    TriggerExamples,
    TriggerPatterns,
    ValueReadouts,
)
from tl_contextmix.results.base import Shown
from tl_contextmix.results.memory_composition import FIGURES

N = len(HOSTILE)
WORDS = {str(place): word for place, word in enumerate(HOSTILE)}
LAYERS = (0, 1)


def hostile_tokens(batch: int = 1) -> Tokens:
    """A sentence of hostile tokens, each with its place as id."""
    ids = torch.arange(N).expand(batch, -1).clone()
    return Tokens(
        ids, (HOSTILE,) * batch, torch.ones(batch, N, dtype=torch.bool), (("decoder", N),)
    )


def every_class() -> dict[type[Shown], Any]:
    """One result of each class."""
    torch.manual_seed(0)
    tokens = hostile_tokens()
    found = [
        *map(_with_hostile_tokens, one_of_each()),
        *contributions(hostile_tokens(2))[:1],
        *_decodings(tokens),
        *_memories(tokens),
        *_mined(),
        *_scores(),
    ]
    return {type(result): result for result in found}


def _with_hostile_tokens(result: Any) -> Any:
    """The same result, its tokens (shorter ones at first) replaced by hostile ones."""
    changes = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Tokens):
            words = tuple(HOSTILE[: len(row)] for row in value.strings)
            changes[field.name] = dataclasses.replace(value, strings=words)
    return dataclasses.replace(result, **changes)


def _decodings(tokens: Tokens) -> list[Any]:
    numbers = -torch.rand(1, 2, N)
    whole = torch.zeros(1, 2, N, dtype=torch.long)
    said = torch.ones(1, 2, N, dtype=torch.bool)
    about = {"layers": LAYERS, "inputs": (HOSTILE[3],), "provenance": PROVENANCE}
    return [
        LayerwiseDecoding(
            ids=whole,
            mask=said,
            log_probs=numbers,
            finished=said[:, :, 0],
            content=said,
            strings=((HOSTILE, HOSTILE),),
            texts=(HOSTILE[2:4],),
            depth=1,
            references=(HOSTILE[2],),
            **about,
        ),
        LayerwiseLikelihood(
            log_probs=numbers,
            kl=-numbers,
            ranks=whole,
            predictions=whole,
            strings=((HOSTILE, HOSTILE),),
            target=tokens,
            **about,
        ),
        LayerwiseScores(
            logits=numbers[..., :2],
            log_probs=numbers[..., :2],
            tokens=(2, 3),
            strings=HOSTILE[2:4],
            **about,
        ),
    ]


def _memories(tokens: Tokens) -> list[Any]:
    ids = torch.arange(N).expand(1, 2, N)
    about = {"layers": LAYERS, "provenance": PROVENANCE}
    return [
        CompositionFigures(torch.rand(2, len(FIGURES) + len(CASES)), 3, cases=CASES, **about),
        Memories(
            coefficients=torch.randn(1, 2, N, 5),
            active=torch.rand(1, 2, N),
            agreeing=ids % 3,
            residual_top=ids,
            ffn_top=ids.flip(-1),
            output_top=ids,
            final_top=ids[:, 0],
            probability=torch.rand(1, 2, N),
            case=ids % len(CASES),
            quadrants=torch.zeros(1, 2, N, 0),
            promoted=torch.arange(20).view(2, 5, 2),
            norm=torch.rand(2, 5) + 1,
            cases=CASES,
            tokens=tokens,
            words=WORDS,
            **about,
        ),
        TokenMemory(
            shares=torch.randn(1, 2, N, N, 3),
            bias=torch.randn(1, 2, N, 3),
            neurons=(3, 5, 7),
            stack="decoder",
            target=tokens,
            source=tokens,
            **about,
        ),
        ValueReadouts(
            layer=torch.tensor([0, 1]),
            neuron=torch.tensor([3, 4]),
            ids=torch.arange(8).view(2, 2, 2),
            logits=torch.randn(2, 2, 2),
            max_prob=torch.rand(2, 2),
            entropy=torch.rand(2, 2),
            norm=torch.rand(2),
            words=WORDS,
            provenance=PROVENANCE,
        ),
    ]


def _mined() -> list[Any]:
    values = tuple(torch.randn(N).tolist())
    trigger = Trigger(0, 3.0, 7, N - 1, HOSTILE, (*values[:-1], 3.0), HOSTILE[3])
    eight = torch.arange(8)
    manifest = {
        "run": {"model": HOSTILE[3], "options": {"layers": [0, 1], "k": 5, "tails": "positive"}},
        "counts": {"documents": 10, "tokens": 100},
    }
    return [
        TriggerExamples(0, 3, "positive", (trigger,) * 3, HOSTILE, values, PROVENANCE),
        TriggerPatterns((Pattern(0, 3, "ends with", HOSTILE[3], 2, 0.5, 0.1, 10, 7),), PROVENANCE),
        TriggerAgreement(
            layer=eight % 2,
            neuron=eight,
            top=eight,
            next_token=eight.flip(0),
            rank=eight + 1,
            max_prob=torch.rand(8),
            precision=torch.rand(8),
            triggers=eight + 1,
            left_out=1,
            k=5,
            words=WORDS,
            provenance=PROVENANCE,
        ),
        Triggers(Path(HOSTILE[2]), manifest),
    ]


def _scores() -> list[Any]:
    def row(method: str, layer: str) -> ScoreRow:
        return ScoreRow(method, layer, "dot", 0.5, 0.4, 0.6, 0.1, 3, (0.25, 0.5, 0.75))

    rows = tuple(row(method, layer) for method in HOSTILE[2:4] for layer in ("0", "1"))
    points = tuple(
        CurvePoint("accuracy", category, layer, 0.5 + layer / 4, 0.4, 0.9, 3)
        for category in HOSTILE[2:4]
        for layer in LAYERS
    )
    return [
        Score(rows, HOSTILE[3], HOSTILE[2]),
        Differences(
            (DifferenceRow(*HOSTILE[2:4], "1", "dot", 0.5, -0.4, 0.6, 0.1, 3),),
            HOSTILE[3],
            HOSTILE[2],
        ),
        LayerCurves(points, HOSTILE[3], HOSTILE[2], PROVENANCE),
        ProbedMaps(
            (*points, CurvePoint("compression", HOSTILE[2], 1, 2.0, 1.0, 3.0, 3)),
            HOSTILE[3],
            HOSTILE[2],
            PROVENANCE,
        ),
        Comparison(
            rows=rows,
            costs=tuple(Cost(method, 0.1, 100, 2.0) for method in HOSTILE[2:4]),
            alike=torch.rand(2, 2),
            alike_methods=HOSTILE[2:4],
            sentences=3,
            correct=2,
            left_out=((HOSTILE[3], HOSTILE[2]),),
            dropped=((HOSTILE[2], HOSTILE[3]),),
            provenance=PROVENANCE,
        ),
        IdentityReport(
            HOSTILE[3], (CheckRow("parts add up", HOSTILE[2], 1e-7, 1e-5),), (HOSTILE[3],)
        ),
    ]
