"""What `inseq.py` runs inside of inseq's own environment; it needs inseq and PyTorch, no more.

Reads one JSON object per line from standard input and answers each with one on standard output:
``{"do": "load", ...}`` and so on, see the functions below. A failure is an answer too.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import platform
import sys
import time
import warnings
from importlib.metadata import version
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

# Not by an import statement: checkers take that for the `inseq.py` of this folder.
inseq = importlib.import_module("inseq")
MODEL: Any = None
"""The model of the last request to load one."""


class Spy:
    """Stands before inseq's method and keeps what goes in and comes out, and how long it takes."""

    def __init__(self, method):
        # inseq reads the signature to tell the method's options from others.
        self.inner = self.__wrapped__ = method.attribute
        method.attribute = self

    def __call__(self, *args, **kwargs):
        """Runs the method."""
        start = time.process_time()
        self.maps = self.inner(*args, **kwargs)
        self.seconds = time.process_time() - start
        self.states = [value for name, value in kwargs.items() if name.endswith("hidden_states")]
        return self.maps


def versions():
    """Returns what is installed."""
    names = ("inseq", "transformers", "torch")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def load(folder, roles):
    """Loads weights and tokenizer; ``roles`` are the tokenizer's special tokens."""
    global MODEL
    MODEL = None
    # Tokenizer settings saved by transformers 5 cannot be read by 4; the vocabulary can.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", **roles
    )
    # inseq 0.6.0 does not ask for eager attention itself. With the fused kernels of transformers
    # 4.47 its hook never runs: every score is 0 and no error is raised.
    MODEL = inseq.load_model(
        folder,
        "value_zeroing",
        tokenizer=tokenizer,
        device="cpu",
        model_kwargs={"attn_implementation": "eager"},
    )
    MODEL.model.requires_grad_(False)  # the counter of operations fails on encoder-decoders else
    MODEL.spy = Spy(MODEL.attribution_method.method)
    return {}


def attribute(text, target):
    """Runs inseq as a user would; ``target`` is None for models of one stack."""
    # Of models of one stack inseq reads all tokens but the last, whatever the prompt is.
    options = {} if target is None else {"attribute_target": True}
    # Where its hook did not run, inseq leaves its trace function behind; the next call fails then.
    sys.settrace(None)
    given = (text.split(" ")[0], text) if target is None else (text, target)
    MODEL.attribute(*given, show_progress=False, pretty_progress=False, **options)


def maps(text, target=None):
    """Returns each map [layer target source] and what inseq's model saw."""
    sent = []
    forward = MODEL.forward_with_output

    def note(*args, **kwargs):
        sent.append([x.tolist() for x in args if isinstance(x, torch.Tensor) and x.ndim == 2])
        return forward(*args, **kwargs)

    MODEL.forward_with_output = note
    try:
        attribute(text, target)
    finally:
        del MODEL.forward_with_output
    return {
        # inseq's order is [batch source target layer].
        "maps": [m[0].permute(2, 1, 0).nan_to_num(0).tolist() for m in MODEL.spy.maps],
        # Token ids come before the masks.
        "ids": sent[0][: 1 if target is None else 2],
        "states": [state[0, -1].tolist() for state in MODEL.spy.states],
        "passes": 1 + len(sent),
    }


def seconds(text, target=None):
    """Returns the processor's seconds of one call, and of the method alone."""
    start = time.process_time()
    attribute(text, target)
    return {"call": time.process_time() - start, "method": MODEL.spy.seconds}


def flops(text, target=None):
    """Returns operations in products of matrices of one call."""
    with FlopCounterMode(display=False) as counter:
        attribute(text, target)
    return {"flops": counter.get_total_flops()}


def saliency(text, target, step, contrast=None):
    """Returns input x gradient of each token that follows a text, as lengths of vectors.

    Args:
        text: The text; of models of one stack the target goes on from it.
        target: What is written.
        step: Name of the function of a step that is attributed.
        contrast: What might be written instead.
    """
    one = not MODEL.is_encoder_decoder
    written = [f"{text} {some}" if one else some for some in (target, contrast) if some]
    options = {"contrast_targets": written[1]} if contrast else {}
    found = MODEL.attribute(
        text,
        written[0],
        method="input_x_gradient",
        attributed_fn=step,
        attribute_target=not one,
        show_progress=False,
        pretty_progress=False,
        **options,
    ).sequence_attributions[0]
    sides = (
        [found.target_attributions]
        if one
        else [found.target_attributions, found.source_attributions]
    )
    # inseq's order is [source target d_model].
    return {
        "rows": [side.norm(dim=-1).nan_to_num(0).T.tolist() for side in sides],
        "start": found.attr_pos_start,
    }


def main():
    """Answers requests until standard input ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    known = {f.__name__: f for f in (versions, load, maps, seconds, flops, saliency)}
    answers = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answer = known[request.pop("do")](**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
