"""The page of a server: choose or drop an image, see its boxes above a threshold. In the style of `pages`.

It is one file that loads nothing from elsewhere; its content security policy lets it talk to its own server alone.
"""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.evaluation.drawing import THRESHOLD
from pipeline.pages.render import read_style, script_digest

FOLDER = Path(__file__).parent


def _read(name: str) -> str:
    return (FOLDER / name).read_text("utf-8").strip()


@cache
def page() -> str:
    """The page as HTML."""
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    style, script = Markup(f"{read_style()}\n{_read('detect.css')}"), Markup(_read("detect.js"))
    return environment.get_template("detect.html").render(style=style, script=script, threshold=THRESHOLD)


PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; base-uri 'none'; "
    f"form-action 'none'; frame-ancestors 'none'; script-src 'sha256-{script_digest(_read('detect.js'))}'"
)
