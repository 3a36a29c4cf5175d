"""Replace the text between two markers of a page."""

import re

from pipeline.errors import ConfigError


def between(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between the markers. Raises ConfigError unless it has exactly one pair of them."""
    if (page.count(begin), page.count(end)) != (1, 1):
        raise ConfigError(f"expected one {begin} and one {end} in the page")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
