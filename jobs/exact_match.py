"""What has to be the same in two answers that count as the same."""

import re

TOKEN = re.compile(r"\w+|[^\w\s]")


def words(text: str | None) -> list[str] | None:
    """A text as it is compared: lower-case words, numbers and punctuation marks; spaces do not count."""
    return None if text is None else TOKEN.findall(text.lower())
