"""An alias of a registered model in this process: what `move_alias` asks of MLflow, with a clock of its own."""

from types import SimpleNamespace
from typing import Any

from pipeline.registry.aliases import CHAMPION, Move, Pace, move_alias, read_move

NAME = "mine"


class Registry:
    """The registry; `before` is called once, before request number `at`."""

    def __init__(self, champion: str | None = "1") -> None:
        self.aliases = {} if champion is None else {CHAMPION: champion}
        self.tags: dict[str, str] = {}
        self.time = 0.0
        self.requests = 0
        self.at, self.before = -1, lambda: None
        self.pace = Pace(settle=2, stale=60, sleep=self.sleep, clock=lambda: self.time)

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def _request(self) -> None:
        number, self.requests = self.requests, self.requests + 1
        if number == self.at:
            self.before()
        self.time += 0.01

    def get_registered_model(self, name: str) -> Any:
        self._request()
        return SimpleNamespace(name=name, aliases=dict(self.aliases), tags=dict(self.tags))

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self._request()
        self.aliases[alias] = version

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self._request()
        self.tags[key] = value

    def delete_registered_model_tag(self, name: str, key: str) -> None:
        self._request()
        del self.tags[key]

    def move(self, version: str, expected: str | None) -> str | None:
        client: Any = self
        return move_alias(client, NAME, CHAMPION, version, expected, self.pace)

    @property
    def newest(self) -> Move | None:
        found: Any = SimpleNamespace(tags=self.tags)
        return read_move(found, CHAMPION)
