"""The page of a server in a browser: by mouse, by keyboard, by screen reader, and with nothing from elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import foreign_addresses
from support.devtools import Tab, browser_tab
from support.helpers import write_image
from support.serving import TOKEN, listening

from pipeline.config.serving import ServingConfig
from pipeline.data.batch import Item
from pipeline.data.index import Category
from pipeline.inference.detections import ImageDetections
from pipeline.inference.predictor import NO_BOXES, NO_LABELS, Limits
from pipeline.serving.app import build_app
from pipeline.serving.guard import token_digest
from pipeline.serving.page import page

SCORES = (0.9, 0.6, 0.31, 0.1)
HOSTILE = "<img src=x onerror=document.title='run'>"
TAB, RIGHT = ("Tab", 9), ("ArrowRight", 39)


class FourObjects:
    """Finds the same four objects in every image."""

    categories = (Category(1, "cat"), Category(2, HOSTILE))

    def prepare(self, image: Any) -> Item:
        return Item(image, NO_BOXES, NO_LABELS, 0, (image.height, image.width))

    async def detect(self, item: Item, limits: Limits) -> ImageDetections:
        corners = np.array([[10 * k, 5 * k, 10 * k + 40, 5 * k + 30] for k in range(4)], np.float32)
        kept = [k for k, score in enumerate(SCORES) if score >= limits.threshold]
        names = ("cat", HOSTILE, "cat", "cat")
        scores, ids = np.array(SCORES, np.float32), np.array([1, 2, 1, 1])
        return ImageDetections(corners[kept], scores[kept], ids[kept], tuple(names[k] for k in kept), item.size)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser_tab(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    objects = FourObjects()
    with listening(build_app(objects, objects.detect, ServingConfig(), model="four")) as address:
        yield address


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return write_image(tmp_path / "photo.png", (120, 90))


SHAPES = (
    "[...document.querySelectorAll('#image, #boxes, #boxes text')].slice(0, 3)"
    ".map((each) => each.getBoundingClientRect().toJSON())"
)
STATE = "[document.querySelectorAll('#boxes g').length, document.querySelectorAll('#rows tr').length]"
STATUS = "document.getElementById('status').textContent"
FOCUS = "document.activeElement.id || document.activeElement.textContent"


def send(tab: Tab, photo: Path) -> None:
    tab.choose_file("#file", photo)
    tab.wait(f"/score/.test({STATUS}) && document.getElementById('image').clientHeight > 0")


def test_page_loads_nothing_from_elsewhere() -> None:
    assert [found for found in foreign_addresses(page()) if found not in ("fetch", "<link>", "data:,")] == []
    assert page().count("<script>") == 1


def test_page_shows_boxes_and_rows_of_a_chosen_image(tab: Tab, address: str, photo: Path) -> None:
    tab.open(address)
    send(tab, photo)
    assert tab.evaluate(STATUS) == "3 objects with a score of at least 0.30"
    assert tab.evaluate(STATE) == [3, 3]
    box = "(({x, y, width, height}) => [x, y, width, height].map((v) => v.baseVal.value))"
    assert tab.evaluate(f"{box}(document.querySelectorAll('#boxes .edge')[2])") == [0, 0, 40, 30]  # the best is on top
    assert tab.evaluate("document.getElementById('boxes').getAttribute('viewBox')") == "0 0 120 90"
    cells = "[...document.querySelectorAll('#rows tr')[1].cells].map((cell) => cell.textContent)"
    assert tab.evaluate(cells) == [HOSTILE, "0.60", "10", "5", "40", "30"]
    assert tab.evaluate("document.title") == "Object detection"  # the name was shown, not run
    image, boxes, _ = tab.evaluate(SHAPES)
    assert image == pytest.approx(boxes, abs=0.1)
    assert image["width"] == 120
    assert tab.errors == []


def test_page_dropped_file_is_sent(tab: Tab, address: str) -> None:
    tab.open(address)
    tab.evaluate(
        """(async () => {
          const canvas = new OffscreenCanvas(50, 40);
          canvas.getContext("2d");
          const file = new File([await canvas.convertToBlob({type: "image/jpeg"})], "dropped.jpg");
          const data = new DataTransfer();
          data.items.add(file);
          document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        })()"""
    )
    tab.wait(f"/score/.test({STATUS})")
    assert tab.evaluate("document.getElementById('boxes').getAttribute('viewBox')") == "0 0 50 40"
    tab.evaluate(
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer(), bubbles: true}))"
    )
    assert tab.errors == []  # a drop of text instead of a file


def test_page_works_by_keyboard_and_slider_sends_nothing(tab: Tab, address: str, photo: Path) -> None:
    tab.open(address)
    send(tab, photo)
    tab.evaluate(
        "window.sent = 0; const real = fetch; window.fetch = (...all) => { window.sent += 1; return real(...all); }"
    )
    seen = []
    for _ in range(5):
        tab.press(*TAB)
        seen.append(tab.evaluate(FOCUS))
    assert seen[:3] == ["Skip to the content", "file", "threshold"]
    assert seen[4] == "cat"  # the button of the first object, after the region that scrolls
    tab.evaluate("document.getElementById('threshold').focus()")
    tab.press(*RIGHT)
    tab.press(*RIGHT)
    assert tab.evaluate(STATUS) == "2 objects with a score of at least 0.32"
    assert tab.evaluate(STATE) == [2, 2]
    assert tab.evaluate("window.sent") == 0
    tab.evaluate("document.querySelector('#rows button').focus()")
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    pressed = "[...document.querySelectorAll('#rows button')].map((each) => each.ariaPressed)"
    assert tab.evaluate(pressed) == ["true", "false"]
    assert tab.evaluate("[...document.querySelectorAll('#boxes g')].map((g) => g.className.baseVal)") == [
        "other",
        "marked",
    ]
    assert tab.evaluate(FOCUS) == "cat"  # the focus stays


def test_page_tells_a_screen_reader_what_there_is(tab: Tab, address: str, photo: Path) -> None:
    tab.open(address)
    send(tab, photo)
    found = tab.named_roles()
    assert {
        ("main", ""),
        ("heading", "Object detection"),
        ("button", "Choose a JPEG or PNG image, or drop one on this page"),
        ("slider", "Lowest score shown"),
        ("region", "Objects in the image"),
        ("image", "The image that was sent"),
        ("columnheader", "Score"),
        ("button", "cat"),
    } <= {(role, name.partition(":")[0]) for role, name in found}, found
    live = "[...document.querySelectorAll('[role=status], [role=alert]')].map((each) => each.id)"
    assert tab.evaluate(live) == ["status", "fault"]


def test_page_refusal_is_an_alert_in_words(tab: Tab, address: str, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    tab.open(address)
    tab.choose_file("#file", tmp_path / "text.jpg")
    tab.wait("document.getElementById('fault').textContent !== ''")
    assert tab.evaluate("document.getElementById('fault').textContent").startswith("The image is neither JPEG nor PNG")
    assert tab.evaluate("document.getElementById('result').hidden")


def test_page_asks_for_a_token_and_sends_the_image_again(tab: Tab, photo: Path) -> None:
    objects = FourObjects()
    app = build_app(objects, objects.detect, ServingConfig(), model="four", token_sha256=token_digest(TOKEN))
    with listening(app) as address:
        tab.open(address)
        tab.choose_file("#file", photo)
        tab.wait(f"{FOCUS} === 'token'")
        tab.evaluate(f"document.activeElement.value = '{TOKEN}'; document.querySelector('#login button').click()")
        tab.wait(f"/score/.test({STATUS})")
        assert tab.evaluate(
            "[document.getElementById('login').hidden, document.getElementById('fault').textContent]"
        ) == [
            True,
            "",
        ]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_its_width(tab: Tab, address: str, tmp_path: Path, width: int, dark: bool) -> None:
    tab.open(address, width, dark)
    send(tab, write_image(tmp_path / "wide.png", (900, 300)))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    image, boxes, _ = tab.evaluate(SHAPES)
    assert image == pytest.approx(boxes, abs=0.1)
    assert image["width"] == pytest.approx(3 * image["height"], rel=0.01)
    tab.wait("document.querySelector('#boxes text').getBoundingClientRect().height > 10")  # at any size of the image
