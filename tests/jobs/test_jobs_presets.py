"""Configs and spaces by name: the order of the search, and the message for an unknown name."""

from pathlib import Path

import pytest

from jobs import train, weights
from jobs.cli import main
from jobs.presets import CONFIGS, find, find_config
from pipeline.config import load_config
from pipeline.errors import ConfigError
from tune import sweep
from tune.load import SPACES, load_space


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that is not the source tree."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["demo", "jobs/configs/demo.yaml", str(CONFIGS / "demo.yaml")])
def test_preset_is_found_from_any_folder(text: str) -> None:
    assert find_config(text) == CONFIGS / "demo.yaml"


@pytest.mark.parametrize("text", ["demo", "demo.yaml", "jobs/configs/demo.yaml"])
def test_file_in_the_working_folder_comes_first(text: str, elsewhere: Path) -> None:
    (elsewhere / text).parent.mkdir(parents=True, exist_ok=True)
    (elsewhere / text).write_text("name: mine\n")
    assert find_config(text) == Path(text)


def test_folder_of_a_preset_s_name_hides_no_preset(elsewhere: Path) -> None:
    (elsewhere / "demo").mkdir()
    assert find_config("demo") == CONFIGS / "demo.yaml"


@pytest.mark.parametrize("text", ["demo.yaml", "configs/demo.yaml", "/nowhere/demo.yaml", "jobs/configs/none.yaml", ""])
def test_path_that_is_not_there_stays_a_path(text: str) -> None:
    """Its reader says that it is missing; another file of that name is not taken in its place."""
    assert find_config(text) == Path(text)


def test_url_stays_as_it_is_and_is_read(elsewhere: Path) -> None:
    """The best.yaml of a sweep whose storage is one; its report prints the command with it."""
    (elsewhere / "best.yaml").write_text("name: best\n")
    url = f"{elsewhere.as_uri()}/best.yaml"
    assert find_config(url, elsewhere) == url
    assert load_config(find_config(url), ["train.epochs=3"]).name == "best"


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'r50_deformable'"):
        find_config("r50_defromable")
    with pytest.raises(ConfigError, match="'demo'"):
        find("dmeo", SPACES)


def test_commands_take_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train.build_parser(), train.run, ["demo", "optim.lr=fast"]) == 2
    assert str(CONFIGS / "demo.yaml") in capsys.readouterr().err
    assert main(sweep.build_parser(), sweep.run, ["demo", "--dry-run"]) == 0
    assert "optim.lr" in capsys.readouterr().out
    assert main(weights.build_parser(), weights.run, ["import", "none.pth", "r50_defromable", "run"]) == 2
    assert "'r50_deformable'" in capsys.readouterr().err


def test_space_names_a_preset_or_a_file_beside_it(elsewhere: Path) -> None:
    (elsewhere / "spaces").mkdir()
    (elsewhere / "spaces" / "mine.yaml").write_text("name: mine\nmodel: {queries: 7}\n")
    for config, queries in (("mine.yaml", 7), ("demo", 50)):
        space = elsewhere / "spaces" / "space.yaml"
        space.write_text(
            f"config: {config}\nspace:\n  optim.lr: {{loguniform: [1e-4, 1e-3]}}\nsearch: {{method: random}}\n"
        )
        assert load_space(space).base.model.queries == queries
