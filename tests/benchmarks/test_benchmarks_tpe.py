"""benchmarks.tpe: which trials are recorded, what a replay takes from the table, and which sampler wins where."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from benchmarks import tpe
from benchmarks.miniature.replay import RecordedTrial, compare, distance, replay
from benchmarks.miniature.search_page import sign_test
from benchmarks.miniature.training import METRICS, Outcome
from benchmarks.miniature.trials import read_table, record_trials
from jobs.cli import main
from pipeline.config import Config
from pipeline.errors import RunError
from tune.load import load_space
from tune.search.sampling import draw
from tune.space import Space

DATA = {"train": "1", "val": "2"}
LR = "optim.lr, optim.backbone_lr"


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space(tpe.SPACE)


def score(values: dict[str, Any]) -> float:
    """A smooth optimum at a low learning rate."""
    return 0.5 - 0.1 * abs(values[LR] / 2e-4 - 1) ** 0.5


@pytest.fixture(scope="module")
def table(space: Space) -> list[RecordedTrial]:
    return [RecordedTrial(values, score(values)) for values in (draw(space, number) for number in range(60))]


def outcome(ap: float) -> Outcome:
    return Outcome([{"epoch": 4, **dict.fromkeys(METRICS, ap)}], 5.0, 30.0, 1)


def test_recording_goes_on_where_it_was(space: Space, tmp_path: Path) -> None:
    path, trained = tmp_path / "trials.json", []

    def train(config: Config) -> Outcome:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(config.optim.lr)
        return outcome(0.1)

    with pytest.raises(KeyboardInterrupt):
        record_trials(space, DATA, path, 5, train, print)
    (table := read_table(path)) or pytest.fail("no table")
    assert [trial["number"] for trial in table["trials"]] == [0, 1, 2]
    record_trials(space, DATA, path, 5, lambda config: outcome(config.optim.lr), print)
    found = json.loads(path.read_text())["trials"]
    assert [trial["number"] for trial in found] == [0, 1, 2, 3, 4]
    assert [trial["AP"] for trial in found[:3]] == [0.1] * 3
    assert [trial["AP"] for trial in found[3:]] == [trial["values"][LR] for trial in found[3:]]
    assert trained == [trial["values"][LR] for trial in found[:3]]


def test_recording_fewer_trials_keeps_the_others(space: Space, tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    record_trials(space, DATA, path, 4, lambda config: outcome(0.1), lambda line: None)
    stored = json.loads(path.read_text())
    for changed in (0, 3):  # as drawn by another version
        stored["trials"][changed]["values"][LR] = 1e-3
    path.write_text(json.dumps(stored))
    record_trials(space, DATA, path, 1, lambda config: outcome(0.2), lambda line: None)
    found = {trial["number"]: trial["AP"] for trial in json.loads(path.read_text())["trials"]}
    assert found == {0: 0.2, 1: 0.1, 2: 0.1}


def test_a_table_of_other_settings_starts_anew_and_says_why(space: Space, tmp_path: Path) -> None:
    path, said = tmp_path / "trials.json", []
    record_trials(space, DATA, path, 2, lambda config: outcome(0.1), said.append)
    said.clear()
    record_trials(space, {**DATA, "val": "3"}, path, 2, lambda config: outcome(0.2), said.append)
    assert "digest of val was 2, is 3" in said[0]
    assert [trial["AP"] for trial in json.loads(path.read_text())["trials"]] == [0.2, 0.2]


def test_a_trial_that_fails_has_no_ap_and_is_not_repeated(space: Space, tmp_path: Path) -> None:
    def train(config: Config) -> Outcome:
        raise RunError("not finite")

    for _ in range(2):
        found = record_trials(space, DATA, tmp_path / "trials.json", 1, train, lambda line: None)["trials"]
        assert [(trial["AP"], trial["error"]) for trial in found] == [(0.0, "not finite")]


def test_a_damaged_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trials.json"
    for content in ("", "[]", '{"version": 9}', '{"version": 1, "settings": {}, "trials": [{}]}'):
        path.write_text(content)
        assert main(tpe.build_parser(), tpe.run, ["--table", str(path), "--data", str(tmp_path / "data")]) != 0
        assert "trials.json" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    assert main(tpe.build_parser(), tpe.run, ["--seeds", "1"]) == 2


def test_a_replay_takes_each_recorded_trial_at_most_once(space: Space, table: list[RecordedTrial]) -> None:
    for sampler in ("random", "tpe"):
        whole = replay(space, table[:20], sampler, seed=3)
        assert len(whole) == 20
        assert sorted(whole) == sorted(trial.score for trial in table[:20])  # all were taken
        assert whole == replay(space, table[:20], sampler, seed=3)


def test_distance_is_the_share_of_each_axis(space: Space, table: list[RecordedTrial]) -> None:
    values = dict(table[0].values)
    assert distance(space, values, values) == 0
    ends = [{**values, LR: bound} for bound in (1e-4, 5e-3)]
    assert distance(space, *ends) == pytest.approx(1)
    assert distance(space, values, {**values, "model.queries": 15 if values["model.queries"] != 15 else 60}) == 1
    assert distance(space, ends[0], {**values, LR: (1e-4 * 5e-3) ** 0.5}) == pytest.approx(0.5)


def test_tpe_takes_better_trials_where_one_setting_decides_and_is_equal_where_none_does(
    space: Space, table: list[RecordedTrial]
) -> None:
    found = compare(space, table, range(3))
    assert found.guided["tpe"] > found.guided["random"]
    assert found.mean["tpe"] == sorted(found.mean["tpe"])
    assert found.wins + found.losses <= 3
    flat = compare(space, [RecordedTrial(trial.values, 0.3) for trial in table], range(2))
    assert flat.mean["tpe"] == flat.mean["random"] == pytest.approx([0.3] * 20)
    assert flat.wins == flat.losses == 0


def test_sign_test_counts_all_outcomes_that_differ_as_much() -> None:
    assert sign_test(5, 5) == sign_test(0, 0) == 1
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 2**5
    assert sign_test(4, 1) == 2 * (5 + 1) / 2**5


def test_the_page_says_what_is_missing_and_shows_what_is_there(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs/images").mkdir(parents=True)
    shutil.copy(ROOT / "docs/findings.md", tmp_path / "docs")
    path = tmp_path / "trials.json"
    arguments = ["--page", "--seeds", "2", "--table", str(path), "--root", str(tmp_path)]
    assert main(tpe.build_parser(), tpe.run, arguments) == 0
    assert "not run yet: 0 trials" in (tmp_path / "docs/findings.md").read_text()
    record_trials(space, DATA, path, 24, lambda config: outcome(round(config.optim.lr, 4)), lambda line: None)
    assert main(tpe.build_parser(), tpe.run, arguments) == 0
    text = (tmp_path / "docs/findings.md").read_text()
    assert "24 recorded trials" in text
    assert "| TPE |" in text
    assert (tmp_path / "docs/images/findings_tpe.png").stat().st_size > 1000

    stored = json.loads(path.read_text())
    stored["trials"][0]["values"] = {"optim.lr": 1e-3}  # as a space of other axes drew it
    path.write_text(json.dumps(stored))
    assert main(tpe.build_parser(), tpe.run, arguments) == 0
    assert "23 recorded trials" in (tmp_path / "docs/findings.md").read_text()
    path.write_text(json.dumps(stored | {"settings": stored["settings"] | {"train.epochs": 99}}))
    assert main(tpe.build_parser(), tpe.run, arguments) == 0
    assert "0 trials are recorded" in (tmp_path / "docs/findings.md").read_text()


def test_no_search_is_replayed_on_its_own_draws(
    space: Space, table: list[RecordedTrial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random search with the seed of the table proposes exactly the recorded values, and TPE never does."""
    seeds: list[int] = []

    def note(space: Space, trials: Any, given: Any) -> Any:
        seeds.extend(given)
        return compare(space, trials, given)

    monkeypatch.setattr(tpe, "trials_of", lambda *_: table)
    monkeypatch.setattr(tpe, "compare", note)
    monkeypatch.setattr(tpe, "fill_blocks", lambda *_: None)
    monkeypatch.setattr(tpe, "search_plot", lambda *_: None)
    assert main(tpe.build_parser(), tpe.run, ["--page", "--seeds", "2", "--table", str(tmp_path / "none.json")]) == 0
    assert len(seeds) == 2
    assert space.search.seed not in seeds
