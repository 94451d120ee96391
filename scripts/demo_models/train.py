"""Trains the demo models: ``python scripts/demo_models/train.py causal-lm OUT``.

Everything is fixed by the recipe: the sentences, their order, the initial weights, the number of
steps and the learning rate of each step. The same command on the same machine gives the same
weights; on another processor rounding differs and the figures agree to about the tolerance of the
model card.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tokenization
import torch
import transformers
from recipes import RECIPES, Phase
from tasks import IGNORED, TASKS, Task
from torch import nn

from tl_contextmix.demo_models import DEMO_NAMES, DemoName

LOG_EVERY = 200
BATCHES_PER_BLOCK = 50
_LOGGER = logging.getLogger(__name__)


def train(name: DemoName, out: Path, *, device: str = "cpu", fraction: float = 1.0) -> None:
    """Trains demo model `name` and writes it as a Hugging Face folder in half precision.

    Args:
        name: One of `DEMO_NAMES`.
        out: The folder to write.
        device: Where to train.
        fraction: Share of the recipe's sentences and steps; below 1 only to try the script out.
    """
    started = time.process_time()
    recipe = RECIPES[name]
    task = TASKS[name]()
    torch.manual_seed(recipe.weight_seed)
    model: Any = None
    logs = []
    for phase in (_shortened(phase, fraction) for phase in recipe.phases):
        task.read(phase)
        if model is None:
            task.fit_tokenizer(max(1, int(recipe.tokenizer_sentences * fraction)))
            model = task.model().to(device)
        task.encode()
        logs.append(_run_phase(task, model, phase, recipe.weight_decay, device))
    out.mkdir(parents=True, exist_ok=True)
    _save_model(model, out)
    tokenization.save_tokenizer(task.tokenizer, name, out)
    record = {
        "command": f"python scripts/demo_models/train.py {name} OUT --device {device}",
        "fraction": fraction,
        "weight_seed": recipe.weight_seed,
        "weight_decay": recipe.weight_decay,
        "parameters": sum(p.numel() for p in model.parameters()),
        "processor_minutes": round((time.process_time() - started) / 60, 1),
        "torch_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "phases": logs,
    }
    (out / "train.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _shortened(phase: Phase, fraction: float) -> Phase:
    return replace(
        phase,
        sentences=max(phase.batch_size, int(phase.sentences * fraction)),
        steps=max(1, int(phase.steps * fraction)),
    )


def _run_phase(
    task: Task, model: nn.Module, phase: Phase, weight_decay: float, device: str
) -> dict[str, Any]:
    """Trains for `phase.steps` steps and returns what to record about them."""
    model.train()
    optimizer = _optimizer(model, phase.peak_learning_rate, weight_decay)
    rng = random.Random(phase.order_seed)
    batches = _batches([len(row) for row in task.rows], phase.batch_size, rng)
    log: list[tuple[int, float]] = []
    tokens = 0
    total = torch.zeros((), device=device)  # read seldom: reading waits for the device
    for step in range(phase.steps):
        batch = task.batch(next(batches), rng)
        tokens += int((batch["labels"] != IGNORED).sum())
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate(step)
        loss = task.loss(model, {key: value.to(device) for key, value in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.detach()
        if (step + 1) % LOG_EVERY == 0:
            log.append((step + 1, round(total.item() / LOG_EVERY, 4)))
            total.zero_()
            _LOGGER.info("step %d of %d: loss %.4f", step + 1, phase.steps, log[-1][1])
    return {**asdict(phase), "predicted_tokens": tokens, "loss_by_step": log}


def _optimizer(model: nn.Module, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that leaves biases and norms undecayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def _batches(lengths: Sequence[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Yields row numbers for ever, epoch by epoch, rows of similar length together."""
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        for start in range(0, len(order), size * BATCHES_PER_BLOCK):
            block = order[start : start + size * BATCHES_PER_BLOCK]
            block.sort(key=lambda row: lengths[row])
            batches = [block[i : i + size] for i in range(0, len(block), size)]
            rng.shuffle(batches)
            yield from batches


def _save_model(model: Any, out: Path) -> None:
    """Saves in half precision: rounding changes no preference, and the files are half as big."""
    model.cpu().eval().half().save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # what to compute in; transformers 5 would follow the files
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Train a demo model from scratch.")
    parser.add_argument("name", choices=DEMO_NAMES)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="share of the recipe, to try the script out"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    train(options.name, options.out, device=options.device, fraction=options.fraction)


if __name__ == "__main__":
    main()
