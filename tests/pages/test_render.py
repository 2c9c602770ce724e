"""A page is one file that requests nothing, shows every text as text, and whose tables a reader can sort."""

import base64
import io
import json
import math
import re
from html import unescape
from pathlib import Path

import pytest
from PIL import Image
from support.browser import dom_after, foreign_addresses

from pipeline.pages.figures import to_svg
from pipeline.pages.parts import (
    Code,
    Column,
    Details,
    Facts,
    Gallery,
    GalleryItem,
    Heading,
    ImageFile,
    Page,
    Part,
    Plot,
    Row,
    Table,
    Text,
)
from pipeline.pages.render import MISSING, clean, data_uri, render

HOSTILE = (
    "<script>document.title='run'</script>",
    '"><img src=x onerror="document.title=\'run\'">',
    "' onload='x",
    "</style></script></title><b>",
    "{{ 7 * 7 }}",
    "$\\frac{1}{0}$",
)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def every_part(text: str) -> list[Part]:
    """Each kind of part once, with `text` wherever a part has text."""
    table = Table(text, [Column(text, meaning=text), Column("AP")], [[text, 0.25], [text, None]], sorted_by=1)
    plot = Plot(to_svg(lambda figure: figure.add_subplot(xlabel=text, title=text)), text, text)
    image = ImageFile(png(), (8, 4), text, text, [Text(text), table])
    return [
        Heading(text),
        Heading(text, 3),
        Text(text),
        Text(text, warning=True),
        Code(text),
        Facts([(text, text)]),
        table,
        plot,
        Row([image, plot]),
        Details(text, [Text(text), Facts([(text, text)])]),
        Gallery(text, [(text, [text, "other"])], [GalleryItem(text, [image], [[text]]), GalleryItem(text, [], [[]])]),
    ]


@pytest.mark.parametrize("text", ["plain", *HOSTILE])
def test_render_any_text_refers_to_nothing_outside(text: str) -> None:
    html = render(Page(text, every_part(text)))
    assert foreign_addresses(html) == []
    assert html.count("<script>") == 1


def test_foreign_addresses_finds_what_a_page_must_not_have() -> None:
    for bad in ('<img src="http://a/b.png">', '<link rel="x">', "<style>@import 'a';</style>", '<a href="//cdn">'):
        assert foreign_addresses(bad)


def test_render_hostile_text_is_shown_as_it_is(tmp_path: Path) -> None:
    html = render(Page("page", [part for text in HOSTILE for part in every_part(text)]))
    script = """
        const cells = [...document.querySelectorAll("td:first-child")].map((cell) => cell.textContent);
        document.title += JSON.stringify([...new Set(cells)]);
    """
    title = re.search(r"<title>page(.*?)</title>", dom_after(html, script, tmp_path), re.DOTALL)
    assert title
    assert json.loads(unescape(title[1])) == list(HOSTILE)


def test_render_policy_refuses_a_foreign_script(tmp_path: Path) -> None:
    dom = dom_after(render(Page("page", [Text("text")])), "document.title = 'run'", tmp_path, policy=True)
    assert "<title>page</title>" in dom


def test_render_table_sorts_numbers_and_text_with_missing_values_last(tmp_path: Path) -> None:
    rows = [["b10", 0.5, 7], ["a", None, 1000], ["B9", 0.25, -3], ["c", math.nan, 20]]
    table = Table("Classes", [Column("class"), Column("AP"), Column("objects")], rows)
    script = """
        const order = () => [...document.querySelectorAll("td:first-child")].map((cell) => cell.innerText).join();
        const seen = [order()];
        for (const column of [1, 1, 2, 0, 0]) {
          document.querySelectorAll("th button")[column].click();
          seen.push(`${order()} ${document.querySelectorAll("th")[column].getAttribute("aria-sort")}`);
        }
        document.title = seen.join(";") + ";" + document.querySelectorAll("th[aria-sort]").length;
    """
    title = re.search(r"<title>(.*?)</title>", dom_after(render(Page("page", [table])), script, tmp_path))
    assert title
    assert title[1].split(";") == [
        "b10,a,B9,c",
        "B9,b10,a,c ascending",
        "b10,B9,a,c descending",
        "B9,b10,c,a ascending",
        "a,B9,b10,c ascending",
        "c,b10,B9,a descending",
        "1",
    ]


def test_render_image_opens_in_a_dialog_by_its_button(tmp_path: Path) -> None:
    image = ImageFile(png(), (8, 4), "caption", "an image of a cat")
    script = """
        document.querySelector(".enlarge").click();
        const dialog = document.querySelector("dialog");
        document.title = `${dialog.open} ${dialog.querySelector("img").alt}`;
    """
    dom = dom_after(render(Page("page", [Row([image])])), script, tmp_path)
    assert "<title>true an image of a cat</title>" in dom


def gallery() -> Gallery:
    image = ImageFile(png(), (8, 4), "caption", "a cat")
    items = [(["cat", "dog"], "a.tar"), (["dog"], "b.tar"), ([], "b.tar")]
    return Gallery(
        "images",
        [("class", ["cat", "dog", "none"]), ("file", ["a.tar", "b.tar"])],
        [GalleryItem(f"item {k}", [image], [classes, [file]]) for k, (classes, file) in enumerate(items)],
    )


def test_render_gallery_shows_the_items_that_have_all_chosen_values(tmp_path: Path) -> None:
    script = """
        const [one, two] = document.querySelectorAll("select");
        const seen = [];
        const choose = (select, value) => {
          select.value = value;
          select.dispatchEvent(new Event("change"));
          const shown = [...document.querySelectorAll("article:not([hidden]) h3")].map((title) => title.innerText);
          seen.push(`${shown.join("+")}=${document.querySelector("output").innerText}`);
        };
        choose(one, "1"); choose(two, "1"); choose(one, "2"); choose(one, ""); choose(two, "");
        document.title = seen.join(";");
    """
    title = re.search(r"<title>(.*?)</title>", dom_after(render(Page("page", [gallery()])), script, tmp_path))
    assert title
    assert title[1].split(";") == [
        "item 0+item 1=2 of 3 shown",
        "item 1=1 of 3 shown",
        "=0 of 3 shown",
        "item 1+item 2=2 of 3 shown",
        "item 0+item 1+item 2=3 of 3 shown",
    ]


def test_render_gallery_goes_by_keys_from_item_to_item_and_from_image_to_image(tmp_path: Path) -> None:
    script = """
        const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const seen = [];
        const here = () => seen.push(document.activeElement.querySelector("h3").innerText);
        document.querySelectorAll("article")[1].hidden = true;
        for (const key of ["j", "j", "j", "k"]) { press(document.activeElement, key); here(); }
        document.querySelector(".enlarge").click();
        const dialog = document.querySelector("dialog");
        press(dialog, "ArrowRight");
        dialog.close();
        dialog.dispatchEvent(new Event("close"));
        seen.push(document.activeElement.closest("article").innerText.split("\\n")[0]);
        document.title = seen.join(";");
    """
    title = re.search(r"<title>(.*?)</title>", dom_after(render(Page("page", [gallery()])), script, tmp_path))
    assert title
    assert title[1].split(";") == ["item 0", "item 2", "item 2", "item 0", "item 2"]


def test_render_numbers_keep_their_precision_and_show_digits() -> None:
    html = render(Page("page", [Table("t", [Column("a", 2), Column("b")], [[1 / 3, 1234567], [None, 2]])]))
    assert f'<td class="number" data-value="{1 / 3!r}">0.33</td>' in html
    assert '<td class="number" data-value="1234567">1,234,567</td>' in html
    assert f'<td class="number">{MISSING}</td>' in html
    table = Table("t", [Column("lr", significant=True)], [[0.00012345], [1e-7]])
    assert all(f">{text}</td>" in render(Page("page", [table])) for text in ("0.000123", "1e-07"))


def test_render_contents_lists_headings_of_level_2() -> None:
    html = render(Page("page", [Heading("One"), Heading("Part", 3), Heading("Two")]))
    links = dict(re.findall(r'<li><a href="#([^"]*)">([^<]*)</a>', html))
    assert list(links.values()) == ["One", "Two"]
    assert all(f'id="{anchor}">{text}<' in html for anchor, text in links.items())
    assert "<nav" not in render(Page("page", []))


def test_render_every_image_and_region_has_a_description() -> None:
    html = render(Page("page", every_part("what it shows")))
    for tag in re.findall(r"<img[^>]*>", html):
        assert 'alt="what it shows"' in tag or tag == '<img alt="">'  # the empty one is the dialog's
    for tag in re.findall(r'<div (?:class="table" )?role="(?:img|region)"[^>]*>', html):
        assert 'aria-label="what it shows"' in tag


def test_render_empty_table_is_a_table() -> None:
    assert "<tbody>\n</tbody>" in render(Page("page", [Table("t", [Column("a")], [])]))


def test_clean_replaces_what_cannot_be_seen_and_keeps_scripts_of_all_languages() -> None:
    assert clean("a\u202egnp\u2066\x00\ud800b") == "a�gnp���b"
    for text in ("שלום", "مرحبا", "中文 🙂", "line\n\tbreak", "é"):
        assert clean(text) == text
    html = render(Page("page", every_part("a\u202eb\x00")))
    assert not set(html) & {"\u202e", "\x00"}


def test_data_uri_contains_the_file() -> None:
    assert base64.b64decode(data_uri(png()).removeprefix("data:image/png;base64,")) == png()
    with pytest.raises(ValueError, match="PNG"):
        data_uri(b"<svg onload=x>")
