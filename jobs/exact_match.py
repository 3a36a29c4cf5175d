"""Split an answer into the tokens that exact match compares."""

import re

TOKEN = re.compile(r"\w+|[^\w\s]")


def words(text: str | None) -> list[str] | None:
    """Lower-case words, numbers and punctuation marks of a text; spaces are ignored. None stays None."""
    return None if text is None else TOKEN.findall(text.lower())
