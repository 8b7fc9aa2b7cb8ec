"""Tables in README.md: put there by who measured, between two lines that are comments."""

from __future__ import annotations

from pathlib import Path


def publish(readme: Path, marks: tuple[str, str], text: str) -> None:
    """Put `text` between the marks of a file. Raises ValueError if it has none."""
    before, begin, rest = readme.read_text().partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end:
        raise ValueError(f"{readme} has no lines {marks[0]} and {marks[1]}")
    readme.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")
