"""The text of the package's page: README.md as it reads where its files are not at hand. The rest is in setup.cfg."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup


def describe(readme: str) -> str:
    """Return the README with relative links as text, and pictures as their captions.

    Links to files of the repository lead nowhere on the page of a package, and there is no address to lead them to.
    """
    text = re.sub(r"^!\[([^\]]*)\]\((?!https?:)[^)]*\)$", r"*(Picture: \1.)*", readme, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)([^)#]*)[^)]*\)", _name_file, text)


def _name_file(link: re.Match[str]) -> str:
    text, path = link.groups()
    return text if path in text else f"{text} (`{path}`)"


if __name__ == "__main__":
    page = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(long_description=describe(page), long_description_content_type="text/markdown")
