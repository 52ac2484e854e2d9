"""What a committed notebook shows of its claims is what the committed rows say."""

import json

import pytest

from attnbook.lab.book import CHAPTERS, book_root
from attnbook.lab.claims import chapter_claims, claims_table
from attnbook.lab.results import rows_from, stored_dir


def shown_table(path) -> str:
    "The last table of a notebook that has the columns of `claims_table`; empty if there is none."
    found = ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            text = "".join(output.get("data", {}).get("text/markdown", ""))
            if text.startswith("| claim | paper | where | measured here |"):
                found = text
    return found


@pytest.mark.parametrize("chapter", sorted(c.name for c in CHAPTERS.values() if c.paper))
def test_claims_of_the_notebook_are_those_of_the_rows(chapter):
    "Refresh the outputs of the cells that read rows when rows are added."
    with rows_from(stored_dir()):
        now = str(claims_table(chapter_claims(chapter)))
    before = shown_table(book_root() / CHAPTERS[chapter].notebook).splitlines()
    assert before, "the notebook shows no table of claims"
    assert before == now.splitlines()
