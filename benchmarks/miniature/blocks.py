"""Parts of a document that a command writes, between two comments; the text around them is written by hand.

```text
<!-- NAME: made by COMMAND -->
...
<!-- end of NAME -->
```
"""

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import RunError
from pipeline.files.outputs import write_text


def fill_blocks(path: Path, blocks: Mapping[str, str]) -> None:
    """Replace the blocks of a document by these.

    Args:
        path: of the document.
        blocks: content by name.

    Raises:
        RunError: the document is missing, or does not have each block exactly once.
        StorageError: it cannot be written.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); take it from version control") from None
    for name, content in blocks.items():
        text = replace_block(text, name, content, str(path))
    write_text(path, text)


def replace_block(text: str, name: str, content: str, source: str = "the text") -> str:
    """The text with another content of the block `name`. Raises RunError."""
    pattern = re.compile(rf"(<!-- {re.escape(name)}: [^\n]*-->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise RunError(f"{source} needs the block '{name}' once, from <!-- {name}: ... --> to <!-- end of {name} -->")
    return pattern.sub(lambda match: f"{match[1]}\n{content.strip()}\n\n{match[2]}", text)
