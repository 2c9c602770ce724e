"""The files of an analysis in a folder: `index.html`, `analysis.json` and the plots as PNG files.

Drawn images are in the page only. Raises OSError, and what the source of the images raises, before anything is written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.evaluation.analysis.drawings import ReadImage, draw_pair, draw_result
from pipeline.evaluation.analysis.page import build_page
from pipeline.evaluation.analysis.plots import names_of, plots_of
from pipeline.evaluation.analysis.result import NUMBERS, PAGE, Analysis, to_json
from pipeline.files.atomic import write_file
from pipeline.pages.figures import to_png
from pipeline.pages.parts import ImageFile
from pipeline.pages.render import render


def write_analysis(
    folder: Path, analysis: Analysis, title: str, about: Sequence[tuple[str, str]], read: ReadImage | None
) -> list[Path]:
    """Write all files by rename; the folder is created. Returns their paths, the page first.

    Args:
        folder: existing files of these names are replaced.
        analysis: what to show.
        title: of the page.
        about: names and values: what was analysed.
        read: the images by id; None if there are none, then the page lists ids.
    """
    plots = plots_of(analysis)
    drawn = {} if read is None else draw_images(analysis, read)
    html = render(build_page(analysis, title, about, plots, drawn))
    folder.mkdir(parents=True, exist_ok=True)
    files = {PAGE: html.encode(), NUMBERS: to_json(analysis).encode()}
    files |= {f"{name}.png": to_png(plot.draw, plot.size) for name, plot in plots.items()}
    for name, content in files.items():
        write_file(folder / name, content)
    return [folder / name for name in files]


def draw_images(analysis: Analysis, read: ReadImage) -> Mapping[str, Sequence[ImageFile]]:
    """The images of `worst`, of `most_missed` without those, and of both lists of a comparison."""
    names = names_of(analysis)
    worst = {each.image_id for each in analysis.worst}
    missed = [each for each in analysis.most_missed if each.image_id not in worst]
    drawn = {
        "worst": [draw_result(each, read, names) for each in analysis.worst],
        "most_missed": [draw_result(each, read, names) for each in missed],
    }
    if (comparison := analysis.comparison) is not None:
        drawn["gained"] = [draw_pair(each, read, names) for each in comparison.gained]
        drawn["lost"] = [draw_pair(each, read, names) for each in comparison.lost]
    return drawn
