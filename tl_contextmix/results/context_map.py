"""The map: how much each source token matters to each target token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from jaxtyping import Float

from tl_contextmix.core.rollout import roll_out
from tl_contextmix.core.validation import require_choice
from tl_contextmix.core.words import Spans, Times, frames_of, merge, require_spans
from tl_contextmix.errors import InvalidInput, warn
from tl_contextmix.plotting.panels import Heatmap, Panel
from tl_contextmix.results import storage
from tl_contextmix.results.headings import as_heading, in_plain_words
from tl_contextmix.results.labelled_arrays import LabelledArray, unlike
from tl_contextmix.results.labels import Provenance, Stretches, Tokens
from tl_contextmix.results.token_groups import Groups, find_groups

if TYPE_CHECKING:
    import pandas

# A text representation reads the scores only of maps up to this size; larger ones may fill memory.
_SMALL = 1_000_000
# What rounding leaves of a row that sums to 1, in half precision too.
_SUM = 1e-2


@storage.storable
@dataclass(frozen=True, eq=False)
class ContextMap(LabelledArray):
    """How much each source token matters to each target token, per layer and head.

    Attributes:
        scores: The map, non-negative unless `signed` (NaN where there is no score). 0 where source
            or target is padding.
        layers: Number of each layer on the axis.
        heads: Label of each head; ``("all",)`` where heads are summed before the score is taken.
        point: Where in the block it was measured, for example ``"block_out"``.
        stack: ``"decoder"``, ``"encoder"`` or ``"cross"``.
        target: Tokens of the rows.
        source: Tokens of the columns.
        unit: What a score is, for example ``"norm"``.
        bias: Score of what belongs to no source token (output biases, norm biases), or None.
        includes_residual: Whether the token's own residual is part of its diagonal score.
        normalized: How rows were scaled: ``"none"``, ``"sum"`` or ``"max"``. It says what was
            done: rows that lost sources to `select` no longer add up to 1.
        from_input: Whether a layer's map reaches back to the tokens of the input (a rollout,
            DecompX, gradients) and not to those of the layer's own input.
        provenance: Where the numbers come from.
        signed: Whether scores may be negative: those of a difference of two maps, ``a - b``, and
            contributions to a prediction, which add up.
        sink: Share of the model's own attention sink (the extra logit in a softmax of gpt-oss), a
            source that is no token: an attention map's rows and it sum to 1. None without one.
    """

    LABELS = {"layer": "layers", "head": "heads", "target": "target", "source": "source"}
    COLUMNS = {"score": "scores"}
    SUBTRACTED = ("scores",)
    CHOICES = {"normalized": ("none", "sum", "max")}
    FROM_ZERO = "scores"

    scores: Float[torch.Tensor, "batch layer head target source"]
    layers: tuple[int, ...]
    heads: tuple[str, ...]
    point: str
    stack: str
    target: Tokens
    source: Tokens
    unit: str
    includes_residual: bool
    provenance: Provenance
    bias: Float[torch.Tensor, "batch layer head target"] | None = None
    normalized: Literal["none", "sum", "max"] = "none"
    from_input: bool = False
    signed: bool = False
    sink: Float[torch.Tensor, "batch layer head target"] | None = None

    def _heading(self) -> str:
        return f" {self._name} ({self.stack}), {self.unit}"

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        if self.sink is not None:
            real = self.target.mask.to(self.sink.device)[:, None, None].expand_as(self.sink)
            low, high = (float(x) for x in self.sink.detach()[real].aminmax())
            lines.append(f"  attention sink, beside the sources: {low:.3g} to {high:.3g} of a row")
        if self.scores.numel() <= _SMALL:
            lines += [
                f"  batch {row['batch']}, layer {row['layer']}, head {row['head']}: "
                f"{row['source_token']!r} -> {row['target_token']!r} {row['score']:.3g}"
                for row in self.top(5)
            ]
        return "\n".join(lines)

    @property
    def _by_size(self) -> bool:
        return self.signed

    @property
    def causal(self) -> bool:
        """Whether rows and columns are the same tokens and no target reads a later one."""
        return self.target.equals(self.source) and not any(
            bool(scores.triu(diagonal=1).any()) for scores in self.scores.flatten(0, 1)
        )

    @property
    def layer_names(self) -> tuple[str, ...]:
        """What each layer's map is of, as text: ``"2"``, ``"input to 2"``, or ``"prediction"``."""
        if self.point in ("resid_in", "prediction"):
            return ("prediction",) * len(self.layers)
        return tuple(f"input to {n}" if self.from_input else str(n) for n in self.layers)

    def normalize(self, how: Literal["sum", "max"] = "sum", *, exclude: Any = None) -> ContextMap:
        """Returns the map with each row divided by its sum or by its maximum.

        A row of zeros stays a row of zeros; a row with a NaN becomes NaN. `bias` and `sink` are
        divided by the same number, so that they keep their size relative to the scores of their
        row. `unit` says so.

        Args:
            how: ``"sum"`` (rows add up to 1, their sink's share included) or ``"max"`` (the largest
                score of a row is 1).
            exclude: Sources that are taken out first, as `select` takes them, such as the first
                token (0), which heads attend to when they have nothing to attend to: their scores
                become 0, and rows that read nothing else rows of zeros. `unit` and the options of
                `provenance` name them.

        Raises:
            InvalidInput: If ``how`` is neither, the map is a difference, or a source is not there.

        Example:
            >>> import tl_contextmix as cm
            >>> pattern = cm.attention(cm.load_demo("causal-lm"), "the keys to the cabinet")
            >>> pattern.normalize(exclude=0).scores[0, 0, 0, :2, :2].round(decimals=2)
            tensor([[0., 0.],
                    [0., 1.]])
        """
        require_choice("way to normalize", how, ("sum", "max"))
        self.require_unsigned("normalize")
        kept = self if exclude is None else self._without(exclude)
        reduced = kept._row_sums() if how == "sum" else kept.scores.amax(-1)
        divisor = torch.where(reduced == 0, torch.ones_like(reduced), reduced)
        return replace(
            kept,
            scores=kept.scores / divisor[..., None],
            **kept._bias_and_sink(lambda values: values / divisor),
            normalized=how,
            unit=f"{kept.unit} / row {'sum' if how == 'sum' else 'maximum'}",
        )

    def _without(self, sources: Any) -> ContextMap:
        """Returns the map with the scores of some sources at 0."""
        places = self.source.find("source", sources, [*range(len(self.source.strings))])
        index = torch.tensor(places, dtype=torch.long, device=self.scores.device)
        names = [self.source.labels()[place] for place in places]
        options = {**self.provenance.options, "exclude": names}
        return replace(
            self,
            scores=self.scores.index_fill(-1, index, 0),
            unit=f"{self.unit} without source {', '.join(map(str, names))}",
            provenance=replace(self.provenance, options=options),
        )

    def mean(self, axis: Literal["head"] = "head") -> ContextMap:
        """Returns the average over heads, the axis kept with length 1 and the label ``"mean"``.

        Layers are not averaged: no number could label the result, and they differ in scale.
        `rollout` combines them; for an average all the same, take ``scores.mean(1)``.

        Args:
            axis: ``"head"``.

        Raises:
            InvalidInput: If ``axis`` is anything else.
        """
        require_choice("axis of a mean", axis, ("head",))
        related = self._bias_and_sink(lambda values: values.mean(2, keepdim=True))
        return replace(self, scores=self.scores.mean(2, keepdim=True), heads=("mean",), **related)

    def _row_sums(self) -> Float[torch.Tensor, "batch layer head target"]:
        """Returns the sum of each row, its sink's share included."""
        sums = self.scores.sum(-1)
        return sums if self.sink is None else sums + self.sink

    def _bias_and_sink(
        self, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor | None]:
        """Returns what stands beside the scores of each row, changed."""
        found = {"bias": self.bias, "sink": self.sink}
        return {name: None if one is None else change(one) for name, one in found.items()}

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns one row per number, with labels; padding is omitted.

        Columns: the axes, positions being those of the input; the tokens there; the numbers. An
        attention `sink` is the first source of its row: at position -1, by the name of ``(sink)``.
        """
        frame = super().to_dataframe()
        if self.sink is None:
            return frame
        import numpy as np
        import pandas

        axes = ("batch", "layer", "head", "target")
        sinks = self._tabulated(axes, self.sink.shape, {"score": self.sink})
        sinks = sinks.assign(source=-1, source_token="(sink)")[[*frame.columns]]
        pairs = self._real((*axes, "source")).expand(self.scores.shape).sum(dim=-1)
        rows = pairs[self._real(axes).expand(self.sink.shape)]
        each = np.arange(len(sinks))
        order = np.argsort(np.concatenate([each, np.repeat(each, rows.numpy())]), kind="stable")
        return pandas.concat([sinks, frame], ignore_index=True).iloc[order].reset_index(drop=True)

    def require_unsigned(self, operation: str) -> None:
        """Raises InvalidInput if scores have a sign, which the operation has no use for."""
        if self.signed:
            raise InvalidInput(
                f"{operation} needs a map of scores from 0",
                f"a {self.unit}, whose scores have a sign",
                "the map of one method",
                f"Ask for {operation} of both maps, and subtract what comes of it."
                if self.is_difference
                else "Scores of a prediction add up as they are.",
            )

    def _difference(self, other: Any) -> dict[str, Any]:
        for name in ("normalized", "from_input", "signed"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise unlike(name, repr(theirs), repr(mine))
        related: dict[str, torch.Tensor | None] = {}
        for name in ("bias", "sink"):
            mine, theirs = getattr(self, name), getattr(other, name)
            related[name] = None
            if mine is not None and theirs is not None:
                related[name] = mine - theirs.to(mine.device)
        points = dict.fromkeys((self.point, other.point))
        return {
            **super()._difference(other),
            **related,
            "point": " - ".join(points),
            "includes_residual": self.includes_residual and other.includes_residual,
            "signed": True,
        }

    def _comparable(self, other: Any) -> bool:
        # Shares of a row can be compared whatever they are shares of.
        return self.unit == other.unit or self.normalized != "none"

    @property
    def _name(self) -> str:
        """Method, or methods of a difference, and point."""
        other = self.provenance.options.get("minus", {}).get("method", self.provenance.method)
        return f"{' - '.join(dict.fromkeys((self.provenance.method, other)))} at {self.point}"

    @property
    def _title(self) -> str:
        """The same in words, as a heading."""
        other = self.provenance.options.get("minus", {}).get("method", self.provenance.method)
        methods = dict.fromkeys((self.provenance.method, other))
        names = " minus ".join(map(in_plain_words, methods))
        points = " and ".join(map(in_plain_words, self.point.split(" - ")))
        return f"{as_heading(names)}, {points}"

    def words(
        self,
        spans: Spans | Times | None = None,
        *,
        rows: Literal["mean", "max"] = "mean",
        columns: Literal["sum", "max"] = "sum",
        per_second: int | float | None = None,
    ) -> ContextMap:
        """Returns the map of words by words; a row that sums to 1 still does.

        Args:
            spans: Stretches ``(start, stop)`` of tokens, the same on both axes and in every
                sentence; None for the words, see `Tokens.words`.
            per_second: The stretches are times in seconds, with so many frames a second (50 in
                Whisper, wav2vec2 and HuBERT); frames between them belong to no word.
            rows: What becomes of the rows of a word's tokens.
            columns: What becomes of their columns. The largest (``"max"``) no longer sums to 1.

        Raises:
            InvalidInput: If a stretch covers no token.
        """
        require_choice("way to merge rows", rows, ("mean", "max"))
        require_choice("way to merge columns", columns, ("sum", "max"))
        given = self._given(spans, per_second)
        target, source = (
            tokens.words()
            if given is None
            else [require_spans(given, tokens.ids.shape[1])] * len(tokens.strings)
            for tokens in (self.target, self.source)
        )
        return self._joined(target, source, rows, columns)

    def _joined(
        self,
        target: Sequence[Spans],
        source: Sequence[Spans],
        rows: Literal["mean", "max"],
        columns: Literal["sum", "max"],
    ) -> ContextMap:
        """Returns the map of stretches of targets by stretches of sources."""
        scores = _merged(self.scores, self.source, source, columns)
        scores = _merged(scores.transpose(3, 4), self.target, target, rows).transpose(3, 4)
        return replace(
            self,
            scores=scores,
            target=self.target.join(target),
            source=self.source.join(source),
            **self._bias_and_sink(lambda values: _merged(values, self.target, target, rows)),
        )

    def minus(
        self,
        other: ContextMap,
        spans: Groups,
        other_spans: Groups,
        *,
        rows: Literal["mean", "max"] = "mean",
        columns: Literal["sum", "max"] = "sum",
    ) -> ContextMap:
        """Returns the difference to the map of another prompt, whose tokens are not the same.

        Both maps become maps of the stretches that are named, the first of one against the first of
        the other, and so on; what is not named is not part of the difference. For prompts of equal
        tokens and length ``a - b`` is enough.

        Args:
            other: The map that is subtracted.
            spans: Stretches of this map's tokens in their order: ``(start, stop)``, positions or
                texts, as a list or a dictionary of names. Where targets are other tokens than
                sources, as in the map of one prediction, all rows are kept, in order.
            other_spans: As many of the other's.
            rows: What becomes of the rows of a stretch.
            columns: What becomes of its columns.

        Raises:
            InvalidInput: If stretches are not there, are not as many, or overlap, or the maps are
                not of one kind.

        Example:
            >>> import tl_contextmix as cm
            >>> model = cm.load_demo("causal-lm")
            >>> one, other = (
            ...     cm.attention_norms(model, text, at="mlp_out")
            ...     for text in ("the keys to the cabinet", "the key near the old cabinet")
            ... )
            >>> names = {"subject": (1, 3), "noun": " cabinet"}
            >>> one.minus(other, names, names).target.strings
            (('subject', 'noun'),)
        """
        if not isinstance(other, ContextMap):
            raise unlike("type", type(other).__name__, "ContextMap")
        return self._aligned(spans, rows, columns) - other._aligned(other_spans, rows, columns)

    def _aligned(
        self, spans: Groups, rows: Literal["mean", "max"], columns: Literal["sum", "max"]
    ) -> ContextMap:
        """Returns the map of named stretches, its labels without positions."""
        require_choice("way to merge rows", rows, ("mean", "max"))
        require_choice("way to merge columns", columns, ("sum", "max"))
        groups = find_groups("spans", self.source, spans)
        source = [groups.spans(row) for row in range(len(self.source.strings))]
        both = self.target.equals(self.source)
        whole = [[(at, at + 1) for at in range(self.target.shape[1])]] * len(source)
        found = self._joined(source if both else whole, source, rows, columns)
        labels = replace(found.source, strings=groups.labels.strings, places=None)
        return replace(
            found,
            source=labels,
            target=labels if both else replace(found.target, places=None, numbers=None),
        )

    def by_span(
        self, spans: Stretches | Times = "sentences", *, per_second: int | float | None = None
    ) -> ContextMap:
        """Returns the map with the columns of each stretch of source tokens added up.

        Which passage made this answer? Rows stay as they are, and so do their sums.

        Args:
            spans: ``"words"``, ``"sentences"``, ``"sides"`` (of a generated text: the prompt and
                what was generated), or a list of texts and of stretches ``(start, stop)`` of the
                source axis; tokens between those of a list are stretches of their own. See
                `Tokens.spans`.
            per_second: The stretches are times in seconds, see `words`; of Whisper's
                cross-attention, whose sources are frames.

        Raises:
            InvalidInput: If a text is not there, a stretch covers no token, or stretches overlap.
        """
        given = self._given(spans, per_second)
        source = self.source.spans(given)
        scores = _merged(self.scores, self.source, source, "sum")
        return replace(self, scores=scores, source=self.source.join(source))

    def at(self, target: Tokens, source: Tokens) -> ContextMap:
        """Returns the rows and columns at the positions of other labels, with these labels.

        A rollout takes whole maps; this takes out of it the rows that predict what a model said:
        ``alti(model, said.source.ids).normalize().rollout().at(said.target, said.source)``, with
        ``said`` the map of what was generated.

        Raises:
            InvalidInput: If this map has other sentences, or lacks one of the positions.
        """
        device, (_, layers, heads, *_) = self.scores.device, self.scores.shape
        rows = _places(self.target, target).to(device)[:, None, None].expand(-1, layers, heads, -1)
        columns = _places(self.source, source, sides=True).to(device)[:, None, None, None]
        found = self.scores.gather(3, rows[..., None].expand(-1, -1, -1, -1, self.scores.shape[4]))
        found = found.gather(4, columns.expand(*found.shape[:4], -1))
        real = target.real_pairs(source).to(device)[:, None, None]
        mask = target.mask.to(device)[:, None, None]
        return replace(
            self,
            scores=found.masked_fill(~real, 0),
            target=target,
            source=source,
            **self._bias_and_sink(lambda values: values.gather(3, rows) * mask),
        )

    def rollout(
        self, *, add_identity: bool | None = None, encoder: ContextMap | None = None
    ) -> ContextMap:
        r"""Returns how much each input token reaches each position after every layer.

        .. math:: R_0 = S_0, \qquad R_l = S_l R_{l-1}

        with :math:`S_l` the map of layer ``l``. Where the map holds the residual connection, it is
        taken as it is (GlobEnc, Modarressi et al. 2022). Where it does not (attention weights;
        norms at ``attn_out``), each row of :math:`S_l` is first averaged with its own token, at the
        row's sum: :math:`(S_l + \mathrm{diag}(S_l 1)) / 2`. For rows that sum to 1 that is
        :math:`0.5 S_l + 0.5 I` (Abnar & Zuidema 2020); a row of zeros becomes the token itself,
        at 1.

        A decoder block that attends to an encoder reads both: its map is :math:`[S_l | C_l]`, the
        decoder's tokens followed by the encoder's. What it reads of the encoder has been mixed
        there, so the encoder's own rollout :math:`E` comes after it, as in ALTI+ (Ferrando et al.
        2022, "Towards Opening the Black Box of Neural Machine Translation"):

        .. math::

            [R_l | Q_l] = [S_l R_{l-1} \,|\, S_l Q_{l-1} + C_l E], \qquad R_{-1} = I,\ Q_{-1} = 0

        :math:`Q_l` says how much each *source* token reaches each target position.

        Both axes are the same tokens (but for an encoder's), heads are averaged or summed, and all
        layers are there from the first. Rows are not scaled here: `normalize` first for weights
        that sum to 1, as every published rollout does. Products of raw rows depend on their sizes,
        which differ by token and layer, and rank the inputs otherwise. `bias` is dropped; what
        enters through biases is followed by no rollout. An attention `sink` is a source that reads
        nothing: what it takes in any layer ends there, and is the rollout's own `sink`, so that
        rows and it still sum to 1.

        Args:
            add_identity: Whether to add the residual connection; None: where the map lacks it.
            encoder: The encoder's map of the same input and kind, not rolled out, for a decoder
                that reads one.

        Returns:
            A `ContextMap` of the same shape; the last layer is the rollout over all of them.

        Raises:
            InvalidInput: If heads are still separate, layers are missing or out of order, source
                and target are different tokens, the encoder's map is missing or of other tokens, or
                a map is a rollout or a difference.

        Warns:
            ContextMixWarning: If rows do not sum to 1 and were not normalised.

        Cost: ``2 n^3`` operations per layer and sentence, ``2 t (t + s)^2`` for ``t`` target and
        ``s`` source tokens.
        """
        _require_rollable(self, encoder)
        _warn_of_raw_rows(self)
        memory = None
        if encoder is not None:
            memory = encoder.rollout(add_identity=add_identity).scores[:, -1, 0]
        residual = not self.includes_residual if add_identity is None else add_identity
        options = {**self.provenance.options, "rollout": True, "add_identity": residual}
        sink = None if self.sink is None else self.sink[:, :, 0]
        found = roll_out(self.scores[:, :, 0], self.target.mask, residual, memory, sink)
        return replace(
            self,
            scores=(found if sink is None else found[..., :-1])[:, :, None],
            sink=None if sink is None else found[:, :, None, :, -1],
            bias=None,
            unit=f"rollout of {self.unit}",
            includes_residual=self.includes_residual or residual,
            from_input=True,
            provenance=replace(self.provenance, options=options),
        )

    def panels(self) -> tuple[Panel, ...]:
        """Returns one heatmap per sentence, a sheet per layer and head; padding is omitted."""
        found = []
        for row in range(len(self.target.strings)):
            places = {
                axis: tokens.mask[row].nonzero()[:, 0].tolist()
                for axis, tokens in (("target", self.target), ("source", self.source))
            }
            part = self._part({"batch": [row], **places})
            panel = Heatmap(
                title=self._title,
                caption=self._caption(),
                values=part.scores.detach().cpu().flatten(1, 2)[0],
                sheets=self._sheet_names(),
                rows=part.target.strings[0],
                columns=part.source.strings[0],
                causal=part.causal,
                unit=self.unit,
                layers=tuple(layer for layer in self.layers for _ in self.heads),
                heads=tuple(self.heads) * len(self.layers) if len(self.heads) > 1 else (),
                tokens=("rows", "columns"),
                row_positions=part.target.labels(),
                column_positions=part.source.labels(),
                masked=part._later(),
                sides=part.source.sides if len(part.source.sides) > 1 else (),
                axes=("target", "source"),
            )
            found.append(panel if part.sink is None else part._with_sink(panel))
        return tuple(found)

    def _with_sink(self, panel: Heatmap) -> Heatmap:
        """Returns the heatmap of the first sentence with the sink as its first column."""
        assert self.sink is not None
        sink = self.sink.detach().cpu().flatten(1, 2)[0][..., None]
        masked = panel.masked
        return replace(
            panel,
            values=torch.cat([sink, panel.values], dim=-1),
            columns=("(sink)", *panel.columns),
            column_positions=(-1, *panel.column_positions),
            masked=None if masked is None else torch.cat([masked[:, :1] & False, masked], dim=1),
            sides=(("sink", 1), *panel.sides) if panel.sides else (),
        )

    def _later(self) -> torch.Tensor | None:
        """Returns the columns of the first sentence that come after what its rows predict from."""
        if self.target.sides[0][0] != "prediction" or self.stack == "encoder":
            return None
        # Of a sentence that has only padding here, no column is left.
        own = torch.tensor([name != "encoder" for name in self.source.names()], dtype=torch.bool)
        found = own & (self.source.positions()[0] > self.target.positions()[0][:, None])
        # Joined tokens have the position of the last.
        return found & (self.scores[0] == 0).flatten(0, 1).all(dim=0).cpu()

    def _sheet_names(self) -> tuple[str, ...]:
        if len(self.heads) == 1:
            return tuple(f"layer {name}" for name in self.layer_names)
        return tuple(f"L{layer}H{head}" for layer in self.layers for head in self.heads)

    def _given(self, spans: Any, per_second: int | float | None) -> Any:
        """Returns stretches of sources as they were given, or the frames of times in a sound."""
        length = self.source.ids.shape[1]
        return spans if per_second is None else frames_of(spans, per_second, length)

    def _caption(self) -> str:
        """Returns how to read a map."""
        scale = {
            "none": "",
            "sum": " Each row is divided by its sum.",
            "max": " Each row is divided by its maximum.",
        }[self.normalized]
        if self.signed:
            other = "is more than in the other map, red less"
            scale += f" Blue {other if self.is_difference else 'speaks for it, red against it'}."
        predicts = self.target.sides[0][0] == "prediction"
        row = "the predicted token" if predicts else "the token being written"
        if self.sink is not None:
            scale += " The first column is the model's own attention sink, which is no token."
        return f"Row: {row}. Column: the token it comes from.{scale}{self._routing()}"

    def _routing(self) -> str:
        """Returns what was done about the routing to experts, where there are any."""
        options = self.provenance.options
        if options.get("routing") == "held":
            return " Every token goes through the experts that it is routed to in the pass."
        if options.get("routing") != "anew":
            return ""
        moved, pairs = (sum(column) for column in zip(*options["rerouted"].values(), strict=True))
        return (
            " Without the token of the column, that of the row is routed to experts anew: for "
            f"{moved:,} of {pairs:,} pairs these are others."
        )


def _places(have: Tokens, wanted: Tokens, *, sides: bool = False) -> torch.Tensor:
    """Returns where on an axis the tokens of another one are, by position and stack."""
    if len(wanted.ids) != len(have.ids):
        raise unlike("sentences", len(wanted.ids), len(have.ids))
    same = wanted.positions()[:, :, None] == have.positions()[:, None]
    same &= have.mask.cpu()[:, None]
    if sides:
        theirs, mine = (torch.tensor([n == "encoder" for n in t.names()]) for t in (wanted, have))
        same &= theirs[:, None] == mine
    if not bool((same.any(dim=2) | ~wanted.mask.cpu()).all()):
        raise InvalidInput(
            "the map lacks some of these positions",
            f"positions {have.positions().tolist()[0]} of {have.sides}",
            f"those of {wanted.sides}: {wanted.positions().tolist()[0]}",
            "Ask for the map of the whole text.",
        )
    return same.int().argmax(dim=2)


def _merged(
    values: torch.Tensor, tokens: Tokens, spans: Sequence[Spans], how: Literal["sum", "mean", "max"]
) -> torch.Tensor:
    """Returns numbers of words from those of tokens, side by side as `Tokens.join` has them."""
    parts = [merge(values, part, how, tokens.mask) for part in tokens.by_side(spans)]
    return torch.cat(parts, dim=-1)


def _require_rollable(map: ContextMap, encoder: ContextMap | None) -> None:
    map.require_unsigned("rollout")
    if len(map.heads) != 1:
        _refuse(
            f"{len(map.heads)} heads", "one map per layer", "Take .mean('head') or sum the heads."
        )
    _require_tokens(map, encoder)
    if map.layers != tuple(range(len(map.layers))):
        _refuse(
            f"layers {list(map.layers)}",
            "all layers from 0 in order",
            "Compute the map for every layer (layer=None).",
        )
    mixers = map.provenance.options.get("mixers")
    if mixers:
        _refuse(
            f"layers in which {', '.join(mixers[:3])} mix tokens, too",
            "layers that mix tokens by attention alone",
            "Look at the maps of single layers.",
        )
    if map.from_input:
        _refuse(map.unit, "maps of single layers", "Roll the map out once.")


def _warn_of_raw_rows(map: ContextMap) -> None:
    if map.normalized != "none" or map.point == "pattern":
        return
    sums = map.scores.detach().sum(-1)[:, :, 0]
    sums = sums[(sums != 0) & map.target.mask.to(sums.device)[:, None]]
    if sums.numel() and bool(((sums - 1).abs() > _SUM).any()):
        warn(
            "the rollout of a map that was not normalised depends on the size of its rows",
            f"rows that sum to {float(sums.min()):.2g} up to {float(sums.max()):.2g} ({map.unit})",
            "rows that sum to 1, as in every published rollout",
            "Call .normalize() first: map.normalize().rollout().",
        )


def _require_tokens(map: ContextMap, encoder: ContextMap | None) -> None:
    """Checks that targets are the first sources, and the others those of the encoder's map."""
    rows = [*range(len(map.target.strings))]
    length = map.target.ids.shape[1]
    places = [*range(map.source.ids.shape[1])]
    first, others = (map.source.select(rows, part) for part in (places[:length], places[length:]))
    if not map.target.equals(first) or (encoder is None and places[length:]):
        _refuse(
            f"targets of {map.target.sides}, sources of {map.source.sides}",
            "the same tokens on both axes, or a decoder's tokens followed by its encoder's",
            "Use the encoder stack, pass the encoder's map as encoder=, "
            "select(source='decoder') to leave the encoder's tokens out, or take the same "
            "positions on both axes.",
        )
    if encoder is not None and not encoder.target.equals(others):
        _refuse(
            f"an encoder map of {encoder.target.sides}, sources of {map.source.sides}",
            "the encoder's map of the same input",
            "Pass the map of stack='encoder' for a decoder that reads an encoder, and none else.",
        )


def _refuse(seen: str, expected: str, remedy: str) -> NoReturn:
    raise InvalidInput("this map cannot be rolled out", seen, expected, remedy)
