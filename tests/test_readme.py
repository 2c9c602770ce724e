"""The documents against the disk: the tree, the commands, settings, names, links and pages that they show exist."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from jobs.ddetr import COMMANDS
from jobs.presets import CONFIGS, find
from pipeline.config import Config, flatten
from tune.load import SPACES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
DRAWINGS = sorted((ROOT / "docs" / "images").glob("*.svg"))
DOCUMENTS = (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES)
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*DOCUMENTS, *DRAWINGS)}
PACKAGES = ("pipeline", "jobs", "tune", "benchmarks")
SHOWN = (*PACKAGES, "tests", "docs")  # whose folders are drawn, the tests' only where they mirror no package
MAX_LINES = 180
MAX_WIDTH = 128
IMAGE_BYTES = 500_000


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def folders() -> set[str]:
    """Tracked folders of SHOWN down to the second level, each with a slash at its end."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: the tracked files are not known")
    paths = [name.split("/")[:-1] for name in listing.stdout.splitlines()]
    found = {"/".join(parts[:depth]) + "/" for parts in paths for depth in (1, 2) if len(parts) >= depth}
    shown = {name for name in found if name.partition("/")[0] in SHOWN}
    mirrored = {f"tests/{name.removeprefix('pipeline/')}" for name in shown if name.count("/") == 2}
    mirrored |= {f"tests/{name}/" for name in PACKAGES}
    return shown - mirrored


def drawn() -> dict[str, str]:
    """Folder -> remark, as the README draws the tree."""
    (tree,) = (block for block in blocks("text", README) if "pipeline/" in block)
    found: dict[str, str] = {}
    top = ""
    for line in tree.splitlines():
        indent, name, remark = re.fullmatch(r"( *)(\S+/) +(\S.*)", line).groups()  # type: ignore[union-attr]
        top = top if indent else name
        path = top + name if indent else name
        assert path not in found, f"{path} is drawn twice"
        found[path] = remark
    return found


def test_the_tree_shows_the_folders_on_disk() -> None:
    assert set(drawn()) == folders()


def test_the_tree_is_sorted() -> None:
    assert list(drawn()) == sorted(drawn())


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `python -m ...` of the documents' shell blocks, up to a comment: document, module and arguments."""
    for document, text in TEXTS.items():
        for block in blocks("bash", text):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "-m" in words and words[words.index("-m") + 1].split(".")[0] in PACKAGES:
                    yield document, words[words.index("-m") + 1 :]


def test_every_command_parses() -> None:
    seen = set()
    for document, (module, *words) in commands():
        seen.add(module)
        if module == "pipeline.csrc.build":
            continue
        parser = importlib.import_module(module).build_parser()
        assert isinstance(parser, argparse.ArgumentParser)
        arguments = parser.parse_intermixed_args(words)  # exits, and so fails, at a wrong flag
        for name, shipped in (("config", CONFIGS), ("space", SPACES)):
            path = getattr(arguments, name, None)
            assert path is None or path.startswith("runs/") or find(path, shipped, ROOT).is_file(), (
                f"{document}: {path}"
            )
    assert {"jobs.shard", "jobs.train", "jobs.predict", "jobs.register", "jobs.evaluate", "tune.sweep"} <= seen


def test_every_ddetr_command_exists() -> None:
    named = {name for text in TEXTS.values() for name in re.findall(r"\bddetr ([a-z]+)\b", text)}
    assert {"train", "lint"} <= named
    assert named <= {*COMMANDS, "help"}


def test_every_setting_exists() -> None:
    known = set(flatten(Config()))
    words = [word for _, command in commands() for word in command]
    given = {word.partition("=")[0] for word in words if re.match(r"[a-z_.]+=", word)}
    assert {"data.train", "scaling.num_workers", "name"} <= given
    assert given <= known
    for document, text in TEXTS.items():
        if document not in ("CHANGELOG.md", "docs/coming_from.md"):  # settings of the past and of others
            assert unknown_settings(text) == set(), document


def unknown_settings(text: str) -> set[str]:
    """Words in the text's code spans that look like a setting, `section.key` or `section.key=value`, and are none."""
    known = set(flatten(Config()))
    sections = {key.partition(".")[0] for key in known if "." in key}
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    words = [word.rstrip(":,;") for span in re.findall(r"`([^`\n]+)`", plain) for word in span.split()]
    keys = {word.partition("=")[0] for word in words if re.fullmatch(r"[a-z]+\.[a-z_.]*[a-z_](=.*)?", word)}
    named = {key for key in keys if key.partition(".")[0] in sections and not key.endswith((".json", ".pth", ".yaml"))}
    return {key for key in named if not any(k == key or k.startswith(f"{key}.") for k in known)}


def test_the_settings_of_our_columns_exist() -> None:
    """`coming_from.md` names the settings of others in its first column, and ours in the second."""
    rows = [line.split(" | ") for line in TEXTS["docs/coming_from.md"].splitlines() if line.startswith("| ")]
    ours = "\n".join(row[-1] for row in rows)
    assert "`optim.lr`" in ours
    assert unknown_settings(ours) == set()
    assert unknown_settings("`optim.lrr=1`, `model.refine=true`") == {"optim.lrr"}


@cache
def names_of(module: Path) -> frozenset[str]:
    """Functions, classes, their methods and fields, and constants that a module defines."""
    found: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                found.add(f"{node.name}.{inner.name}")  # type: ignore[attr-defined]
            elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                found.add(f"{node.name}.{inner.target.id}")  # type: ignore[attr-defined]
        for target in node.targets if isinstance(node, ast.Assign) else ():
            found |= {target.id} if isinstance(target, ast.Name) else set()
    return frozenset(found)


def resolves(dotted: str) -> bool:
    """Whether `pipeline.a.b`, `pipeline.a.b.Name` or `pipeline.a.b.Name.method` is on disk."""
    parts = dotted.split(".")
    for depth in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:depth])
        module = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if module.is_file():
            return depth == len(parts) or ".".join(parts[depth:]) in names_of(module)
    return False


def test_every_name_of_the_library_exists() -> None:
    assert resolves("pipeline.config.root.Config.name")
    assert not resolves("pipeline.config.root.Konfig")
    assert not resolves("pipeline.konfig.root")
    packages = "|".join(PACKAGES)
    for document, text in TEXTS.items():
        if document == "CHANGELOG.md":  # it names modules of the past
            continue
        for name in re.findall(rf"(?<![\w/.-])((?:{packages})\.(?!md\b)[\w.]*\w)", text):
            assert resolves(name), f"{document}: {name}"
        for path in re.findall(rf"(?<![\w/.-])((?:{packages}|tests|docs)/[\w./-]*[\w/])", text):
            assert (ROOT / path).exists(), f"{document}: {path}"


def test_every_command_of_the_changelog_exists() -> None:
    for module in re.findall(r"\b((?:jobs|tune)\.[a-z_]+)\b", TEXTS["CHANGELOG.md"]):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for text in TEXTS.values() for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert {"demo", "test", "test-all", "op"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower().replace(" ", "-") for title in titles}


def test_local_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        text = path.read_text()
        targets = re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(r'src="(?!https?:)([^"]+)"', text)
        for target in targets:
            name, _, anchor = target.partition("#")
            page = path.parent / name if name else path
            assert page.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in slugs(page.read_text()), f"{path.name}: {target}"


def test_the_site_shows_every_page_once() -> None:
    """Without mkdocs, which only `pip install '.[docs]'` brings."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [page for entry in nav for page in entry.values()]
    assert sorted(pages) == [path.name for path in PAGES]
    for path in PAGES:  # the site has no files of the repository beside these
        outside = re.findall(r"\]\(((?!https?:)[^)#]*\.\.[^)]*)\)", path.read_text())
        assert outside == [], f"{path.name}: {outside}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    assert {f"docs/{path.name}" for path in PAGES} - {"docs/index.md"} <= set(re.findall(r"\]\((docs/[^)#]+)", README))


def first_column(text: str, heading: str) -> list[str]:
    """Of the first table below a heading, without the table's own head."""
    table = re.search(rf"^## {heading}\n.*?((?:^\|[^\n]*\n)+)", text, re.MULTILINE | re.DOTALL)
    assert table, heading
    return [row.split(" | ")[0].removeprefix("| ") for row in table[1].splitlines()[2:]]


def test_the_home_page_has_the_table_of_the_readme_in_the_order_of_the_site() -> None:
    (table,) = re.findall(r"^\| Page \|.*\n(?:\|.*\n)+", README, re.MULTILINE)
    assert table.replace("](docs/", "](") in TEXTS["docs/index.md"]
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    entries = [f"[{title}](docs/{page})" for entry in nav for title, page in entry.items() if page != "index.md"]
    assert first_column(README, "Read on") == entries


def test_the_sheet_of_the_site_is_there() -> None:
    (sheet,) = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["extra_css"]
    assert (ROOT / "docs" / sheet).is_file()


def test_lines_are_short() -> None:
    """Those of prose: a row of a table and a command cannot be divided."""
    for document, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        long = [line for line in prose.splitlines() if len(line) > MAX_WIDTH and not line.startswith(("|", "!", "<"))]
        assert long == [] or not document.endswith(".md") or document == "CHANGELOG.md", document


def test_every_image_has_a_row_that_says_how_it_is_made() -> None:
    rows = "".join(first_column(TEXTS["docs/benchmarks.md"], "Images"))
    shown = {f"images/{path.name}" for path in (ROOT / "docs" / "images").iterdir() if path.is_file()}
    assert shown <= set(re.findall(r"`([^`]+)`", rows))


def test_images_are_shown_and_small() -> None:
    images = [path for path in (ROOT / "docs" / "images").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in images) < IMAGE_BYTES
    for path in images:
        assert any(f"images/{path.name}" in text for text in TEXTS.values()), path.name


def test_the_licence_is_the_one_that_is_claimed() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
