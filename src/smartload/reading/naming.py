"""How things from outside are called in messages."""

from __future__ import annotations

import os

from smartload.records.text import shown


def base_name(path: str) -> str:
    """The last segment of `path`, as messages call the file."""
    return shown(os.path.basename(path.rstrip("/")) or path)


def with_article(noun: str) -> str:
    """`an int`, `a list`, `a module` ..."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
