"""Loads models with unprocessed weights.

By default, TransformerLens folds and centres weights, which preserves predictions but changes the
numbers of this package (see `ContextMixWarning`). The two functions here never process weights,
choose the right class for the model and the installed TransformerLens, and read local folders on
every version.

| TransformerLens | causal | masked | encoder-decoder |
|---|---|---|---|
| 2.x | HookedTransformer | HookedEncoder | none, see `load_model` |
| 3.x | HookedTransformer | HookedEncoder | HookedEncoderDecoder (T5), TransformerBridge |
| 4.x | TransformerBridge | TransformerBridge | TransformerBridge |

Importing this module is cheap: transformers and TransformerLens are imported by the functions.
"""

from __future__ import annotations

import contextlib
import copy
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tl_contextmix.adapters.attention_weights import active_in, wraps
from tl_contextmix.adapters.loading.bridge import load_bridge
from tl_contextmix.adapters.loading.hooked import load_hooked
from tl_contextmix.adapters.loading.source import (
    HostClass,
    Placement,
    Source,
    choose_host,
    held_source,
    not_found,
    official_name,
    read_source,
)
from tl_contextmix.adapters.refusals import QUANTIZED, quantized_in
from tl_contextmix.core.validation import FilePath
from tl_contextmix.demo_models import DEMO_NAMES, demo_folder, require_demo_name
from tl_contextmix.errors import InvalidInput, UnsupportedModel, reason, warn

__all__ = ["HostClass", "load_demo", "load_model"]

# `_quiet` swaps process-wide state (sys.stdout, warning filters, random state): one thread at a
# time.
_QUIET = threading.Lock()


def load_demo(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    host: HostClass | None = None,
) -> Any:
    """Loads a demo model that ships with the package; needs no network.

    Their vocabulary is artificial: see `tl_contextmix.demo_models.known_words`.

    Args:
        name: "causal-lm" (GPT-2), "masked-lm" (BERT) or "encoder-decoder" (T5, English to French).
        device: Default: the first CUDA device if there is one, else the processor.
        dtype: Default: float32.
        host: As in `load_model`.

    Returns:
        The model on its default TransformerLens class, in evaluation mode, weights unprocessed.

    Raises:
        InvalidInput: If there is no such demo model.
        UnsupportedModel: For the encoder-decoder under TransformerLens 2.
    """
    require_demo_name(name)
    source = read_source(str(demo_folder(name)), label=name, folder=True)
    return _load(source, device, dtype, host)


def load_model(
    name_or_path: FilePath | torch.nn.Module,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    host: HostClass | None = None,
) -> Any:
    """Loads a model by name or folder, or wraps one in memory, weights unprocessed.

    Encoders that TransformerLens 4 does not list are read, too: XLM-R, CamemBERT, DistilBERT,
    ELECTRA, ALBERT, MPNet, DeBERTa-v2 and v3, ModernBERT, EuroBERT; and classifiers of texts or of
    tokens that were made of these, or of BERT and RoBERTa (``ForSequenceClassification``,
    ``ForTokenClassification``), whose classes are then the targets. The first call compares what
    any bridge computes with the Hugging Face model.

    Args:
        name_or_path: Name of a demo model, a folder written by `save_pretrained` (model and
            tokenizer), or a name on the Hugging Face hub ("gpt2", "bert-base-uncased",
            "t5-small"), TransformerLens' short names included. Or a Hugging Face model in memory
            (TransformerLens 3 and 4): the bridge takes it over and shares its weights. A PEFT model
            is merged in a copy.
        tokenizer: Of a model in memory. Default: the one by the name that it was loaded by.
        device: Default: the first CUDA device if there is one, else the processor; where a model
            in memory is.
        dtype: Default: float32; that of a model in memory.
        host: The TransformerLens class: "hooked" (HookedTransformer, HookedEncoder,
            HookedEncoderDecoder; TransformerLens 2 and 3), "bridge" (TransformerBridge; 3 and 4).
            Default: the Hooked class if there is one for this model, else the bridge.

    Returns:
        The model, in evaluation mode.

    Raises:
        InvalidInput: If no model is found.
        UnsupportedModel: If no class of the installed TransformerLens runs the model correctly, the
            model in memory is quantized, or a classifier's answer is no class of one token.

    Warns:
        ContextMixWarning: If the checkpoint is an encoder without its prediction head. Its hidden
            states are correct; its logits come from a random head and are meaningless.
    """
    if isinstance(name_or_path, torch.nn.Module):
        return _load(held_source(_merged(name_or_path), tokenizer), device, dtype, host)
    if tokenizer is not None:
        raise InvalidInput(
            "a tokenizer is of no use here",
            f"a {type(tokenizer).__name__} for {str(name_or_path)!r}",
            "a tokenizer with a model in memory",
            "Leave it out: the model's own is loaded.",
        )
    text = str(name_or_path)
    if text in DEMO_NAMES:
        return load_demo(text, device=device, dtype=dtype, host=host)
    path = Path(text).expanduser()
    folder = path.is_dir()
    location = str(path) if folder else official_name(text) or text
    label = path.resolve().name if folder else text
    return _load(read_source(location, label=label, folder=folder), device, dtype, host)


def _load(
    source: Source,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    host: HostClass | None,
) -> Any:
    placement = _placement(source, device, dtype)
    chosen = choose_host(source, host)
    if source.hf_model is not None:
        source.hf_model.to(device=placement.device, dtype=placement.dtype)
    if source.headless:
        warn(
            f"logits of {source.label!r} are meaningless",
            f"a checkpoint of {source.written or 'an encoder'}",
            "one with a masked-language-model head",
            "Use only its hidden states: its head is random.",
        )
    with _quiet():
        try:
            build = load_hooked if chosen == "hooked" else load_bridge
            model = build(source, placement).eval()
        except OSError as error:  # weights or tokenizer missing
            raise not_found(source.label, source.location, source.folder, error) from error
    # The host initializes a random head and does not record it.
    model._tl_contextmix_headless = source.headless
    return model


def _placement(
    source: Source, device: str | torch.device | None, dtype: torch.dtype | None
) -> Placement:
    weight = None if source.hf_model is None else next(source.hf_model.parameters())
    if weight is None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        return Placement(_device(device or default), dtype or torch.float32)
    return Placement(_device(device or weight.device), dtype or weight.dtype)


def _merged(model: Any) -> Any:
    """Returns a copy of a model with its adapters (PEFT) merged; one without any as it is.

    Raises:
        UnsupportedModel: If it computes without its adapters, is quantized, or they cannot be
            merged.
    """
    wrapped = hasattr(model, "merge_and_unload")
    # transformers itself puts adapters into a model (`add_adapter`, or the folder of an adapter).
    if not wrapped and not getattr(model, "_hf_peft_config_loaded", False):
        return model
    if packed := quantized_in(model):
        raise QUANTIZED.error(packed)
    # PEFT would merge those that are off, too.
    if any(map(_left_out, model.modules())):
        raise UnsupportedModel(
            "cannot merge adapters that are disabled",
            f"a {type(model).__name__} whose adapters are off, or some of them",
            "adapters that the model computes with",
            "Enable them (unmerge_adapter() where others alone are merged); for the model without "
            "them, load the base model.",
        )
    try:
        found = copy.deepcopy(model)
        _untie(found)
        return found.merge_and_unload() if wrapped else _unloaded(found)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedModel(
            "the adapters cannot be merged into the weights",
            reason(error),
            "adapters that change weights alone",
            "Only such a model is read; see the documentation of PEFT.",
        ) from error


def _left_out(layer: Any) -> bool:
    """Returns whether a layer computes without adapters that are active."""
    if getattr(layer, "disable_adapters", False) is True:
        return True
    merged = {*getattr(layer, "merged_adapters", ())}
    return bool(merged and active_in(layer) - merged)


def _untie(model: Any) -> None:
    """Gives layers that have adapters weights of their own: others that are tied have none."""
    for layer in [*model.modules()]:
        if wraps(layer):
            base = layer.get_base_layer()
            for name, weight in [*base.named_parameters(recurse=False)]:
                own = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
                setattr(base, name, own)


def _unloaded(model: Any) -> Any:
    """Returns a model of transformers with the adapters that it holds merged."""
    for name, layer in [*model.named_children()]:
        if callable(unload := getattr(layer, "unload_and_optionally_merge_module", None)):
            setattr(model, name, unload(merge=True, safe_merge=False, adapter_names=None))
        elif wraps(layer):
            layer.merge()
            setattr(model, name, layer.get_base_layer())
        else:
            _unloaded(layer)
    return model


def _device(named: str | torch.device) -> torch.device:
    try:
        return torch.device(named)
    except RuntimeError as error:
        raise InvalidInput(
            "unknown device",
            repr(named),
            "a PyTorch device such as 'cpu' or 'cuda:0'",
            "Omit device to use the default.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences output, warnings and progress bars while loading, and keeps the random state."""
    from transformers.utils import logging as hf_logging

    with contextlib.ExitStack() as stack:
        stack.enter_context(_QUIET)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        stack.callback(hf_logging.set_verbosity, hf_logging.get_verbosity())
        hf_logging.set_verbosity_error()
        if hf_logging.is_progress_bar_enabled():
            hf_logging.disable_progress_bar()
            stack.callback(hf_logging.enable_progress_bar)
        yield
