"""The fenced blocks of README and docs: the word after the fence, an optional name, the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    name: str
    text: str


def blocks(language: str | None = None, page: str | None = None, name: str | None = None) -> list[Block]:
    """In the pages' order; those of a language, page or name only."""
    found = [
        Block(source, language_, name_, text)
        for source in PAGES
        for language_, name_, text in re.findall(
            r"^```(\w*) ?(\w*)\n(.*?)^```$", (ROOT / source).read_text(), flags=re.S | re.M
        )
    ]
    return [
        block
        for block in found
        if language in (None, block.language) and page in (None, block.page) and name in (None, block.name)
    ]
