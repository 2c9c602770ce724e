"""What becomes of the words and flags of a prediction."""

from pathlib import Path

import pytest
from PIL import Image
from support.helpers import write_image

from pipeline.errors import ConfigError, InputError
from pipeline.evaluation.drawing import save_drawing
from pipeline.launch.prediction_request import DRAWINGS, Outputs, check_pool, check_request


@pytest.mark.parametrize("folder", [".", "..", "drawn", "drawn/"])
def test_outputs_parts_lie_beside_the_output(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    output = Path(folder).resolve()
    assert Outputs(None, Path(folder)).parts == output.parent / f"{output.name}.parts"


@pytest.mark.parametrize(
    ("settings", "workers", "on_actors"),
    [([], 1, False), (["scaling.num_workers=0"], 1, False), (["scaling.num_workers=3"], 3, True)],
)
def test_check_pool_runs_on_actors_only_if_workers_were_asked_for(
    settings: list[str], workers: int, on_actors: bool
) -> None:
    pool = check_pool(settings)
    assert (pool.scaling.num_workers, pool.on_actors) == (workers, on_actors)


def test_check_pool_other_setting_raises() -> None:
    with pytest.raises(ConfigError, match=r"scaling\.min_workers"):
        check_pool(["scaling.min_workers=1"])


def test_check_request_image_files_are_shown_unless_more_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [write_image(tmp_path / name).name for name in ("a.jpg", "b.png")]
    results, folder = Path("found.json"), Path("folder")
    assert check_request(files, None, None, ".png").outputs is None
    assert check_request(files, folder, None, ".png").outputs is None
    assert check_request(files, results, None, ".png").outputs == Outputs(results, None)
    assert check_request(files, results, folder, ".jpg").outputs == Outputs(results, folder, ".jpg")
    assert check_request([*files, "scaling.num_workers=2"], None, None, ".png").outputs == Outputs(None, DRAWINGS)
    assert check_request(["."], Path("../drawn"), None, ".png").outputs == Outputs(None, Path("../drawn"))


def test_check_request_drawings_of_an_earlier_call_are_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A glob or a list can reach them; a folder is refused before it has any."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    photo = write_image(tmp_path / "photos" / "a.jpg")
    folder = Path("photos/drawn")
    check_request(["photos/**/*.jpg"], None, folder, ".jpg")
    save_drawing(Image.open(photo), folder / "a.jpg")
    with pytest.raises(InputError, match=r"drawn/a\.jpg is a drawing of an earlier call"):
        check_request(["photos/**/*.jpg"], None, folder, ".jpg")
    check_request(["photos/*.jpg"], None, folder, ".jpg")
    check_request(["photos/**/*.jpg"], Path("found.json"), None, ".jpg")


@pytest.mark.parametrize("draw", ["found.json", "found.images.json", "found.json.parts", "found.json.parts/drawn"])
def test_check_request_outputs_that_replace_each_other_raise(
    draw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of unfinished work is deleted at the end, with drawings in it."""
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="cannot both be written"):
        check_request(["a.jpg"], Path("found.json"), Path(draw), ".png")
    check_request(["a.jpg"], Path("drawn/found.json"), Path("drawn"), ".png")
