"""The layouts that are read, and which of them a data set has. None, or more than one, is an AnnotationError."""

from pipeline.data.importing.coco import CocoLayout
from pipeline.data.importing.labelme import LabelMeLayout
from pipeline.data.importing.records import Layout
from pipeline.data.importing.tree import Tree
from pipeline.data.importing.voc import VocLayout
from pipeline.data.importing.yolo import YoloLayout
from pipeline.data.index import INDEX
from pipeline.errors import AnnotationError

LAYOUTS: tuple[Layout, ...] = (CocoLayout(), YoloLayout(), VocLayout(), LabelMeLayout())
FORMATS = tuple(layout.name for layout in LAYOUTS)  # values of --format


def recognise(tree: Tree, wanted: str | None = None) -> tuple[Layout, list[str]]:
    """The layout of a data set, and the files that show it.

    Args:
        tree: its files.
        wanted: one of FORMATS, to decide; None to find out.

    Raises:
        AnnotationError: it has files of no layout, of several ones, or none of the wanted one.
    """
    found = [(layout, files) for layout in LAYOUTS if wanted in (None, layout.name) and (files := layout.find(tree))]
    if len(found) == 1:
        return found[0]
    if found:
        seen = " and ".join(f"{layout.title} ({files[0]})" for layout, files in found)
        choice = " or ".join(layout.name for layout, _ in found)
        raise AnnotationError(f"{tree.where} has files of more than one layout: {seen}; give --format {choice}")
    known = ", ".join(layout.title for layout in LAYOUTS if wanted in (None, layout.name))
    first = ", ".join(list(tree.entries)[:3])
    hint = "; export it from the labelling tool as one of these" if wanted is None else ""
    if wanted in (None, "yolo") and tree.names(".txt"):
        hint = "; YOLO labels need a data.yaml with `names`, or a classes.txt"
    if any(name.rpartition("/")[2] == INDEX for name in tree.entries):
        hint = "; these are shards, which `python -m jobs.train` takes as data.train and data.val"
    raise AnnotationError(f"{tree.where} has no annotations of a known layout ({known}); its files: {first}, ...{hint}")
