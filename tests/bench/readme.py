"""Publish measured tables in a document, between two lines that are comments."""

from __future__ import annotations

from pathlib import Path


def publish(document: Path, marks: tuple[str, str], text: str) -> None:
    """Replace the text between the two marks of a document. Raise ValueError without them."""
    before, begin, rest = document.read_text().partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end:
        raise ValueError(f"{document} has no lines {marks[0]} and {marks[1]}")
    document.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")
