"""Probing: which layer lets a label be read (Voita & Titov 2020; Hewitt & Liang 2019)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Input, TokenInputs, name_tokens, read_batch
from tl_contextmix.adapters.passes import Pass, provenance, run_pass
from tl_contextmix.adapters.questions import one_each
from tl_contextmix.adapters.questions.positions import predicting_rows, rows_at
from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.model_view import ModelView, StackName
from tl_contextmix.core.online_code import online_code, stretch_ends
from tl_contextmix.core.residual_stream import needed
from tl_contextmix.core.validation import LATER, Layers, Positive, PositiveNumber, require_choice
from tl_contextmix.engine.registry import method
from tl_contextmix.engine.stream_points import POINTS, StatePoint, state_at, state_needs
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.results import Probing

# Lists, tensors, arrays and columns of tables.
Classes = Annotated[Sequence[Hashable] | Tensor | Any, LATER]
Control = Annotated[Literal["shuffled", "token"] | Sequence[Hashable] | Any, LATER]


@method(cites=("voita2020information", "hewitt2019designing"), on_text=False)
def probe(
    model: object,
    input: Input,
    classes: Classes,
    *,
    at: StatePoint | Sequence[StatePoint] = "block_out",
    layer: Layers | None = None,
    stack: StackName | None = None,
    pos: int | Sequence[int] | None = None,
    hidden: Positive | None = None,
    penalty: PositiveNumber = 1.0,
    control: Control = "shuffled",
    seeds: Positive = 5,
    batch_size: Positive = 64,
    **inputs: Unpack[TokenInputs],
) -> Probing:
    r"""Returns how easily the class of each text can be read from a position, layer by layer.

    Probes are judged by the minimum description length of the classes (Voita & Titov 2020): the
    online code sends the classes of the texts in stretches that end at 0.8, 1.6, 3.2, 6.25, 12.5,
    25, 50 and 100 % of them (Mohebbi et al. 2023), each with a probe trained on all before it,

    .. math::

        L = t_1 \log_2 K - \sum_{i=1}^{S-1} \log_2 p_{\theta_i}(y_{t_i+1:t_{i+1}} \mid
        x_{t_i+1:t_{i+1}}), \qquad \mathrm{compression} = \frac{n \log_2 K}{L}

    so that a class that can be read from few examples has a short code, and one that a probe has to
    memorise does not. Compression is 1 for a uniform guess, and less where a probe is confidently
    wrong, as it is after few examples. Accuracy is that of the last probe, trained on half of the
    texts, on the other half; *selectivity* is that less the accuracy with control labels, which
    nothing but memory can give (Hewitt & Liang 2019).

    A probe is a logistic regression, or has one hidden layer (ReLU). It reads the activation with
    each dimension at mean 0 and variance 1 over all texts, and minimises its summed loss plus
    ``penalty`` / 2 times the squared size of its parameters, by L-BFGS.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: Texts, or token ids [batch, pos]; one position of each is read.
        classes: The class of each text, any values that can be compared.
        at: The point of each block, or several: those of `Direction` (``"resid_pre"``,
            ``"attn_in"``, ``"resid_mid"``, ``"mlp_in"``, ``"resid_post"``, ``"block_out"``), or
            what a sublayer adds (``"attn_out"``, ``"mlp_out"``). ``"resid_pre"`` of layer 0 is what
            enters the first block, the embeddings.
        layer: Layer or layers; None for all.
        stack: ``"encoder"`` or ``"decoder"`` of an encoder-decoder; None for the decoder.
        pos: The position, one for all or one for each text; negative counts from the last real
            token. None: the mask of a masked model, else the last real token.
        hidden: Units of the hidden layer; None for a linear probe.
        penalty: See above; 1 is scikit-learn's default for a logistic regression.
        control: What control labels are, drawn anew for each seed. ``"shuffled"``: the classes in
            random order. ``"token"``: every token that is read gets a class of its own, drawn as
            often as it occurs. Or one value for each text, such as its verb: texts of one value get
            the same class.
        seeds: How often everything random is drawn: the order of the texts, control labels, and
            first weights where there is a hidden layer.
        batch_size: Texts in a forward pass.
        **inputs: Mask, padding and the like, see `TokenInputs`.

    Returns:
        `Probing` [seed point layer]; ``curves()`` has means and intervals over seeds, and
        ``beside`` puts it next to what `compare` says of maps.

    Raises:
        InvalidInput: If an argument does not fit the model, there is not one class for each text,
            or fewer than two of them.
        UnsupportedModel: If hooks of the user's own edit the pass so that the point is not what
            the block reads or writes.

    Cost: a forward pass; per point, layer, seed and step of L-BFGS (tens for each stretch)
    ``12 n d_model K`` operations at most, with a hidden layer of ``H`` units ``12 n d_model H``.
    """
    view = name_tokens(as_view(model), inputs.get("labels"))
    points = (at,) if isinstance(at, str) else tuple(at)
    for one in points or (at,):
        require_choice("point", one, POINTS)
    base = view.base_stack(stack)
    given = Given(input, **inputs)
    batch = read_batch(view, given)
    rows = _positions(view, batch, base, pos)
    names, labels = _classes(classes, len(rows))
    forward_pass, states = _states(view, given, batch, (points, layer, stack), rows, batch_size)
    tokens = batch.side(base).ids.cpu().gather(1, rows[:, None])[:, 0].tolist()
    orders, controls = _draws(labels, _types(control, tokens, len(rows)), seeds)
    every = torch.cat([labels.expand(seeds, -1), controls])
    found = [
        online_code(
            _standardised(states[:, place, index]),
            every,
            orders.repeat(2, 1),
            len(names),
            ends=stretch_ends(len(rows)),
            hidden=hidden,
            penalty=penalty,
            seeds=[*range(seeds)] * 2,
        )
        for place in range(len(points))
        for index in range(states.shape[2])
    ]
    shape = (2, seeds, len(points), states.shape[2])
    bits, accuracy = (torch.stack([*some], dim=-1).view(shape) for some in zip(*found, strict=True))
    return Probing(
        bits=bits[0],
        control_bits=bits[1],
        accuracy=accuracy[0],
        control_accuracy=accuracy[1],
        points=points,
        layers=forward_pass.layers,
        classes=names,
        counts=tuple(labels.bincount(minlength=len(names)).tolist()),
        provenance=provenance(
            view,
            "probe",
            {
                "at": [*points],
                "pos": rows.tolist(),
                "stack": base,
                "hidden": hidden,
                "penalty": penalty,
                "control": control if isinstance(control, str) else "given",
            },
        ),
    )


def _positions(view: ModelView, batch: Batch, stack: str, pos: object) -> Int[Tensor, " text"]:
    """Returns the position that is read of each text."""
    if pos is None:
        return torch.tensor(predicting_rows(view, batch, stack, None))[:, 0]
    mask = batch.side(stack).mask
    each = one_each(pos, len(mask), "position")
    return torch.cat([rows_at(one, mask[row : row + 1]) for row, one in enumerate(each)])


def _classes(given: Any, count: int) -> tuple[tuple[str, ...], Int[Tensor, " text"]]:
    """Returns the names of the classes, and the number of the class of each text."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    fine = isinstance(listed, Sequence) and not isinstance(listed, (str, bytes))
    numbers = _numbers(listed) if fine and len(listed) == count else None
    if numbers is None or len(numbers[0]) < 2:
        raise InvalidInput(
            "the classes do not fit the texts",
            f"{len(listed)} classes" if fine and len(listed) != count else seen(listed),
            f"the class of each of {count} texts, of which at least two differ",
            "Pass a list with one value for each text, such as True and False; leave out texts "
            "without a class (NaN).",
        )
    return numbers


def _types(control: Any, tokens: list[int], count: int) -> Int[Tensor, " text"] | None:
    """Returns which texts share a control label; None: they are shuffled."""
    if isinstance(control, str):
        require_choice("control", control, ("shuffled", "token"))
        if control == "shuffled":
            return None
        control = tokens
    listed = control.tolist() if hasattr(control, "tolist") else control
    fine = isinstance(listed, Sequence) and len(listed) == count
    numbers = _numbers(listed) if fine else None
    if numbers is None:
        raise InvalidInput(
            "control= cannot be read",
            seen(control),
            f"'shuffled', 'token', or a list with one value for each of {count} texts",
            "Texts with the same value get the same control label.",
        )
    return numbers[1]


def _numbers(listed: Sequence[Any]) -> tuple[tuple[str, ...], Int[Tensor, " text"]] | None:
    """Returns what differs among some values in order of appearance; None if it cannot be told."""
    try:
        if any(bool(value != value) for value in listed):  # NaN: a dictionary knows it by identity
            return None
        places = {value: place for place, value in enumerate(dict.fromkeys(listed))}
    except (TypeError, ValueError):  # what cannot be hashed or compared
        return None
    found = torch.tensor([places[value] for value in listed])
    return tuple(map(str, places)), found


def _states(
    view: ModelView,
    given: Given,
    batch: Batch,
    asked: tuple[tuple[StatePoint, ...], Layers | None, StackName | None],
    rows: Int[Tensor, " text"],
    batch_size: int,
) -> tuple[Pass, Float[Tensor, "text point layer d_model"]]:
    """Returns the activations that are read, a few texts at a time."""
    points, layer, stack = asked

    def read(part: Pass, places: Tensor) -> Tensor:
        own = part.own_positions(places)
        each = torch.arange(len(own))
        found = [
            torch.stack([state_at(block, part.trace, at)[each, own] for block in part.blocks], 1)
            for at in points
        ]
        return torch.stack(found, dim=1)

    # Texts of like length share a pass; hooks may count on the batch that was given.
    side = batch.side(view.base_stack(stack))
    order = side.mask.sum(dim=1).argsort(stable=True).cpu()
    some = [order.sort().values] if view.hooked() else order.split(batch_size)
    found, forward_pass = [], None
    with torch.no_grad():
        for texts in some:
            forward_pass = run_pass(
                view,
                given,
                layer=layer,
                stack=stack,
                also=needed,
                needs=state_needs(points),
                batch=batch.each(lambda tensor, texts=texts: tensor[texts]),
            )
            places = rows[texts]
            part = forward_pass.together(
                lambda part, p=places: {"states": ("batch", read(part, p))}
            )
            found.append(part["states"])
    assert forward_pass is not None
    states = torch.cat(found)
    return forward_pass, states[torch.cat([*some]).argsort()]


def _standardised(x: Float[Tensor, "text d_model"]) -> Float[Tensor, "text d_model"]:
    """Returns activations with each dimension at mean 0 and variance 1; constant ones at 0."""
    x = x - x.mean(0)
    scale = x.square().mean(0).sqrt()
    return x / torch.where(scale > torch.finfo(x.dtype).eps * x.abs().amax(), scale, torch.inf)


def _draws(
    labels: Int[Tensor, " text"], types: Int[Tensor, " text"] | None, seeds: int
) -> tuple[Int[Tensor, "seed text"], Int[Tensor, "seed text"]]:
    """Returns the order of the texts and the control labels of each seed."""
    orders, controls = [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        orders.append(torch.randperm(len(labels), generator=generator))
        if types is None:
            controls.append(labels[torch.randperm(len(labels), generator=generator)])
        else:
            count = int(types.max()) + 1
            drawn = torch.randint(len(labels), (count,), generator=generator)
            controls.append(labels[drawn][types])
    return torch.stack(orders), torch.stack(controls)
