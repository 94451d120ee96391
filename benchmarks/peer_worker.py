"""What `peers.py` runs in the environment of a peer; the peer's published code is not changed.

``python peer_worker.py PEER CHECKOUT`` reads one JSON object per line from standard input and
answers each with one on standard output. The environment needs what the peer needs, no more.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import platform
import sys
import tempfile
import time
import types
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

TOP = 25


def package(name, folder, **names):
    """Makes a package of a folder without running its ``__init__``, which may ask for more."""
    made = types.ModuleType(name)
    made.__path__ = [str(folder)]
    made.__dict__.update(names)
    sys.modules[name] = made


def module(name, file):
    """Returns a file as a module of that name: code that takes the place of an installed one."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def weights(model, folder):
    """Loads saved weights; heads that were not saved stay as they are, and are not asked."""
    found = model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    # Heads, and buffers that earlier versions kept among the weights.
    spare = ("classifier", "pooler", "position_ids", "attn.bias", "masked_bias", "lm_head", "cls")
    missing = [name for name in found.missing_keys if not any(one in name for one in spare)]
    assert not missing, missing
    return model.eval()


def config_of(folder, kind):
    """Returns the configuration of a saved model, in the class of a peer's own transformers."""
    return kind(**json.loads(Path(folder, "config.json").read_text()))


class Kobayashi:
    """The fork of transformers for Kobayashi et al. 2021 (``output_norms``)."""

    def __init__(self, checkout, folder):
        package("fork", checkout / "emnlp2021/transformers/src/transformers", __version__="")
        bert = importlib.import_module("fork.modeling_bert")
        self.model = weights(bert.BertForMaskedLM(config_of(folder, bert.BertConfig)), folder).bert

    def __call__(self, ids):
        """Returns its norms: of heads, of their sum, with the residual, past the norm; a ratio."""
        norms = self.model(ids, output_norms=True)[-1]
        names = ("heads", "attn_out", "resid_mid", "mlp_in", "", "", "ratio")
        found = zip(names, zip(*norms, strict=True), strict=True)
        return {name: torch.stack(some)[:, 0] for name, some in found if name}


class GlobEnc:
    """``modeling_bert.py`` of GlobEnc (N-Enc of every layer)."""

    def __init__(self, checkout, folder):
        package("globenc", checkout / "src/modeling")
        bert = importlib.import_module("globenc.modeling_bert")
        config = config_of(folder, bert.BertConfig)
        self.model = weights(bert.BertForSequenceClassification(config), folder).bert

    def __call__(self, ids):
        """Returns its norms, and what the class returns with them."""
        found = self.model(ids, output_norms=True, return_dict=False)[-1]
        return {"globenc": torch.stack([norms[4] for norms in found])[:, 0]}


class Alti:
    """``ModelWrapper`` of ALTI's published code."""

    def __init__(self, checkout, folder):
        os.chdir(checkout)  # its configuration is read from there
        package("alti", checkout / "src")
        code = importlib.import_module("alti.contributions")
        cls = transformers.BertForSequenceClassification
        config = config_of(folder, transformers.BertConfig)
        self.wrapper = code.ModelWrapper(weights(cls(config), folder))
        # The wrapper computes contributions twice when asked for them; once is timed.
        inner, self.wrapper.get_contributions = self.wrapper.get_contributions, self.keep
        self.inner = inner

    def keep(self, *args):
        """Keeps what is computed where it would be thrown away."""
        self.found = self.inner(*args)
        return self.found

    def __call__(self, ids):
        """Returns distances as the paper's contributions, before they are divided by their sums."""
        self.wrapper({"input_ids": ids}, contributions=False)
        reached = self.found["resultants"].abs().sum(-1)[..., None]
        return {"alti": (reached + self.found["contributions"]).clamp(min=0)}


class DecompX:
    """``modeling_bert.py`` of DecompX, biases left out."""

    aggregation = "vector"

    def __init__(self, checkout, folder):
        package("decompx", checkout / "src")
        bert = importlib.import_module("decompx.modeling_bert")
        utils = importlib.import_module("decompx.decompx_utils")
        config = config_of(folder, transformers.BertConfig)
        self.model = weights(bert.BertForSequenceClassification(config), folder).bert
        self.asked = utils.DecompXConfig(
            include_biases=False,
            aggregation=self.aggregation,
            include_classifier_w_pooler=False,
            output_all_layers=True,
            output_encoder="norm",
        )

    def __call__(self, ids):
        """Returns norms of its vectors past every layer."""
        mask = torch.ones_like(ids)
        found = self.model(ids, mask, return_dict=False, decompx_config=self.asked)
        return {"norms": torch.stack(found[-1].encoder)[:, 0]}


class OneBlock(DecompX):
    """The same code, block by block."""

    aggregation = None


class Notebook:
    """The cells of the notebook for Yu and Ananiadou 2024, and its ``modeling_gpt2.py``."""

    cells = ("#layer-level increase", "#head-level increase", "#FFN neuron")

    def __init__(self, checkout, folder):
        gpt2 = module("transformers.models.gpt2.published", checkout / "modeling_gpt2.py")
        config = config_of(folder, transformers.GPT2Config)
        config.bos_token_id = config.eos_token_id = 0
        model = weights(gpt2.GPT2LMHeadModel(config), folder)
        model.tie_weights()
        cells = json.loads((checkout / "GPT2_view_knowledge.ipynb").read_text())["cells"]
        source = ["".join(cell["source"]) for cell in cells]
        heads = config.n_head
        self.names = {"torch": torch, "model": model, "LAYER_NUM": config.n_layer}
        self.names |= {"HEAD_NUM": heads, "HEAD_DIM": config.n_embd // heads}
        exec(next(one for one in source if one.startswith("def transfer_output")), self.names)
        # No pictures, and no words for ids.
        self.names |= dict.fromkeys(("plt_bar", "plt_heatmap"), lambda *_: None)
        self.names["tokenizer"] = types.SimpleNamespace(decode=str)
        self.code = {s: next(one for one in source if one.startswith(s)) for s in self.cells}
        self.asked = self.cells

    def only(self, cell):
        """Runs one of its cells from now on."""
        self.asked = (cell,)

    def __call__(self, ids):
        """Runs the model and the cells; returns increases of every layer, head and neuron."""
        names = self.names
        out = names["model"](ids)
        kept = names["transfer_output"](out[1])
        columns = ("layer_input", "attn_output", "residual_output", "ffn_output", "layer_output")
        names |= {f"all_pos_{name}": one for name, one in zip(columns, kept, strict=False)}
        names |= {"all_last_attn_subvalues": kept[5], "all_pos_coefficient_scores": kept[6]}
        last = torch.tensor(kept[4][-1][-1])
        names["final_var"] = ((torch.var(last, -1, unbiased=False) + 1e-5) ** 0.5).item()
        names["predict_index"] = int(out[0][0, -1].argmax())
        for cell in self.asked:
            exec(self.code[cell], names)
        found = {"target": torch.tensor(names["predict_index"])}
        if self.cells[0] in self.asked:
            pair = (names["all_attn_log_increase"], names["all_ffn_log_increase"])
            found["layer"] = torch.tensor(pair).T
        if self.cells[1] in self.asked:
            found["head"] = torch.tensor([one[1] for one in names["all_head_increase"]])
        if self.cells[2] in self.asked:
            found["neuron"] = torch.tensor([one[1] for one in names["ffn_subvalue_list"]])
        return found


class LlmTt:
    """The contribution graph of the LLM Transparency Tool, on its TransformerLens 2."""

    def __init__(self, checkout, folder):
        sys.path.insert(0, str(checkout))
        tlens = importlib.import_module("llm_transparency_tool.models.tlens_model")
        self.tlens = tlens
        self.graph = importlib.import_module("llm_transparency_tool.routes.graph")
        hugging_face = transformers.AutoModelForCausalLM.from_pretrained(folder)
        # TransformerLens asks for the configuration and tokenizer by the model's published name.
        place = Path(tempfile.mkdtemp(), "gpt2")
        place.mkdir()
        for name in ("config.json", "tokenizer.json"):
            (place / name).symlink_to(Path(folder, name))
        roles = json.loads(Path(folder, "tokenizer_config.json").read_text())
        roles = {role: token for role, token in roles.items() if role.endswith("_token")}
        named = roles | {"tokenizer_class": "PreTrainedTokenizerFast"}
        (place / "tokenizer_config.json").write_text(json.dumps(named))
        os.chdir(place.parent)
        # Without Streamlit's cache, which does not take this model as a key.
        loaded = tlens.load_hooked_transformer.__wrapped__(
            "gpt2", hf_model=hugging_face, tlens_device="cpu", supported_model_name="gpt2"
        )
        loaded.set_use_attn_result(True)

        class Loaded(tlens.TransformerLensTransparentLlm):
            """A model that is loaded already; the published class does so at each access."""

            _model = loaded

        self.model = Loaded("gpt2", device="cpu")

    def __call__(self, ids):
        """Returns importances [layer target source], of heads and the residual together."""
        logits, cache = self.model._model.run_with_cache(ids)
        self.model._last_run = self.tlens._RunInfo(tokens=ids, logits=logits, cache=cache)
        graph = self.graph.build_full_graph(self.model)
        layers, count = self.model.model_info().n_layers, ids.shape[1]
        found = torch.zeros(layers, count, count)
        for layer in range(layers):
            below = f"I{layer - 1}" if layer else "X0"
            for target in range(count):
                for source in range(count):
                    edge = graph.edges.get((f"{below}_{source}", f"A{layer}_{target}"))
                    found[layer, target, source] = edge["weight"] if edge else 0
        return {"edges": found[:-1], "last": found[-1, -1]}


class Delphi:
    """The cache of activations of delphi, the neurons in the place of latents."""

    def __init__(self, checkout, folder):
        sys.path.insert(0, str(checkout))
        self.code = importlib.import_module("delphi.latents.cache")
        kind = transformers.AutoModelForCausalLM
        self.model = kind.from_pretrained(folder, attn_implementation="eager").eval()
        layers = range(self.model.config.num_hidden_layers)
        self.points = {f"transformer.h.{i}.mlp.act": lambda x: x for i in layers}

    def __call__(self, ids):
        """Returns the largest activations of each neuron, from everything that it keeps."""
        cache = self.code.LatentCache(self.model, dict(self.points), len(ids))
        cache.run(ids.numel(), ids)
        tops, kept = [], cache.cache
        for point in self.points:
            places, values = kept.latent_locations[point], kept.latent_activations[point]
            dense = torch.full((ids.numel(), cache.width), -torch.inf)
            dense[places[:, 0] * ids.shape[1] + places[:, 1], places[:, 2]] = values
            tops.append(dense.topk(TOP, dim=0).values.T)
        return {"top": torch.stack(tops).clamp(min=0)}  # negative ones do not count here


PEERS = {
    "kobayashi": Kobayashi,
    "globenc": GlobEnc,
    "alti": Alti,
    "decompx": DecompX,
    "decompx block": OneBlock,
    "notebook": Notebook,
    "llm-tt": LlmTt,
    "delphi": Delphi,
}


class Session:
    """What is asked of one peer."""

    def __init__(self, peer, checkout):
        self.peer, self.checkout = PEERS[peer], Path(checkout)

    def load(self, folder):
        """Loads a saved model; returns versions."""
        torch.manual_seed(0)
        self.runs = self.peer(self.checkout, folder)
        names = ("torch", "transformers")
        return {"python": platform.python_version()} | {name: version(name) for name in names}

    def only(self, part):
        """Asks for one part from now on."""
        self.runs.only(part)
        return {}

    def numbers(self, ids):
        """Returns what it computes, and operations in products of matrices."""
        with FlopCounterMode(display=False) as counter:
            found = self.runs(torch.tensor(ids))
        numbers = {name: one.tolist() for name, one in found.items()}
        return {"numbers": numbers, "flops": counter.get_total_flops()}

    def seconds(self, ids):
        """Returns the processor's seconds of one call."""
        given = torch.tensor(ids)
        start = time.process_time()
        self.runs(given)
        return {"seconds": time.process_time() - start}


def main():
    """Answers requests until standard input ends."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    session, answers = Session(*sys.argv[1:]), sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answer = getattr(session, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
