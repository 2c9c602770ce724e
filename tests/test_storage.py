"""Files of a shard folder are read from disk or through fsspec; anything else is refused."""

import pickle
from pathlib import Path

import fsspec
import pytest

from pipeline.data import storage
from pipeline.data.storage import Store, is_url
from pipeline.errors import ShardError


@pytest.mark.parametrize("folder", ["pipe:cat /etc/passwd", "pipe: rm x", "-", "", "data:text", "file:x"])
def test_commands_and_odd_forms_are_refused(folder: str) -> None:
    with pytest.raises(ShardError, match="neither a folder nor a URL"):
        is_url(folder)


def test_local_and_remote_read_alike(tmp_path: Path) -> None:
    data = bytes(range(256))
    (tmp_path / "a").write_bytes(data)
    with fsspec.open("memory://store-test/a", "wb") as file:
        file.write(data)
    for folder in (str(tmp_path), f"{tmp_path}/", "memory://store-test"):
        store = pickle.loads(pickle.dumps(Store(folder)))
        assert store.exists("a")
        assert not store.exists("b")
        assert store.size("a") == 256
        assert store.read("a") == data
        assert store.read_range("a", 10, 5) == data[10:15]
        with pytest.raises(ShardError, match="ends within a sample"):
            store.read_range("a", 250, 10)
        with pytest.raises(ShardError, match="cannot read"):
            store.read_range("b", 0, 1)
        with pytest.raises(ShardError, match="cannot read"):
            store.size("b")


def test_unknown_scheme() -> None:
    with pytest.raises(ShardError, match="no reader for 'nosuch://x'"):
        Store("nosuch://x").exists("a")


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_FILES", 2)
    store = Store(str(tmp_path))
    for number in range(5):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    for _ in range(2):
        assert [store.read_range(str(number), 0, 1) for number in range(5)] == [bytes([n]) for n in range(5)]
    assert len(store._files) == 2
