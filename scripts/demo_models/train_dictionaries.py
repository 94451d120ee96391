"""Trains dictionaries of the causal demo model: ``python train_dictionaries.py FOLDER``.

A transcoder of one feed-forward block and an SAE of the residual stream in front of it, with the
k largest features active. They are written as ``transcoder.safetensors`` and ``sae.safetensors``,
which `tl_contextmix.Dictionary.load` reads. On one core it takes about half a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.demo_models.grammar import Grammar

LAYER, FEATURES, ACTIVE = 2, 256, 12
TEXT, TARGET, FOIL = "the keys to the cabinet", " are", " is"


def activations(
    model: Any, names: tuple[str, ...], sentences: int, seed: int = 5
) -> dict[str, Tensor]:
    """Returns what hook points show on sentences of the grammar, a row for each token."""
    texts = [" ".join(sentence.words) for sentence in Grammar(seed).sentences(sentences)]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for start in range(0, sentences, 64):
            ids = model.to_tokens(texts[start : start + 64])
            _, cache = model.run_with_cache(ids, names_filter=list(names))
            real = ids != model.tokenizer.pad_token_id
            for name in names:
                found[name].append(cache[name][real])
    return {name: torch.cat(rows) for name, rows in found.items()}


def train(
    read: Tensor, written: Tensor, names: Sequence[str], *, steps: int, features: int = FEATURES
) -> cm.Dictionary:
    """Returns a dictionary that makes one activation out of another, by its mean squared error."""
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(features, written.shape[1]), dim=1)
    W_enc = W_dec.T.clone() if read is written else torch.randn(read.shape[1], features) / 12
    tensors = [W_enc, W_dec, torch.zeros(features), written.mean(dim=0)]
    weights = [tensor.clone().requires_grad_() for tensor in tensors]
    optimizer = torch.optim.Adam(weights, lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        rows = torch.randint(len(read), (512,))
        pre = read[rows] @ weights[0] + weights[2]
        best = pre.topk(ACTIVE, dim=-1)
        acts = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
        loss = (acts @ weights[1] + weights[3] - written[rows]).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    W_enc, W_dec, b_enc, b_dec = (weight.detach() for weight in weights)
    hook_name, hook_name_out = (*names, "")[:2]
    return cm.Dictionary(
        W_enc,
        W_dec,
        b_enc,
        b_dec,
        hook_name=hook_name,
        hook_name_out=hook_name_out,
        activation="topk",
        k=ACTIVE,
    )


def explained(dictionary: cm.Dictionary, read: Tensor, written: Tensor) -> float:
    """Returns the share of the variance that a dictionary explains."""
    acts = dictionary.activation_function()(read @ dictionary.W_enc + dictionary.b_enc)
    missed = written - acts @ dictionary.W_dec - dictionary.b_dec
    return 1 - float(missed.square().sum() / (written - written.mean(dim=0)).square().sum())


def train_both(*, sentences: int, steps: int) -> dict[str, tuple[cm.Dictionary, float]]:
    """Returns both, each with the share of the variance that it explains of other sentences."""
    model = cm.load_demo("causal-lm")
    stream, read, written = (
        f"blocks.{LAYER}.{name}"
        for name in ("hook_resid_pre", "ln2.hook_normalized", "hook_mlp_out")
    )
    seen = activations(model, (stream, read, written), sentences)
    new = activations(model, (stream, read, written), max(64, sentences // 10), seed=6)
    found = {}
    for name, names in (("sae", [stream]), ("transcoder", [read, written])):
        made = train(seen[names[0]], seen[names[-1]], names, steps=steps)
        found[name] = (made, explained(made, new[names[0]], new[names[-1]]))
    return found


def carried_by_errors(dictionary: cm.Dictionary) -> float:
    """Returns the share of an answer's score that runs through what a dictionary misses."""
    model = cm.load_demo("causal-lm")
    graph = cm.flow(model, TEXT, target=TARGET, foil=FOIL, dictionary=dictionary, share=1.0)
    pairs = zip(graph.nodes, graph.scores.tolist(), strict=True)
    return sum(score for node, score in pairs if "error" in node.kind) / graph.score


def main() -> None:
    """Trains both and writes them."""
    parser = argparse.ArgumentParser(prog="train_dictionaries.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1500)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name, (made, share) in train_both(sentences=asked.sentences, steps=asked.steps).items():
        path = made.save(asked.folder / f"{name}.safetensors")
        errors = carried_by_errors(made)
        sys.stdout.write(
            f"{path}: {made!r}, {share:.1%} of the variance of new sentences; errors carry "
            f"{errors:.1%} of {TARGET!r} rather than {FOIL!r} after {TEXT!r}\n"
        )


if __name__ == "__main__":
    main()
