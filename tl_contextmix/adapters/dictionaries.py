"""Dictionaries: sparse autoencoders and transcoders as values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.activations import Activation
from tl_contextmix.core.validation import require_choice, whole_number
from tl_contextmix.errors import InvalidInput, UnsupportedModel, seen
from tl_contextmix.results import storage

FeatureActivation = Literal["relu", "jumprelu", "topk"]
# SAELens' names of architectures, which it keeps with every dictionary.
_SAELENS: dict[str, FeatureActivation] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}


@storage.storable
@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    r"""A sparse autoencoder or transcoder, whose features stand for what a model computes.

    .. math:: f = \sigma(x W_{enc} + b_{enc}), \qquad \hat y = f W_{dec} + b_{dec}, \qquad
              y = \hat y + \epsilon

    An SAE reads the residual stream at a point and stands for it (:math:`y = x`); a transcoder
    reads what a feed-forward block reads and stands for what it adds to the stream. A feature is a
    memory: its key is a column of W_enc, its value a row of W_dec. Methods take it as
    ``dictionary=``, with the error :math:`\epsilon` as a component of its own; nothing is ablated.

    Attributes:
        W_enc: Encoder.
        W_dec: Decoder.
        b_enc: Bias of the encoder; None for zeros.
        b_dec: Bias of the decoder; None for zeros. It is not subtracted from the input: fold
            ``-b_dec @ W_enc`` into ``b_enc``, as `from_saelens` does.
        hook_name: What it reads: a point of the stream of a block (``"blocks.2.hook_resid_pre"``),
            or what the feed-forward block reads before or after its norm.
        hook_name_out: What a transcoder stands for: the output of the same feed-forward block
            (``"blocks.2.hook_mlp_out"``); empty for an SAE.
        activation: ``"relu"``, ``"jumprelu"`` (0 up to a threshold) or ``"topk"``.
        threshold: Of each feature, for ``"jumprelu"``.
        k: How many features are active at most, for ``"topk"``.

    Raises:
        InvalidInput: If shapes do not fit, or the activation has not what it needs.

    Example:
        >>> import torch
        >>> import tl_contextmix as cm
        >>> W_enc, W_dec = torch.randn(64, 256), torch.randn(256, 64)
        >>> sae = cm.Dictionary(W_enc, W_dec, hook_name="blocks.2.hook_resid_pre")
        >>> sae
        Dictionary: 256 features (relu) of blocks.2.hook_resid_pre
    """

    W_enc: Float[Tensor, "d_in feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_enc: Float[Tensor, " feature"] = None  # pyright: ignore[reportAssignmentType]
    b_dec: Float[Tensor, " d_out"] = None  # pyright: ignore[reportAssignmentType]
    _: KW_ONLY
    hook_name: str
    hook_name_out: str = ""
    activation: FeatureActivation = "relu"
    threshold: Float[Tensor, " feature"] | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, get_args(FeatureActivation))
        names = self.hook_name, self.hook_name_out
        if not all(isinstance(name, str) for name in names) or not self.hook_name:
            raise _unfit(
                f"hook_name={seen(names[0])}, hook_name_out={seen(names[1])}",
                "names of hook points",
            )
        W_enc, W_dec = _numbers(self.W_enc, "W_enc", 2), _numbers(self.W_dec, "W_dec", 2)
        features = W_dec.shape[0]
        if W_enc.shape[1] != features or not (self.hook_name_out or len(W_enc) == W_dec.shape[1]):
            raise _unfit(
                f"W_enc {[*W_enc.shape]}, W_dec {[*W_dec.shape]}",
                "[d_in, feature] and [feature, d_out]; of an SAE, d_in = d_out",
            )
        found = {"W_enc": W_enc, "W_dec": W_dec}
        for name, size in (("b_enc", features), ("b_dec", W_dec.shape[1]), ("threshold", features)):
            given = getattr(self, name)
            if given is None and name == "threshold":
                continue
            vector = W_dec.new_zeros(size) if given is None else _numbers(given, name, 1)
            if len(vector) != size:
                raise _unfit(f"{name} of {len(vector)} numbers", f"{size}")
            found[name] = vector
        for name, tensor in found.items():
            object.__setattr__(self, name, tensor)
        if (self.activation == "jumprelu") != (self.threshold is not None):
            raise _unfit(
                f"activation={self.activation!r}, threshold={seen(self.threshold)}",
                "a threshold for 'jumprelu', and for nothing else",
            )
        k = whole_number(self.k)
        object.__setattr__(self, "k", k)
        if (self.activation == "topk") != (k is not None and 0 < k <= features):
            raise _unfit(
                f"activation={self.activation!r}, k={self.k!r}",
                f"k from 1 to {features} for 'topk', and for nothing else",
            )

    @classmethod
    def from_saelens(cls, sae: Any) -> Dictionary:
        """Returns an SAE or transcoder of SAELens.

        What SAELens subtracts from the input, and decoder norms that it multiplies activations
        with, are folded into the weights: features and reconstructions stay the same.

        Args:
            sae: The object, or the folder that its ``save_model`` wrote, for which SAELens need not
                be installed.

        Raises:
            UnsupportedModel: If it is of another architecture, or rescales its input at run time.
            InvalidInput: If it is none, or cannot be read.
        """
        if isinstance(sae, (str, Path)):
            return _folded(*_read_folder(Path(sae)))
        if not hasattr(getattr(sae, "cfg", None), "to_dict") or not hasattr(sae, "state_dict"):
            raise InvalidInput(
                "this is no SAE of SAELens",
                seen(sae),
                "an object with cfg and state_dict, or a folder",
                "Give plain tensors to Dictionary itself.",
            )
        return _folded(sae.cfg.to_dict(), sae.state_dict())

    def save(self, path: str | Path) -> Path:
        """Writes it to one safetensors file and returns the path."""
        return storage.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Dictionary:
        """Reads what `save` wrote.

        Raises:
            FileFormatError: If the file holds something else.
        """
        return storage.load(cls, path)

    def __repr__(self) -> str:
        how = self.activation if self.k is None else f"{self.activation}, k={self.k}"
        where = f"of {self.hook_name}"
        if self.hook_name_out:
            where = f"from {self.hook_name} to {self.hook_name_out}"
        return f"Dictionary: {self.d_sae:,} features ({how}) {where}"

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hook points of what it reads and, of a transcoder, what it stands for."""
        return (self.hook_name, self.hook_name_out) if self.hook_name_out else (self.hook_name,)

    @property
    def d_sae(self) -> int:
        """How many features it has."""
        return self.W_dec.shape[0]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that it holds."""
        found = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            else:
                found.update(repr(value).encode())
        return found.hexdigest()[:16]

    def activation_function(self) -> Activation:
        """Returns the activation of its features, all of them along the last axis.

        It is multiplication with 0 or 1, which is its secant slope from zero.
        """
        k, threshold = self.k, self.threshold

        def gate(pre: Tensor) -> Tensor:
            passed = pre > 0
            if threshold is not None:
                passed = passed & (pre > threshold.to(pre))
            if k is not None and pre.ndim:
                best = torch.zeros_like(passed)
                passed = passed & best.scatter(-1, pre.topk(k, dim=-1).indices, value=True)
            return passed.to(pre.dtype)

        return Activation(self.activation, lambda pre: pre * gate(pre), gate=gate, kink=True)


Dictionaries = Dictionary | Sequence[Dictionary] | None
"""What methods take as ``dictionary=``."""


def _numbers(given: Any, name: str, axes: int) -> Tensor:
    try:
        result = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        result = torch.zeros(())
    if result.ndim != axes or not result.is_floating_point() or not bool(result.isfinite().all()):
        raise _unfit(f"{name}={seen(given)}", f"finite real numbers with {axes} axes")
    return result


def _unfit(found: str, expected: str) -> InvalidInput:
    return InvalidInput(
        "these tensors are no dictionary",
        found,
        expected,
        "Pass W_enc [d_in, feature], W_dec [feature, d_out], a hook point and what the activation "
        "needs.",
    )


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "cfg.json").read_text())
        return dict(config), load_file(folder / "sae_weights.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InvalidInput(
            "this folder holds no SAE of SAELens",
            f"{folder}: {error}",
            "cfg.json and sae_weights.safetensors",
            "Name the folder that save_model wrote.",
        ) from error


def _folded(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Dictionary:
    """Returns a dictionary of SAELens, with all that it does at run time in its weights."""
    inner = config.get("metadata")
    metadata = {**config, **(inner if isinstance(inner, Mapping) else {})}
    kind, norm = config.get("architecture"), config.get("normalize_activations", "none")
    if (
        not isinstance(kind, str)
        or kind not in _SAELENS
        or norm != "none"
        or config.get("reshape_activations") == "hook_z"
    ):
        raise UnsupportedModel(
            "this SAE cannot stand in a model",
            f"architecture {kind!r}, normalize_activations {norm!r}",
            f"one of {sorted(_SAELENS)} whose input is not rescaled",
            "Fold the scale into its weights first (fold_activation_norm_scaling_factor); "
            "gated and skip dictionaries, and those of hook_z, are not supported.",
        )
    names = ("hook_name", "hook_name_out") if kind.endswith("transcoder") else ("hook_name",)
    read, out = (*(str(metadata.get(name) or "") for name in names), "")[:2]
    if not all(metadata.get(name) for name in names):
        raise InvalidInput(
            "it is not known where this SAE stands",
            f"hook_name {read!r}, hook_name_out {out!r} in its metadata",
            f"the {' and the '.join(names)} of {kind!r}",
            "Set them: sae.cfg.metadata.hook_name = ...",
        )
    activation = _SAELENS[kind]
    wanted = ["W_enc", "W_dec", "b_enc", "b_dec", *["threshold"] * (activation == "jumprelu")]
    absent = [name for name in wanted if name not in tensors]
    if absent:
        raise _unfit(f"no {', '.join(absent)}", f"{', '.join(wanted)}, as {kind!r} has them")
    W_enc, W_dec, b_enc, b_dec = (tensors[name] for name in wanted[:4])
    if config.get("apply_b_dec_to_input") and not out:
        b_enc = b_enc - b_dec @ W_enc
    if config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=-1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    return Dictionary(
        W_enc,
        W_dec,
        b_enc,
        b_dec,
        hook_name=read,
        hook_name_out=out,
        activation=activation,
        threshold=tensors["threshold"] if activation == "jumprelu" else None,
        k=config.get("k") if activation == "topk" else None,
    )
