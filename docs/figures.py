"""Makes the figures of the methods' pages: ``python docs/figures.py``, TransformerLens 3 or 4.

Each is what ``result.figure()`` gives of the page's own example; of some, the first panel alone.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import tl_contextmix as cm
from tl_contextmix.evaluation import demo_pairs
from tl_contextmix.results import Result

IMAGES = Path(__file__).parent / "pages" / "images"
POINTS = ("resid_mid", "mlp_in", "mlp_out", "resid_post", "block_out")
FIRST = {"flow", "probing"}  # long tables would follow, or the same chart of other figures
TEXT = "the keys to the cabinet are"


def results() -> dict[str, Result]:
    """Returns what each page shows, by the name of its figure."""
    model, translator = cm.load_demo("causal-lm"), cm.load_demo("encoder-decoder")
    maps = cm.attention_norms(model, TEXT, at=POINTS)
    fact = "the capital of france is"
    return {
        "norms": maps["block_out"].normalize(),
        "feed_forward": cm.contextualization_change(maps),
        "value_zeroing": cm.value_zeroing(model, TEXT).normalize(),
        "memories": cm.ff_memories(model, TEXT).figures(),
        "log_prob": cm.log_prob_contributions(model, fact, target=" paris"),
        "attention_knockout": cm.attention_knockout(
            model,
            fact,
            target=" paris",
            sources={"subject": " france", "last": -1, "rest": (0, 4)},
            window=3,
        ),
        "context_reliance": cm.context_reliance(
            model, "the capital of france is rome .", fact, generate=3
        ),
        "flow": cm.flow(model, "the keys to the cabinet", target=" are", foil=" is"),
        "decoder_lens": cm.decoder_lens(translator, "the bat burned .", mode="teacher_forced"),
        "baselines": cm.alti(model, TEXT).normalize(),
        "probing": probed(),
        "attention_flow": cm.attention_flow(model, TEXT),
    }


def probed() -> Result:
    """Returns where the number of a masked verb can be read."""
    pairs = demo_pairs(count=400, seed=11)
    return cm.probe(
        cm.load_demo("masked-lm"),
        [pair.masked("[MASK]") for pair in pairs],
        [pair.answer.endswith("s") for pair in pairs],
    )


def main() -> None:
    """Writes a figure for each result."""
    IMAGES.mkdir(exist_ok=True)
    for name, result in results().items():
        figure = result.figure(0 if name in FIRST else None)
        figure.savefig(IMAGES / f"{name}.svg", bbox_inches="tight")


if __name__ == "__main__":
    main()
