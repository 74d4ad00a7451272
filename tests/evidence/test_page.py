"""The page: one file, escaped, without requests, well-formed."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from typing_extensions import override

from hamu_lightning.evidence import Finding, make_record, render_page
from hamu_lightning.evidence._page import _with_code
from hamu_lightning.evidence._words import KINDS
from hamu_lightning.report import plot_promises
from tests.evidence.test_record import EVIL, full_record

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Collects the tags, and fails where they do not close in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    record = full_record()
    names = {row["sample"]: EVIL for row in record["samples"][EVIL]["remembered"]}
    return render_page(record, {EVIL: plot_promises([0.1, 0.2], [0.1, 0.1], [1, 2], [1, 0])}, names)


def test_names_of_users_are_text(page: str) -> None:
    parsed = Page(page)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "<script" not in page
    # The request, the sample ids, the attack, its note, the finding and its advice, the summary.
    assert parsed.text.count(EVIL) > 10


def test_print_shows_what_is_folded_on_the_screen(page: str) -> None:
    rules = page[page.index("@media print") :]
    assert "details::details-content { display: block; height: auto; content-visibility: visible; }" in rules


def test_nothing_is_loaded(page: str) -> None:
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page
    assert "default-src 'none'" in page


def test_the_verdict_comes_first_and_all_parts_follow(page: str) -> None:
    text = Page(page).text
    parts = (
        "No trace found",
        "What was asked",
        "Forget 30 samples",
        "What was done",
        "How well it worked, and how sure that is",
        "Single samples",
        "Attacks",
        "Where data may still be",
        "Limits",
        "How to check this",
    )
    body = text[text.index("Unlearning report, 20") :]
    assert [body.find(part) for part in parts] == sorted(body.find(part) for part in parts)
    assert body.find(parts[0]) > 0
    assert "certif" not in text.lower()


def test_a_record_that_knows_nothing_says_so() -> None:
    text = Page(render_page(make_record(requests={}))).text
    for words in (
        KINDS["cannot_tell"],
        "does not say which samples",
        "Nobody has measured the model",
        "No attack was tried",
        "Nobody has looked",
        "not signed",
    ):
        assert words in text


def test_what_is_left_to_do_says_each_advice_once() -> None:
    checkpoints = [Finding(f"{i}.ckpt: weights", "yes", "Delete it.") for i in range(5)]
    more = [Finding(f"{i}.pkl", "unknown", f"Look into {i}.") for i in range(7)]
    text = Page(render_page(make_record(requests={"one": [3]}, audit=[*more, *checkpoints]))).text
    left = text[text.index("What is left to do") : text.index("What was asked")]
    assert left.count("Delete it.") == 1 and left.index("2.ckpt and 2 more: weights") < left.index("Look into 0.")
    assert "Look into 4." in left and "Look into 5." not in left and "And more, under" in left
    table = text[text.index("Where data may still be\n") :]
    assert all(f"{i}.ckpt: weights" in table for i in range(5)) and "Look into 6." in table
    assert "Forget 1 sample (request one)" in text


def test_names_in_advice_are_code_and_stay_text() -> None:
    assert str(_with_code("Call `f(<b>)` & go.")) == "Call <code>f(&lt;b&gt;)</code> &amp; go."
