"""Attention knockout (Geva, Bastings, Filippova, Globerson 2023, EMNLP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input, name_tokens, read_batch
from tl_contextmix.adapters.passes import Pass, run_pass
from tl_contextmix.adapters.questions import (
    Question,
    TokenAnswerInputs,
    ask,
    label_sets,
    split_answer,
)
from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.core.model_view import Edit, StackName
from tl_contextmix.core.token_sums import beside, blocks
from tl_contextmix.core.validation import Layers, Positive, whole_number
from tl_contextmix.engine.copied_runs import copied_runs
from tl_contextmix.engine.parts import DEFAULT_MAX_BYTES, Heads, group_labels, head_groups
from tl_contextmix.engine.registry import method
from tl_contextmix.results import AttentionKnockout
from tl_contextmix.results.token_groups import Group, Groups, find_groups

# The layers that are cut, the heads (None: all), and the group of sources.
_Cut = tuple[tuple[int, ...], list[int] | None, int]


@method(cites=("geva2023dissecting",))
def attention_knockout(
    model: object,
    input: Input,
    *,
    sources: Groups | None = None,
    to: Group | None = None,
    layer: Layers | None = None,
    window: Positive | None = 1,
    heads: Heads = False,
    stack: StackName | None = None,
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[TokenAnswerInputs],
) -> AttentionKnockout:
    r"""Returns how probable an answer is when positions cannot attend to some source tokens.

    .. math:: M^{\ell, h}_{rc} = -\infty \quad \text{for } r \in \text{to},\ c \in \text{sources}

    is added to the attention scores before the softmax (Geva et al. 2023), in every layer of a
    window, while the model runs; everything after it follows. What is left of a row is thereby
    renormalised over the sources that remain. A row that has none left attends to nothing: its
    heads write zero.

    One result is a sweep over windows, groups of heads and groups of sources, each cut on its own.

    Args:
        model: Any TransformerLens model with a vocabulary readout.
        input: A text, several, or token ids [batch, pos].
        sources: The tokens that are cut off: a position, a stretch ``(start, stop)`` or a text;
            a list of such groups, a dictionary of groups with names; None: every token alone. A
            list inside of a list or dictionary is one group.
        to: The positions that can no longer attend to them, as one group, or ``"all"``; None: the
            positions that predict, all of a sentence's together (in the encoder of an
            encoder-decoder: all). Where one of them is a source as well, its attention to itself is
            cut, too.
        layer: The layers around which windows are cut; None for all.
        window: How many layers a window has: those around a layer as far as there are any, of an
            even number one more before it than after it. None: one window of the layers asked for.
        heads: False: all heads at once. True: each alone. A number or a list of numbers: these
            together. A list of lists: each list together.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` attention of an encoder-decoder; None for
            the self-attention of the stack that writes the answer.
        max_bytes: Workspace: as many cuts run as one batch as fit.
        **inputs: ``target``, ``foil``, ``pos`` and ``generate``, see `Asked`; mask, padding and the
            like, see `TokenInputs`.

    Returns:
        `AttentionKnockout` [batch layer head source]: log-probability and probability of the
        target, less the foil's where there is one, with the edges cut and without.

    Raises:
        InvalidInput: If an argument does not fit the model or the text.
        UnsupportedModel: If the model has no vocabulary readout, or its patterns cannot be edited.

    Cost: a forward pass, and a run for each window, group of heads and group of sources, batched.
    In a causal model a run is of the positions from the first of ``to`` to the last that predicts
    (by default, of that one alone), which read the keys and values of those before; elsewhere, and
    where the model carries hooks, it is a forward pass.
    """
    view = name_tokens(as_view(model), inputs.get("labels"))
    view.readout.require()
    given, answer = split_answer(input, inputs)
    question = ask(view, read_batch(view, given), answer)
    forward_pass = run_pass(view, given, layer=layer, stack=stack, batch=question.batch)
    found = find_groups("sources", forward_pass.source("attn_out"), sources)
    readers = _readers(forward_pass, question, to)
    groups = head_groups(forward_pass, heads)
    windows = _windows(forward_pass.layers, window, len(view.blocks(stack)))
    names, members = group_labels(groups), found.members
    cuts = [*product(windows.values(), groups or [None], range(members.shape[1]))]

    def whole(batch: Batch, edits: Mapping[str, Edit]) -> Tensor:
        return _logits(run_pass(view, given, layer=layer, stack=stack, batch=batch), edits)

    with torch.no_grad():
        output = _logits(forward_pass, {})
        logits = question.read(output)
        contrast = question.contrast(logits)
        before = logits.new_empty(2, len(logits))
        scores = logits.new_empty(2, len(cuts), len(logits))
        for runs in copied_runs(
            forward_pass, question, readers, output, len(cuts), max_bytes, whole
        ):
            asked, edges = contrast.at(runs.places), runs.edges(members, readers)
            before[:, runs.places] = _scores(asked, runs.uncut)
            parts = [cuts[part] for part in blocks(len(cuts), runs.at_once)]
            each = []
            for some in tqdm(parts, desc="attention_knockout", delay=2, leave=False, disable=None):
                read = runs.read(len(some), _edits(forward_pass, *edges, some))
                each.append(_scores(asked.repeat(len(some)), read).view(2, len(some), -1))
            scores[:, :, runs.places] = torch.cat(each, dim=1)
    sizes = (2, len(windows), len(names), members.shape[1], len(logits))
    log_probs, probs = scores.view(sizes).movedim(-1, 1)
    options = {
        "sources": _plain(sources),
        "to": _plain(to),
        "window": window,
        "heads": [*names],
        "pos": answer.pos,
    }
    return AttentionKnockout(
        log_probs=log_probs,
        probs=probs,
        log_prob=before[0],
        prob=before[1],
        layers=tuple(windows),
        windows=tuple(windows.values()),
        heads=names,
        source=found.labels.select(question.sentences.tolist(), [*range(members.shape[1])]),
        stack=forward_pass.stack,
        pos=question.rows,
        target=label_sets(view, contrast.target),
        foil=None if contrast.foil is None else label_sets(view, contrast.foil),
        sentence=question.sentences,
        provenance=forward_pass.provenance("attention_knockout", options),
    )


def _windows(layers: Sequence[int], window: int | None, count: int) -> dict[int, tuple[int, ...]]:
    """Returns the layers that are cut together, by the layer in the middle."""
    if window is None:
        return {layers[len(layers) // 2]: tuple(layers)}
    before, after = window // 2, (window + 1) // 2
    return {n: tuple(range(max(0, n - before), min(count, n + after))) for n in layers}


def _readers(forward_pass: Pass, question: Question, to: object) -> Bool[Tensor, "batch target"]:
    """Returns the positions that can no longer attend to the sources."""
    if to is None and forward_pass.view.base_stack(forward_pass.stack) == question.stack:
        result = torch.zeros_like(forward_pass.target.mask)
        result[question.sentences, question.rows] = True
        return result
    if to is None or (isinstance(to, str) and to == "all"):
        return forward_pass.target.mask
    return find_groups("to", forward_pass.target, {"": to}).members[:, 0]


def _scores(contrast: Contrast, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "2 row"]:
    """Returns log-probabilities and probabilities."""
    return torch.stack([contrast.score(logits), contrast.score(logits, "prob")])


def _logits(forward_pass: Pass, edits: Mapping[str, Edit]) -> Tensor:
    """Returns the output of a run of the model."""
    logits = forward_pass.rerun(edits=edits).logits
    assert logits is not None
    return logits


def _edits(
    forward_pass: Pass,
    members: Bool[Tensor, "batch group source"],
    readers: Bool[Tensor, "batch target"],
    cuts: Sequence[_Cut],
) -> dict[str, Edit]:
    """Returns the edits of attention patterns that make one cut in each copy of a batch."""
    result = {}
    for block in forward_pass.view.blocks(forward_pass.stack):
        mine = [cut if block.layer in cut[0] else None for cut in cuts]
        if any(mine):
            attention = block.attention(forward_pass.kind)
            whole = 1.0 if attention.sink_scores else None
            result[attention.pattern] = partial(_without_edges, members, readers, mine, whole)
    return result


def _without_edges(
    members: Tensor,
    readers: Tensor,
    cuts: Sequence[_Cut | None],
    whole: float | None,
    pattern: Tensor,
) -> Tensor:
    """Returns patterns as they are with scores of -inf at some edges, row sums as they were.

    Args:
        members: The tokens of each group of sources [batch group source].
        readers: The targets that are cut off from them [batch target].
        cuts: The cut in each copy of the batch, or None.
        whole: What a row sums to together with the softmax's own sink; None without one.
        pattern: The patterns [row head target source].
    """
    heads = 1 if all(cut is None or cut[1] is None for cut in cuts) else pattern.shape[1]
    gone = torch.zeros(len(cuts), len(members), heads, *pattern.shape[2:], dtype=torch.bool)
    for copy, cut in zip(gone, cuts, strict=True):
        if cut is not None:
            edges = readers[:, None, :, None] & members[:, None, None, cut[2]]
            copy[:, slice(None) if cut[1] is None else cut[1]] = edges
    kept = pattern.masked_fill(beside(pattern, gone.flatten(0, 1)), 0)
    # In half precision a sum of many small numbers is far off.
    wide = torch.promote_types(pattern.dtype, torch.float32)
    before, after = (x.sum(-1, keepdim=True, dtype=wide) for x in (pattern, kept))
    if whole is not None:  # what is cut goes to the sink, too
        before, after = torch.full_like(before, whole), after + (whole - before)
    # In this order: a factor of what is left would overflow where that is next to nothing.
    return torch.where(after == 0, 0, kept / after * before).to(pattern)


def _plain(groups: Any) -> Any:
    """Returns groups as a result keeps them: numbers, text, lists and dictionaries."""
    if isinstance(groups, Mapping):
        return {str(name): _plain(group) for name, group in groups.items()}
    if isinstance(groups, (str, type(None))):
        return groups
    number = whole_number(groups)
    return [*map(_plain, groups)] if number is None else number
