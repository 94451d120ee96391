"""Value Zeroing here and in inseq, on the same saved weights: outputs first, then seconds.

``python benchmarks/inseq.py --python INSEQ_ENV/bin/python [--python ...] [--quick]`` prints
Markdown tables. inseq needs a transformers that TransformerLens 3 and 4 do not, so it runs in an
environment of its own (README.md beside this file says how to make one) and answers there what is
asked of `inseq_worker.py`; several environments can be given, for several versions.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from hf_literal import Stack, as_inseq, hidden_states, literal, one_minus_cosine, stacks_of
from meters import command_line, flops, markdown, seconds, show
from processes import Failed, Process
from saved_models import FAMILIES, WIDE, Subject, demos, saved, zoo_build
from torch import Tensor

import tl_contextmix as cm


class Worker(Process):
    """A process with inseq in it."""

    def __init__(self, python: str) -> None:
        super().__init__(python, "inseq_worker.py")
        self.versions = self.ask("versions")

    def load(self, subject: Subject) -> None:
        """Has the worker load a model."""
        named = subject.tokenizer.special_tokens_map.items()
        roles = {role: token for role, token in named if isinstance(token, str)}
        self.ask("load", folder=str(subject.folder), roles=roles)

    def __str__(self) -> str:
        return f"inseq {self.versions['inseq']}, transformers {self.versions['transformers']}"


def load(subject: Subject) -> Any:
    """Returns the model on its TransformerLens class."""
    with zoo_build.quiet():
        return cm.load_model(subject.folder)


def ours(model: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    """Returns our maps [layer target source], in inseq's order."""
    if len(ids) == 1:
        return [cm.value_zeroing(model, ids[0]).scores[0, :, 0]]
    return [
        cm.value_zeroing(model, ids[0], stack=stack, decoder_input=ids[1]).scores[0, :, 0]
        for stack in ("encoder", "cross", "decoder")
    ]


def maps_in(answer: dict[str, Any]) -> list[Tensor]:
    """Returns inseq's maps [layer target source]."""
    return [torch.tensor(rows) for rows in answer["maps"]]


def gap(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference."""
    return float((found.double() - expected.double()).abs().max())


class Truth:
    """Literal zeroing of one model on one input.

    Attributes:
        texts: The input.
        ids: Its token ids.
        stacks: The maps' names.
        exact: The maps, in float64.
        rounded: The maps as inseq's arithmetic gives them: float32, and ``1 - cos``.
    """

    def __init__(self, subject: Subject, n: int) -> None:
        self.texts = subject.texts(n)
        self.ids = subject.ids(self.texts)
        plain, self._plain = map(subject.hugging_face, (torch.float64, torch.float32))
        self.stacks = stacks_of(plain)
        self.exact = [literal(plain, self.ids, stack) for stack in self.stacks]
        self.rounded = [
            literal(self._plain, self.ids, stack, one_minus_cosine) for stack in self.stacks
        ]

    def maps_of(self, worker: Worker) -> list[Tensor]:
        """Returns inseq's maps of the model a worker has loaded.

        Raises:
            Failed: If there are none, or of another input, or of another model.
        """
        answer = worker.ask("maps", **self.texts)
        if answer["ids"] != [ids.tolist() for ids in self.ids]:
            raise Failed("other token ids")
        stacks: list[Stack] = [stack for stack in self.stacks if stack != "cross"]
        for stack, states in zip(stacks, answer["states"], strict=True):
            here = hidden_states(self._plain, self.ids, stack)[-1]
            apart = gap(torch.tensor(states), here) / float(here.abs().max())
            if apart > 1e-5:  # what two versions of transformers round differently is 1e-6
                raise Failed(f"hidden states differ by {apart:.0e}")
        return maps_in(answer)

    def off(self, maps: list[Tensor]) -> float:
        """Returns how far maps in inseq's convention are off."""
        return max(gap(a, as_inseq(b)) for a, b in zip(maps, self.exact, strict=True))

    def details(self, theirs: list[Tensor], mine: list[Tensor]) -> Iterator[list[object]]:
        """Yields one row per map."""
        for index, stack in enumerate(self.stacks):
            exact, found = self.exact[index], mine[index]
            yield [
                stack,
                f"{gap(theirs[index], as_inseq(exact)):.0e}",
                f"{gap(theirs[index], as_inseq(self.rounded[index])):.0e}",
                f"{gap(as_inseq(found), as_inseq(exact)):.0e}",
                f"{gap(found, exact) / float(exact.max()):.0e}",
                f"{int(((exact > 0) & (exact < 1e-5)).sum())} of {int((exact > 0).sum())}",
            ]


@dataclass(frozen=True)
class Outputs:
    """Where each package runs, and how far it is off the literal zeroing.

    Attributes:
        head: Columns of `where`.
        where: A row per model.
        details: A row per model and map.
        reasons: Why something does not run, and its number in `where`.
    """

    head: list[str]
    where: list[list[str]]
    details: list[list[object]]
    reasons: dict[str, int]


def outputs(subjects: list[Subject], workers: list[Worker], n: int) -> Outputs:
    """Runs every package on every model."""
    where: list[list[str]] = []
    details: list[list[object]] = []
    reasons: dict[str, int] = {}
    for subject in subjects:
        truth = Truth(subject, n)
        mine, compared = ours(load(subject), truth.ids), False
        row = [subject.name, f"{truth.off([as_inseq(m) for m in mine]):.0e}"]
        for worker in workers:
            try:
                worker.load(subject)
                theirs = truth.maps_of(worker)
            except Failed as failed:
                # Some messages go on with a module's or a function's signature.
                reason = str(failed).split("(")[0].split(". ")[0]
                row.append(f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
                continue
            if not compared:
                details += [[subject.name, *cells] for cells in truth.details(theirs, mine)]
            compared = True
            row.append(f"{truth.off(theirs):.0e}")
        where.append(row)
    here = f"ours, TransformerLens {version('transformer-lens')}"
    return Outputs(["model", here, *map(str, workers)], where, details, reasons)


def times(
    subject: Subject, workers: list[Worker], sizes: list[int], runs: int
) -> Iterator[list[object]]:
    """Yields rows of the table of seconds and operations."""
    model, worker = load(subject), first_that_runs(subject, workers)
    for n in sizes:
        texts = subject.texts(n)
        ids = subject.ids(texts)
        answer = worker.ask("maps", **texts)
        if answer["ids"] != [side.tolist() for side in ids] or {x.shape[1] for x in ids} != {n}:
            raise SystemExit(f"{subject.name}: inseq looked at other tokens")
        here = partial(ours, model, ids)
        pairs = zip(here(), maps_in(answer), strict=True)
        apart = max(gap(as_inseq(mine), theirs) for mine, theirs in pairs)
        taken: dict[str, list[float]] = {"ours": [], "method": [], "call": []}
        for _ in range(runs):
            for name, value in worker.ask("seconds", **texts).items():
                taken[name].append(value)
            taken["ours"].append(seconds(here, time.process_time))
        mine, method, call = (statistics.median(values) for values in taken.values())
        there, counted = worker.ask("flops", **texts)["flops"], flops(here, elementwise=False)
        yield [
            subject.name,
            n,
            answer["passes"],
            f"{apart:.0e}",
            *(f"{took:.3f}" for took in (mine, method, call)),
            *(f"{took / mine:.1f}" for took in (method, call)),
            *(f"{count / 1e9:.3g}" for count in (counted, there)),
            f"{there / counted:.1f}",
        ]


def generated(subject: Subject, workers: list[Worker], n: int) -> list[object]:
    """Returns a row of the table of generated text: saliency of both, and Value Zeroing's cost.

    The second half of the text (of an encoder-decoder: the other text) is what was written. One of
    its words is contrasted with another one.
    """
    model, worker = load(subject), first_that_runs(subject, workers)
    texts, tokenizer = subject.texts(n), subject.tokenizer
    two, words = "target" in texts, texts["text"].split(" ")
    cut = len(words) // 2
    prompt = texts["text"] if two else " ".join(words[:cut])
    written = texts["target"].split(" ") if two else words[cut:]
    place = len(written) // 2
    other = next(word for word in words if word not in (written[place], written[place - 1]))
    contrast = " ".join([*written[:place], other, *written[place + 1 :]])
    asked = {"text": prompt, "target": " ".join(written)}
    # First: after another method inseq's Value Zeroing is lost.
    counted = worker.ask("flops", **(texts if two else {"text": f"{prompt} {asked['target']}"}))
    ids = tokenizer(prompt).input_ids
    before = "" if two else f"{prompt} "
    whole = [tokenizer(before + text).input_ids for text in (asked["target"], contrast)]
    answer, foil = (some[0 if two else len(ids) :] for some in whole)
    given: dict[str, Any] = {"input": torch.tensor([ids]), "target": [answer]}
    pairs = enumerate(zip(answer, foil, strict=True))
    (place,) = (row for row, (one, another) in pairs if one != another)

    def apart(step: str, row: slice, theirs: dict[str, Any], **options: Any) -> float:
        found = cm.gradient_x_input(model, **given, **options).scores[0, 0, 0]
        sides = [torch.tensor(side) for side in theirs["rows"]]
        expected = torch.cat([side[:, : found.shape[1]] for side in sides], dim=1)
        return gap(found[row], expected[row]) / float(expected[row].abs().max())

    logits = apart("logit", slice(None), worker.ask("saliency", **asked, step="logit"))
    step = "contrast_prob_diff"
    there = worker.ask("saliency", **asked, step=step, contrast=contrast)
    differences = apart(step, slice(place, place + 1), there, of="prob", foil=[foil])
    here = partial(cm.value_zeroing, model, **given)
    here()  # what the first call keeps
    mine = flops(here, elementwise=False)
    if two:
        encoder = partial(cm.value_zeroing, model, given["input"], stack="encoder")
        for more in (partial(here, stack="cross"), encoder):
            mine += flops(more, elementwise=False)
    return [
        subject.name,
        len(answer),
        f"{logits:.0e}",
        f"{differences:.0e}",
        f"{mine / 1e9:.3g}",
        f"{counted['flops'] / 1e9:.3g}",
        f"{counted['flops'] / mine:.1f}",
    ]


def first_that_runs(subject: Subject, workers: list[Worker]) -> Worker:
    """Returns the first worker that can do it, with the model loaded."""
    for worker in workers:
        try:
            worker.load(subject)
            worker.ask("maps", **subject.texts(8))
        except Failed:
            continue
        return worker
    raise SystemExit(f"inseq does not run on {subject.name} in any environment")


@contextmanager
def working(pythons: Sequence[str]) -> Iterator[tuple[list[Worker], Path]]:
    """Starts a worker in each environment, and gives a folder for models."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with ExitStack() as stack:
        workers = [Worker(python) for python in pythons]
        for worker in workers:
            stack.callback(worker.close)
        yield workers, Path(stack.enter_context(tempfile.TemporaryDirectory()))


def small_models(folder: Path) -> list[Subject]:
    """Returns a random model of every family, and the embedded ones."""
    return [*(saved(family, family, {}, folder / family) for family in FAMILIES), *demos()]


def without_positions(folder: Path) -> list[Subject]:
    """Returns models without position embeddings, which inseq leaves out of what it multiplies."""
    names = ("GPT-NeoX", "Llama")
    return [*(saved(name, *WIDE[name], folder / name) for name in names), demos()[1]]


COLUMNS = (
    "model, n, passes, difference, ours (s), method (s), call (s), method / ours, "
    "call / ours, ours (GFLOP), inseq (GFLOP), inseq / ours"
).split(", ")
"""Of the table of `times`."""

WRITTEN = (
    "model, generated tokens, input x gradient, contrast_prob_diff, ours (GFLOP), inseq (GFLOP), "
    "inseq / ours"
).split(", ")
"""Of the table of `generated`."""


def main() -> None:
    """Prints all tables."""
    parser = command_line(__doc__)
    parser.add_argument("--python", action="append", required=True, help="of inseq's environment")
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes, runs = ([16], 3) if given.quick else ([16, 32, 64], 5)
    with working(given.python) as (workers, folder):
        found = outputs(small_models(folder), workers, 12)
        show(markdown(found.head, found.where))
        show("".join(f"{number}. {reason}\n" for reason, number in found.reasons.items()) + "\n")
        head = ["model", "map", "inseq", "inseq repeated", "ours", "ours, raw", "below 1e-5"]
        show(markdown(head, found.details) + "\n")
        wide = [saved(name, *made, folder / name) for name, made in WIDE.items()]
        for subject in [*wide, *demos()]:
            show(markdown(COLUMNS, times(subject, workers, sizes, runs)))
        rows = [generated(subject, workers, sizes[-1]) for subject in without_positions(folder)]
        show(markdown(WRITTEN, rows))


if __name__ == "__main__":
    main()
