"""The same question over many prompts: which layers, heads and neurons answer it, on average."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, pad_rows, read_batch
from tl_contextmix.adapters.passes import provenance
from tl_contextmix.adapters.questions import Question, ask, split_answer
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.statistics import Moments
from tl_contextmix.core.tiled_logits import NormRule
from tl_contextmix.core.validation import FilePath, NotNegativeNumber, Positive, require_choice
from tl_contextmix.engine.log_prob_scores import run_predictions
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.evaluation.minimal_pairs import MinimalPair
from tl_contextmix.evaluation.prompt_rows import NAMES, Prompt, read_row
from tl_contextmix.evaluation.sentences import Unusable, mask_id, pair_sentence
from tl_contextmix.methods.log_prob.contributions import contributions_to
from tl_contextmix.methods.memories.corpus_formats import Document, open_corpus
from tl_contextmix.methods.memories.mining import as_far_as, changed, require_run
from tl_contextmix.methods.memories.shards import Shard, expect, progress, read_shards
from tl_contextmix.methods.memories.store import alone
from tl_contextmix.results import Scan, storage
from tl_contextmix.results.component_sets import join_rows
from tl_contextmix.results.components import Components, join
from tl_contextmix.results.scanned import EVERY, LEVELS, Level, ranks

_MOST_CATEGORIES = 1000
_REASONS = 20


@method(cites=("yu2023exploring", "yu2024neuron"), on_text=False)
def scan(
    model: object,
    rows: object,
    *,
    by: Level | Sequence[Level] = ("layer", "head"),
    columns: Mapping[str, str] | None = None,
    norm: NormRule = "frozen+beta",
    unusable: Unusable = "error",
    prepend_bos: bool | None = None,
    out: FilePath | None = None,
    batch_size: Positive = 16,
    shard_size: Positive = 256,
    checkpoint_seconds: NotNegativeNumber = 60.0,
    max_bytes: Positive = DEFAULT_MAX_BYTES,
) -> Scan:
    r"""Returns how much each layer, head and neuron raises the answers of many prompts, on average.

    Every prompt is asked as `log_prob_contributions` asks it,

    .. math:: s_c = \log p(w \mid h + v_c) - \log p(w \mid h)

    less the same of the foil where there is one, in nats. Of the scores of each component and
    category the result has the mean :math:`\bar s`, its interval
    :math:`\bar s \pm t_{n-1} \sqrt{\sum (s - \bar s)^2 / (n (n - 1))}` (Student's t, 95 %, for
    prompts drawn independently), and the mean of its rank in each prompt. Means and squares are
    updated batch by batch in double precision (Chan et al. 1983), and no prompt's scores are kept.

    Args:
        model: Any TransformerLens model with a vocabulary readout, see `tl_contextmix.check`.
        rows: Prompts with their targets, of any number: the path of a CSV, TSV, jsonl, JSON or
            parquet file; a Hugging Face dataset, map-style or streaming; a pandas or Arrow table;
            or an iterable of dictionaries, of ``(prompt, target, foil, category)``, the last two
            optional, or of minimal pairs. Columns are ``prompt``, ``target``, ``foil`` and
            ``category``. Rows in the formats of BLiMP, CounterFact, known_1000 and indirect object
            identification are known by their columns. A target is text with its leading space, or
            an id; a list holds alternatives; a text of several tokens is an answer, whose tokens
            are added up (each less the foil's in its place, see `Asked`); without one the model's
            best token is explained.
        by: What is scored: ``"layer"`` (sublayers), ``"head"``, ``"ff_neuron"`` (each
            feed-forward neuron), or several of these.
        columns: Names of the columns in these rows, such as ``{"prompt": "question"}``.
        norm: Rule for the final norm, see `log_prob_contributions`.
        unusable: Rows that cannot be asked of the model (a foil that is the target or of another
            length, a word it does not know, a pair that differs in more than one token) are an
            ``"error"``, or ``"drop"``: skipped, counted, the first of them listed in the result.
        prepend_bos: Whether prompts get a beginning-of-sequence token; None: model's default.
        out: File for the result. It is written while the scan goes on, and the same call takes up
            a scan that was stopped, after holding the rows read before against their hash.
        batch_size: Prompts in a batch.
        shard_size: Rows that are read at a time; those of like length share batches.
        checkpoint_seconds: How often the file is written; at most that much work is lost.
        max_bytes: Workspace, see `log_prob_contributions`.

    Returns:
        `Scan`: mean, interval and rank [category component], the same whether it was stopped or
        not.

    Raises:
        InvalidInput: If an argument does not fit the model, a row cannot be used, there are more
            than 1000 categories, or the file holds another scan.
        FileFormatError: If the file holds something else.
        UnsupportedModel: If the model has no vocabulary readout.

    Cost: one forward pass per prompt, and that of `log_prob_contributions` for each of ``by``:
    neurons without a foil take ``2 L d_mlp d d_vocab`` operations per prompt, and a multiple of
    ``L d_mlp d`` with one under a frozen norm. Memory: 32 bytes for each component and category.
    """
    view = as_view(model)
    view.readout.require()
    listed: list[Any] = [by] if isinstance(by, str) else [*dict.fromkeys(by)]
    for one in listed or [by]:
        require_choice("by", one, LEVELS)
    for name in columns or {}:
        require_choice("name among columns", name, NAMES)
    options = {
        "by": listed,
        "columns": dict(columns or {}),
        "norm": norm,
        "unusable": unusable,
        "prepend_bos": prepend_bos,
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    corpus = open_corpus(rows, rows=True)
    scanner = _Scanner(model, view, tuple(listed), options, max_bytes)
    path = None if out is None else Path(out)
    lock = nullcontext() if path is None else alone(path.with_name(f".{path.name}.lock"))
    with lock, torch.no_grad(), progress("scan", unit="prompt") as bar:
        before = None if path is None or not path.is_file() else scanner.resume(path)
        known = "" if before is None else before.digest
        digest, last, size, read = hashlib.sha256(), time.monotonic(), corpus.size(), 0
        for shard in read_shards(corpus, shard_size):
            digest.update(shard.digest())
            read, end = read + shard.size, shard.first + len(shard.documents)
            if end < scanner.read:
                continue
            if known:
                if end != scanner.read or digest.hexdigest() != known:
                    raise changed(corpus, f"other rows among the first {end}")
                known = ""
                continue
            if before is not None and before.finished:
                raise changed(corpus, f"{end} rows where there were {scanner.read}")
            scanner.take(shard, corpus.name)
            bar.update(scanner.prompts - bar.n)
            expect(bar, read, size)
            due = time.monotonic() - last >= checkpoint_seconds
            if path is not None and due and scanner.prompts:
                _save(scanner.result(digest.hexdigest(), finished=False), path)
                last = time.monotonic()
        if known:
            raise changed(corpus, f"fewer than the {scanner.read} rows there were")
        if before is not None and before.finished:
            return before
        result = scanner.result(digest.hexdigest(), finished=True)
        if path is not None:
            _save(result, path)
    return result


def _save(found: Scan, path: Path) -> None:
    # Under one name, so that the next run clears up what a killed one left.
    storage.save(found, path, name=f".{path.name}.part")


@dataclass
class _Scanner:
    """What a scan has found so far: of each category the moments of scores, ranks and log_prob."""

    model: object
    view: ModelView
    by: tuple[Level, ...]
    options: dict[str, Any]
    max_bytes: int
    found: dict[str, Moments] = field(default_factory=dict)
    components: Components | None = None
    read: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def prompts(self) -> int:
        """How many prompts were explained."""
        return sum(one.count for one in self.found.values())

    def take(self, shard: Shard, name: str) -> None:
        """Takes in the prompts of a shard, those of like length together."""
        asked = []
        for number, document in enumerate(shard.documents, shard.first):
            if document.text is not None and not document.text.strip():
                continue  # a blank line
            try:
                prompt = self._prompt(document)
                asked.append((prompt.category or EVERY, self._question(prompt)))
            except InvalidInput as error:
                where = f"row {number} of {name}"
                if self.options["unusable"] == "error":
                    way_out = "Or skip such rows with unusable='drop'."
                    raise InvalidInput(f"{where} cannot be used: {error} {way_out}") from error
                self.skipped += 1
                self.reasons += (f"{where}: {error}",) * (len(self.reasons) < _REASONS)
        self.read = shard.first + len(shard.documents)
        # What has a foil, and what is asked for the model's best, cannot be asked together.
        asked.sort(key=lambda one: _kind(one[1]))
        for _, group in groupby(asked, key=lambda one: _kind(one[1])[:2]):
            some = [*group]
            for start in range(0, len(some), self.options["batch_size"]):
                self._add(some[start : start + self.options["batch_size"]])

    def _prompt(self, document: Document) -> Prompt:
        if document.text is None:
            raise InvalidInput("it cannot be read", document.problem, "a row of columns", "Fix it.")
        causal = "decoder" in self.view.stacks
        return read_row(document.text, self.options["columns"], causal=causal)

    def _question(self, prompt: Prompt) -> Question:
        """Returns what a prompt asks, and of what tokens."""
        if not isinstance(prompt.text, MinimalPair):
            asked = {name: getattr(prompt, name) for name in ("target", "foil")}
            given, answer = split_answer(
                prompt.text, {"prepend_bos": self.options["prepend_bos"], **asked}
            )
        else:
            mask = None if "decoder" in self.view.stacks else mask_id(self.model)
            sentence = pair_sentence(self.view, prompt.text, mask, True, one_token=True)
            given, answer = Given(sentence.tokens), sentence.answer
        batch = read_batch(self.view, given)
        if len(batch.main.ids) > 1:
            raise InvalidInput(
                "a row has one prompt",
                f"{len(batch.main.ids)} texts",
                "a text, a chat, or the ids of one",
                "Give each a row.",
            )
        return ask(self.view, batch, answer)

    def _add(self, asked: Sequence[tuple[str, Question]]) -> None:
        """Runs the model on a batch and adds its scores."""
        question = _together([one for _, one in asked])
        forward_pass = run_predictions(question, Given(question.batch.main.ids), *self.by)
        norm: NormRule = self.options["norm"]
        parts = [
            [contributions_to(some, by, norm=norm) for by in self.by]
            for some in forward_pass.predictions(norm, self.max_bytes)
        ]
        each = [join_rows(some).summed() for some in zip(*parts, strict=True)]
        self._require_same(join([_placeless(one.components) for one in each]))
        assert self.components is not None
        scores = torch.cat([one.scores.double().cpu() for one in each], dim=1)
        log_prob = each[0].log_prob.double().cpu()
        columns = torch.cat([scores, ranks(scores, self.components), log_prob[:, None]], dim=1)
        names = [name for name, _ in asked]
        for name in dict.fromkeys(names):
            some = Moments.of(columns[torch.tensor([one == name for one in names])])
            self.found[name] = self.found[name].merge(some) if name in self.found else some
        if len(self.found) > _MOST_CATEGORIES:
            raise InvalidInput(
                "there are too many categories",
                f"more than {_MOST_CATEGORIES}",
                "categories of many prompts each",
                "Name another column: columns={'category': ...}.",
            )

    def _require_same(self, components: Components) -> None:
        if self.components is None:
            self.components = components
        for name, column in vars(components).items():
            if not column.equal(getattr(self.components, name)):
                raise InvalidInput(
                    "prompts of other components cannot be averaged",
                    f"another {name} than in the prompts before",
                    "the same components for every prompt",
                    "Take off hooks that come and go.",
                )

    def result(self, digest: str, *, finished: bool) -> Scan:
        """Returns what was found so far."""
        if self.components is None:
            reasons = "".join(f" {reason}" for reason in self.reasons[:1])
            raise InvalidInput(
                "there is no prompt to explain",
                f"{self.read} rows, {self.skipped} of them skipped.{reasons}",
                "at least one row that can be used",
                "Check the rows and their columns.",
            )
        names, count = sorted(self.found), self.components.shape[1]
        mean, squares = (
            torch.stack([getattr(self.found[name], moment) for name in names])
            for moment in ("mean", "squares")
        )
        scores, order, log_prob = mean.split([count, count, 1], dim=1)
        return Scan(
            mean=scores,
            squares=squares[:, :count],
            mean_rank=order,
            prompts=torch.tensor([self.found[name].count for name in names]),
            log_prob=log_prob[:, 0],
            components=self.components,
            categories=tuple(names),
            read=self.read,
            skipped=self.skipped,
            reasons=self.reasons,
            finished=finished,
            digest=digest,
            provenance=provenance(self.view, "scan", self.options),
        )

    def resume(self, path: Path) -> Scan:
        """Goes on from what a file holds, and returns it.

        Raises:
            InvalidInput: If it is another scan.
            FileFormatError: If it is no scan.
        """
        before = Scan.load(path)
        now = vars(provenance(self.view, "scan", self.options))
        require_run(as_far_as(vars(before.provenance), now), now, path)
        columns = torch.cat([before.mean, before.mean_rank, before.log_prob[:, None]], dim=1)
        unused = torch.zeros_like(columns[:, before.mean.shape[1] :])
        squares = torch.cat([before.squares, unused], dim=1)
        for row, name in enumerate(before.categories):
            count = int(before.prompts[row])
            self.found[name] = Moments(count, columns[row], squares[row])
        self.components, self.read = before.components, before.read
        self.skipped, self.reasons = before.skipped, before.reasons
        return before


def _placeless(components: Components) -> Components:
    """Returns the components of the first sentence, whatever position they write to."""
    columns = {name: column[:1].cpu() for name, column in vars(components).items()}
    return Components(**columns | {"pos": torch.zeros_like(columns["pos"])})


def _kind(question: Question) -> tuple[bool, bool, int]:
    """Returns what only like questions share a batch by, and their length."""
    sides = [side for side in (question.batch.main, question.batch.decoder) if side is not None]
    length = sum(side.ids.shape[1] for side in sides)
    return question.target is None, question.foil is None, length


def _together(questions: Sequence[Question]) -> Question:
    """Returns questions about single sentences as one about a batch."""
    first = questions[0]
    pad = first.view.pad_id()

    def padded(sides: Sequence[Side]) -> Side:
        return pad_rows([side.ids[0].tolist() for side in sides], pad)

    def sets(name: str) -> Any:
        return tuple(one for each in questions for one in getattr(each, name) or ()) or None

    decoders = [one.batch.decoder for one in questions if one.batch.decoder is not None]
    main = padded([one.batch.main for one in questions])
    counts = torch.tensor([len(one.rows) for one in questions])
    return replace(
        first,
        batch=Batch(main, padded(decoders) if decoders else None),
        sentences=torch.arange(len(questions)).repeat_interleave(counts),
        rows=torch.cat([one.rows for one in questions]),
        **{name: sets(name) for name in ("target", "foil", "named")},
    )
