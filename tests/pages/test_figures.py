"""Plots as SVG that takes the page's colours, and the same plots as PNG files."""

import io
import re
from xml.etree import ElementTree

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipeline.pages.figures import INK, PAPER, SERIES, shorten, to_png, to_svg


def draw(figure: Figure) -> None:
    axes = figure.add_subplot(xlabel='a $x$ <b> & "c"', ylabel="中文")
    axes.plot([0, 1], [0, 1], color=SERIES[0], label="line")
    axes.legend()


def draw_matrix(figure: Figure) -> None:
    figure.add_subplot().imshow(np.eye(3))


def test_to_svg_is_one_element_with_text_as_text_in_the_colour_of_the_page() -> None:
    svg = to_svg(draw)
    tree = ElementTree.fromstring(svg)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    assert {'a $x$ <b> & "c"', "中文", "line"} <= {element.text for element in tree.iter()}
    assert "currentColor" in svg
    assert INK not in svg
    assert "<metadata" not in svg


def test_to_svg_ids_of_two_plots_are_different_and_references_are_inside() -> None:
    one, two = to_svg(draw), to_svg(draw_matrix)
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in (one, two)]
    assert not ids[0] & ids[1]
    for svg, known in zip((one, two), ids, strict=True):
        references = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg))
        assert references
        assert {a or b for a, b in references} <= known


def test_to_png_is_black_on_white() -> None:
    with Image.open(io.BytesIO(to_png(draw))) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {(255, 255, 255), (0, 0, 0)} <= colours


def test_to_svg_shows_what_is_behind_text_in_the_colour_of_the_page() -> None:
    svg = to_svg(lambda figure: figure.text(0.5, 0.5, "text", bbox={"facecolor": PAPER}))
    assert "var(--paper)" in svg
    assert PAPER not in svg


def test_shorten_keeps_short_names_and_one_line() -> None:
    assert shorten("a\nb") == "a b"
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"
