"""Figures for papers: vector files that are always the same, with every token as itself."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path
from typing import Any

import hand_built
import matplotlib
import matplotlib.figure
import pytest
import torch
import unchecked
from hand_built import map_of, random_map, tokens
from hostile import HOSTILE
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.text import Text
from test_render import heatmap, hostile_panels

from tl_contextmix.errors import ContextMixError, InvalidInput
from tl_contextmix.plotting import draw_figure, matplotlib_figures, matplotlib_fonts
from tl_contextmix.plotting.panels import Bars, ColoredText, Curves, Heatmap, Panel, Samples, Table

pytestmark = pytest.mark.newest
REGIONS = ("HK", "JP", "KR", "SC", "TC")
WORDS = ("<s>", " the", " keys", "</s>")


def draw(panel: Panel, **options: Any) -> Any:
    return draw_figure([panel], 0, **({"sheet": None, "fonts": ()} | options))


def draw_all(panels: list[Panel]) -> Any:
    return draw_figure(panels, None, sheet=None, fonts=())


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def meshes(figure: Any) -> list[Any]:
    return [
        axes.collections[0]
        for axes in figure.axes
        if axes.collections
        and isinstance(axes.collections[0], QuadMesh)
        and axes.get_label() != "<colorbar>"
    ]


def hostile_map() -> Heatmap:
    n = len(HOSTILE)
    return heatmap(torch.rand(2, n, n), rows=HOSTILE, columns=HOSTILE)


# What is in it


def test_a_map_has_its_numbers_tokens_and_a_colour_bar_with_the_unit():
    values = torch.linspace(0, 3, 32).reshape(2, 4, 4)
    figure = draw(heatmap(values, rows=WORDS, columns=WORDS, title="A map"))
    drawn = meshes(figure)
    assert len(drawn) == 2
    for sheet, mesh in zip(values, drawn, strict=True):
        assert torch.equal(torch.tensor(mesh.get_array().data).float().reshape(4, 4), sheet)
        assert (mesh.norm.vmin, mesh.norm.vmax) == (0.0, 3.0)
        assert mesh.get_cmap()(0.0)[:3] == (1.0, 1.0, 1.0), "zero is white"
    rows, columns = (
        [label.get_text() for label in labels]
        for labels in (figure.axes[0].get_yticklabels(), figure.axes[1].get_xticklabels())
    )
    assert rows == columns == ["<s>", "·the", "·keys", "</s>"]
    assert figure.axes[0].yaxis_inverted()
    assert {"A map", "layer 0", "layer 1", "norm"} <= set(texts(figure))
    assert figure.axes[-1].get_label() == "<colorbar>"


def test_signed_maps_have_their_white_in_the_middle():
    (mesh,) = meshes(draw(heatmap(torch.tensor([[[-2.0, 1.0], [0.0, 0.5]]]))))
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-2.0, 2.0)
    assert mesh.get_cmap()(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.01)


def test_what_is_no_number_infinite_or_masked_has_a_colour_of_its_own():
    values = torch.tensor([[[1.0, math.nan], [math.inf, -math.inf]]])
    (mesh,) = meshes(draw(heatmap(values)))
    colours = mesh.to_rgba(mesh.get_array()).reshape(4, 4)
    gray, orange = (208 / 255, 212 / 255, 217 / 255), (230 / 255, 159 / 255, 0)
    assert tuple(colours[1][:3]) == pytest.approx(gray)
    assert tuple(colours[2][:3]) == tuple(colours[3][:3]) == pytest.approx(orange)
    (mesh,) = meshes(draw(heatmap(torch.ones(1, 3, 3).tril(), causal=True)))
    assert mesh.get_array().mask.tolist() == [
        [False, True, True],
        [False, False, True],
        [False] * 3,
    ]


def test_charts_have_their_numbers():
    series = (("up", (1.0, 2.0)), ("down", (-1.0, -0.5)))
    figure = draw(Bars("bars", "", ("a", "b"), series, "nats"))
    assert [bar.get_height() for bar in figure.axes[0].patches] == [1.0, 2.0, -1.0, -0.5]
    assert {"bars", "nats", "a", "b", "up", "down"} <= set(texts(figure))
    ends = (((0.5, 1.5), (1.5, 2.5)), ((-2.0, 0.0), (-1.0, 0.0)))
    figure = draw(Curves("curves", "", ("a", "b"), series, "nats", ends))
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[1, 2], [-1, -0.5]]
    assert len(figure.axes[0].collections) == 2


def test_tables_and_texts_have_their_words_and_numbers():
    rows = (("<s>", 1, 2.0, None, True), ("b", -1, -1.0, 0.5, False))
    table = Table("t", "", ("name", "n", "change", "score", "yes"), rows, ("change",))
    figure = draw(table)
    assert {"<s>", "1", "2.00", "−1.00", "–", "0.500", "yes", "no"} <= set(texts(figure))
    boxes = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert len(boxes) == 2
    text = ColoredText("t", "", ("<s>", " keys"), (0.25, -0.5), "ratio")
    assert {"<s>", "·keys", "0.250", "−0.500", "t [ratio]"} <= set(texts(draw(text)))
    several = Samples("t", "", "L1.2", ("x", "y"), (("a",), ("b",)), ((1.0,), (math.inf,)), "u")
    assert {"a", "b", "1.00", "∞", "t: L1.2 [u]"} <= set(texts(draw(several)))


def test_what_no_figure_draws_is_a_table():
    class Clock(Panel):
        def table(self) -> Table:
            return Table(self.title, "", ("hour",), ((7,),))

    assert {"A clock", "hour", "7"} <= set(texts(draw(Clock("A clock", ""))))


def test_a_window_has_the_positions_of_the_input():
    places = {"row_positions": (5, 6, 7, 9), "column_positions": (5, 6, 7, 9), "causal": True}
    figure = draw(heatmap(torch.ones(1, 4, 4).tril(), rows=WORDS, columns=WORDS, **places))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["<s> (5)", "·the (6)", "·keys (7)", "</s> (9)"]


# Hostile text


@pytest.mark.parametrize("kind", hostile_panels())
def test_hostile_text_is_drawn_without_a_warning_and_always_the_same(kind, tmp_path):
    # Warnings are errors here: a missing glyph or a broken formula would fail.
    panel = hostile_panels()[kind]
    first = draw(panel)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "text.usetex": True}):
        other = draw(panel)
    for suffix in ("svg", "pdf"):
        files = []
        for name, figure in (("first", first), ("other", other)):
            figure.savefig(tmp_path / f"{name}.{suffix}")
            files.append((tmp_path / f"{name}.{suffix}").read_bytes())
        assert files[0] == files[1]


def test_a_figure_is_written_twice_alike(tmp_path):
    figure = draw(heatmap(torch.rand(2, 3, 3)))
    for name in ("first.svg", "again.svg"):
        figure.savefig(tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_every_token_is_on_the_axes_as_itself():
    labels = [label.get_text() for label in draw(hostile_map()).axes[0].get_yticklabels()]
    assert len(labels) == len(HOSTILE)
    for token in ("<s>", "&lt;", "⏎", "⇥", "∅", "·", "$x$", "שלום", "\\u202eevil", "\\u200d", "😀"):
        assert token in labels
    assert "x" * 23 + "…" in labels
    assert not any(text.get_parse_math() for text in draw(hostile_map()).findobj(Text))


def test_an_installed_font_is_found_for_what_the_first_one_lacks(monkeypatch, tmp_path):
    # One that comes with matplotlib, as if the system had it.
    shipped = [font for font in fontManager.ttflist if matplotlib.get_data_path() in font.fname]
    (known,) = [font for font in shipped if Path(font.fname).name == "STIXGeneral.ttf"]
    path = shutil.copy(known.fname, tmp_path)
    entry = FontEntry(fname=str(path), name=known.name, weight=400)
    monkeypatch.setattr(fontManager, "ttflist", [*shipped, entry])
    matplotlib_fonts._installed.cache_clear()
    panel = ColoredText("t \u210a", "", ("\u210a", "\ue000"), (1.0, 2.0))
    figure = draw(panel)
    matplotlib_fonts._installed.cache_clear()
    assert {"t \u210a", "\u210a", "\\ue000"} <= set(texts(figure))
    assert figure.families == ["DejaVu Sans", known.name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("漢字", ["Noto Sans CJK SC"]),
        ("漢字かな", ["Noto Sans CJK JP"]),
        ("漢字한", ["Noto Sans CJK KR"]),
        ("漢🦜", ["Noto Sans CJK SC", "Symbola"]),
        ("a\ue000", []),
    ],
)
def test_of_several_fonts_the_one_that_suits_is_taken(monkeypatch, text, expected):
    east = frozenset(map(ord, "漢字かな한"))
    fonts = {f"Noto {kind} CJK {end}": east for kind in ("Serif", "Sans") for end in REGIONS}
    fonts |= {"Symbola": frozenset({ord("🦜")}), "Ink": frozenset(map(ord, "漢a\ue000"))}
    monkeypatch.setattr(matplotlib_fonts, "_installed", lambda: fonts)
    monkeypatch.setattr(matplotlib_fonts, "_characters", lambda name: frozenset({ord("a")}))
    assert matplotlib_fonts.Lettering((), [text]).families[1:] == expected


def test_characters_that_no_font_has_are_written_out(monkeypatch):
    monkeypatch.setattr(matplotlib_fonts, "_installed", dict)
    panel = ColoredText("t", "", ("\u4f60", "a"), (1.0, 2.0))
    assert "\\u4f60" in texts(draw(panel))
    with pytest.raises(InvalidInput, match="cannot be drawn in this font: got 'No Such Font'"):
        draw(panel, fonts=["No Such Font"])
    # A font that comes with matplotlib and has what DejaVu Sans has not.
    assert "\\ue000" in texts(draw(ColoredText("t", "", ("\ue000",), (1.0,))))
    assert "\ue000" in texts(
        draw(ColoredText("t", "", ("\ue000",), (1.0,)), fonts=["STIXNonUnicode"])
    )


def test_vector_files_hold_vectors(tmp_path):
    panel = heatmap(torch.rand(1, 4, 4), rows=WORDS, columns=WORDS)
    draw(panel).savefig(tmp_path / "map.svg")
    svg = (tmp_path / "map.svg").read_text()
    assert svg.count("<image") == 1, "the colour bar is a picture, the map is not"
    assert not re.search(r"<dc:date>", svg)
    draw(panel).savefig(tmp_path / "map.pdf")
    pdf = (tmp_path / "map.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/CreationDate" not in pdf
    assert draw(panel)._repr_svg_() == svg


# Choosing


def test_a_panel_and_a_sheet_can_be_chosen():
    result = random_map(2, 3, 1, 4)
    assert len(meshes(result.figure(0))) == 3
    (mesh,) = meshes(result.figure(1, sheet="layer 2"))
    expected = result.scores[1, 2, 0].numpy()
    assert (mesh.get_array().data.reshape(4, 4) == expected).all()
    assert "By hand, block output, layer 2" in texts(result.figure(-1, sheet=-1))


@pytest.mark.parametrize(
    ("panel", "sheet", "message"),
    [
        (2, None, r"no such panel: got 2; expected an integer from -2 to 1. They are: 0 By hand"),
        (True, None, "no such panel: got True"),
        (0, 3, r"no such sheet: got 3; expected a position or name of \['layer 0'"),
        (0, "layer 7", "no such sheet: got 'layer 7'"),
    ],
)
def test_what_is_not_there_cannot_be_drawn(panel, sheet, message):
    with pytest.raises(InvalidInput, match=message):
        draw_figure(random_map(2, 3, 1, 4).panels(), panel, sheet=sheet, fonts=())


def test_all_panels_of_a_result_are_drawn():
    result = random_map(2, 2, 1, 3)
    whole = result.figure()
    assert len(whole.subfigs) == 2
    for part, numbers in zip(whole.subfigs, result.scores, strict=True):
        for mesh, sheet in zip(meshes(part), numbers[:, 0], strict=True):
            assert (mesh.get_array().data.reshape(3, 3) == sheet.numpy()).all()
    narrow = result.figure(sheet=1, width=3.3)
    assert [len(meshes(part)) for part in narrow.subfigs] == [1, 1]
    assert narrow.get_figwidth() == pytest.approx(6.6)


def test_charts_stand_side_by_side_and_nothing_overlaps():
    bars = Bars("bars", "", ("a", "b"), (("x", (1.0, 2.0)),), "nats", axis="token")
    table = Table("a table", "", ("name",), (("b",),))
    figure = draw_all([bars, bars, bars, table, bars, hostile_map()])
    renderer = FigureCanvasAgg(figure).get_renderer()
    parts = [part.get_tightbbox(renderer) for part in figure.subfigs]
    lefts = [part.bbox.x0 for part in figure.subfigs]
    assert [lefts[0], *lefts[2:5]] == pytest.approx([0.0] * 4, abs=1e-6)
    assert lefts[1] > 200
    hair = 0.06  # inches
    for place, one in enumerate(parts):
        for other in parts[place + 1 :]:
            apart = one.y0 - other.y1, other.x0 - one.x1
            assert max(apart) / figure.dpi > -hair
        assert one.x1 <= figure.bbox.x1 + hair * figure.dpi
    assert {"bars", "a table", "name", "token", "nats"} <= set(texts(figure))


def test_axes_are_named():
    found = texts(random_map(1, 2, 1, 4).figure())
    assert {"target", "source"} <= set(found)
    layers = Bars("b", "", ("layer 0", "layer 2"), (("x", (1.0, 2.0)),), "nats", axis="layer")
    axes = draw(layers).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "nats")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]


def test_too_many_panels_for_a_page_are_refused(monkeypatch):
    monkeypatch.setattr(matplotlib_figures, "_LONGEST", 3)
    text = ColoredText("t", "", ("a",), (1.0,))
    assert draw_all([text] * 2)
    with pytest.raises(InvalidInput, match=r"too long: got \d+ inches for 12 panels"):
        draw_all([text] * 12)
    axes = matplotlib.figure.Figure().subplots()
    with pytest.raises(InvalidInput, match=r"holds one panel: got 2 panels.*0 By hand"):
        random_map(2, 1, 1, 4).figure(ax=axes)


def test_a_chart_has_no_sheets():
    with pytest.raises(InvalidInput, match="expected None: this is no map"):
        draw(Bars("b", "", ("a",), (("s", (1.0,)),)), sheet=0)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("tl_contextmix.plotting.matplotlib_export.find_spec", lambda name: None)
    with pytest.raises(ContextMixError, match=r'pip install "tl-contextmix\[figures\]"'):
        random_map().figure()


def test_pyplot_is_left_alone():
    # dict's own access: reading the backend by name would choose one, and import pyplot.
    code = (
        "import sys, matplotlib as m; "
        "from hand_built import random_map; before = m.rcParams.copy(); random_map().figure(); "
        "get = dict.__getitem__; print('matplotlib.pyplot' in sys.modules, "
        "[k for k in before if get(before, k) != get(m.rcParams, k)])"
    )
    assert unchecked.run("-c", code).strip() == "False []"


def test_many_tokens_and_sheets_fit():
    long = draw(heatmap(torch.rand(1, 300, 300)))
    assert len(long.axes[0].get_yticks()) <= 48
    many = draw(heatmap(torch.rand(30, 4, 4)))
    assert len(meshes(many)) == 30
    alone = dataclasses.replace(map_of(torch.rand(1, 1)), target=tokens(1, 1))
    assert len(meshes(alone.figure())) == 1


# Where it is drawn


@pytest.mark.parametrize(
    "panel",
    [
        heatmap(torch.rand(1, 4, 4), rows=WORDS, columns=WORDS),
        Bars("t", "c", ("a", "b"), (("s", (1.0, -2.0)),), "nats"),
        Curves("t", "c", ("a", "b"), (("s", (1.0, 2.0)), ("r", (0.0, 1.0))), "nats"),
        hand_built.graph().panels()[0],
    ],
    ids=lambda panel: type(panel).__name__,
)
def test_axes_of_ones_own_and_a_width(panel: Panel):
    import matplotlib.pyplot as plt

    whole, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    right.plot([0, 1], [0, 1])
    ends, ticks = right.get_xlim(), right.get_xticks().tolist()
    assert draw(panel, ax=left) is whole
    assert tuple(whole.get_size_inches()) == (8, 3)
    assert left.get_title() == panel.title or panel.title in texts(whole)
    assert (right.get_xlim(), right.get_xticks().tolist()) == (ends, ticks)
    plt.close(whole)
    wide = draw(panel, width=3.3)
    assert wide.get_figwidth() == pytest.approx(3.3)
    assert panel.title in texts(wide)


def test_what_does_not_fit_into_axes_is_refused():
    axes = matplotlib.figure.Figure().subplots()
    table = Table("t", "c", ("a",), (("x",),))
    for panel, options, words in (
        (table, {"ax": axes}, "text stands"),
        (table, {"width": 3.0}, "text stands"),
        (heatmap(torch.rand(2, 4, 4)), {"ax": axes}, "one map"),
        (heatmap(torch.rand(1, 4, 4)), {"ax": axes, "width": 3.0}, "size"),
        (heatmap(torch.rand(1, 4, 4)), {"width": -1}, "size"),
        (heatmap(torch.rand(1, 4, 4)), {"ax": 3}, "no place"),
    ):
        with pytest.raises(InvalidInput, match=words):
            draw(panel, **options)


@pytest.mark.filterwarnings("ignore:every source selected:tl_contextmix.errors.ContextMixWarning")
@pytest.mark.parametrize("side", ["decoder", "prediction"])
def test_a_sentence_without_a_column_is_drawn(side: str):
    whole = map_of(torch.rand(2, 1, 1, 2, 4), tokens(2, 2, side=side), tokens(2, 4, padding=1))
    part = whole.select(source=3)
    assert "1.3" in part.show()._repr_html_()
    for panel in part.panels():
        assert len(meshes(draw(panel))) == 1
