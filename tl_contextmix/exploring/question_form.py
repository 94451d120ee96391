"""The page with the form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape as quoted
from pathlib import Path
from typing import Any

from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import ContextMixError
from tl_contextmix.exploring.typed_questions import (
    FIRST,
    SAID,
    SECTIONS_IN_WORDS,
    offered_methods,
    require_text_model,
)
from tl_contextmix.plotting.display_text import label, prose
from tl_contextmix.plotting.page import document, policy
from tl_contextmix.reporting.story import default_text


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


_SCRIPT = _own("explore.js")
# It asks this server alone, and shows what that answers in a frame.
_RULES = ("connect-src 'self'", "frame-src 'self'")
FORM_POLICY = policy([_SCRIPT], *_RULES, "frame-ancestors 'none'")
"""What the page may do."""


def form(model: object) -> str:
    """Returns the page for a model, or the one that says why it is refused."""
    try:
        view = require_text_model(model)
    except ContextMixError as error:
        return refused(str(error))
    body = _form(view, default_text(model))
    allowed = policy([_SCRIPT], *_RULES)
    return document(f"Explore {view.name}", body, [_SCRIPT], allowed, _own("explore.css"))


def refused(why: str) -> str:
    """Returns the page that says why there is nothing to explore."""
    body = (
        '<header><h1>This model is refused</h1></header>\n<main><p class="refused" role="alert">'
        f"{prose(why)}</p></main>"
    )
    return document("This model is refused", body, (), policy(()), _own("explore.css"))


def _form(view: ModelView, text: str) -> str:
    longest = "" if view.n_ctx is None else f", at most {view.n_ctx:,} tokens"
    said = "all" if len(view.stacks) == 2 else SAID
    return f"""<header>
<h1>Explore {label(view.name, 60)}</h1>
<dl class="facts"><div><dt>Class</dt><dd>{prose(view.host)}, TransformerLens \
{prose(view.host_version)}</dd></div><div><dt>Weights</dt><dd>\
{prose(", ".join(view.processing) or "as published")}</dd></div></dl>
</header>
<main class="explorer">
<form aria-label="Question">
<label for="text">Text{longest}</label>
<textarea id="text" rows="4" dir="auto" spellcheck="false" required>{quoted(text)}</textarea>
<div class="pair">
<div><label for="target">Target</label>
<input id="target" list="likely" dir="auto" autocomplete="off" spellcheck="false" \
placeholder="most likely" aria-describedby="spaces"></div>
<div><label for="foil">Foil</label>
<input id="foil" list="likely" dir="auto" autocomplete="off" spellcheck="false" \
placeholder="none" aria-describedby="spaces"></div>
</div>
<p class="hint" id="spaces">Why the target rather than the foil? Most tokens begin with a space: \
type it, too. After an answer the lists hold the most probable tokens.</p>
<datalist id="likely"></datalist>
<div class="actions"><button type="submit">Explain</button>
<button type="button" id="stop" disabled>Stop</button>
<a id="save" download="tl_contextmix_report.html" hidden>Save the page</a></div>
<progress id="progress" aria-label="Progress" value="0" max="1" hidden></progress>
<p id="status" role="status" aria-live="polite"></p>
<p id="explanation" class="refused" role="alert" hidden></p>
<details><summary>Position, longer answers</summary>
<div class="pair">
<div><label for="pos">Position</label>
<input id="pos" type="number" step="1" placeholder="the last, or the mask"></div>
<div><label for="generate">Tokens of “answer”</label>
<input id="generate" type="number" step="1" min="1" placeholder="{said}"></div>
</div></details>
<fieldset><legend>Show</legend>
{_boxes(_fitting(view, SECTIONS_IN_WORDS), FIRST)}
</fieldset>
<details id="methods"><summary>Single methods</summary>
<fieldset><legend>Methods, with the options that they have by default</legend>
{_boxes(_fitting(view, offered_methods()), ())}
</fieldset></details>
</form>
<iframe id="answer" title="Answer" sandbox="allow-scripts" hidden></iframe>
<p class="hint" id="waiting">The answer will be here.</p>
</main>
<noscript><p class="refused">This page needs scripts: it sends what you type to the program on \
your own machine, and nowhere else.</p></noscript>
<footer>Made by tl_contextmix. What is typed stays on this machine.</footer>"""


def _fitting(view: ModelView, names: Mapping[Any, str]) -> dict[str, str]:
    """Returns what there is to tick: layers of an encoder to decode, answers of a decoder."""
    missing: tuple[str, ...] = () if len(view.stacks) == 2 else ("encoder-layers", "decoder_lens")
    missing += () if "decoder" in view.stacks else ("answer",)
    return {name: words for name, words in names.items() if name not in missing}


def _boxes(names: Mapping[str, str], ticked: Iterable[str]) -> str:
    return "\n".join(
        f'<label class="box"><input type="checkbox" name="show" value="{quoted(name)}"'
        f"{' checked' if name in ticked else ''}><span><b>{prose(name.replace('_', ' '))}</b> "
        f"{prose(words)}</span></label>"
        for name, words in names.items()
    )
