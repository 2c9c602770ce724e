"""Configs and spaces by name, also where the working folder is not the source tree.

A file at the given path comes first. Otherwise `demo` and `jobs/configs/demo.yaml` name the preset that comes with the
package.
"""

import os
from pathlib import Path

from pipeline.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
CONFIG_HELP = "a preset by name, e.g. demo or r50_deformable (jobs/configs/ holds them), or a YAML file of your own"


def find_config(text: str, beside: Path = Path()) -> Path | str:
    """The config file that `text` names, see `find`; a URL stays as it is, such as that of a sweep's best.yaml."""
    return text if "://" in text else find(text, CONFIGS, beside)


def find(text: str, shipped: Path, beside: Path = Path()) -> Path:
    """The file at a path or, if there is none, the one of that name that comes with the package.

    Args:
        text: a path, or a name without a folder and an ending.
        shipped: the package's folder of such files, e.g. `jobs/configs`.
        beside: the folder that a relative path starts from.

    Raises:
        ConfigError: `text` is a name, and neither a file nor the package has it.
    """
    path = beside / text
    if os.path.isfile(path):  # where Path.is_file raises, the reader has the better message
        return path
    own = {file.stem: file for file in sorted(shipped.glob("*.yaml"))}
    known_as = f"{shipped.parent.name}/{shipped.name}/"
    name = text.removeprefix(known_as).removesuffix(".yaml") if text.startswith(known_as) else text
    if name in own:
        return own[name]
    if "/" in text or Path(text).suffix or not text:
        return path
    from pipeline.config.suggest import nearest  # only now: `ddetr --help` loads this module too

    raise ConfigError(f"'{text}' is neither a file nor a name in {known_as}; did you mean '{nearest(text, own)}'?")
