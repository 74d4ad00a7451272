"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.evidence import _words
from hamu_lightning.evidence._card import model_card
from hamu_lightning.evidence._record import RECORD, write_record
from hamu_lightning.files import write_whole

PAGE, CARD = "report.html", "model_card.md"


class Drawable(Protocol):
    """What can be drawn into a file, as a Figure of matplotlib."""

    @property
    def savefig(self) -> Callable[..., Any]:
        """Draws it into a file."""


def render_page(
    record: Mapping[str, Any],
    figures: Mapping[str, Drawable] | None = None,
    names: Mapping[str, Any] | None = None,
) -> str:
    """Return the report as HTML: one file without links to others, escaped, for screen, phone and print.

    Args:
        record: From `make_record`.
        figures: Pictures by title.
        names: For hashes of samples what the page calls them; or such a mapping for each request, by its name.
            Default: by the beginning of the hash.

    Raises:
        HAMUStateError: If Jinja2 is not installed.
    """
    template = _environment().get_template("report.html")
    pictures = {title: _encode(figure) for title, figure in (figures or {}).items()}
    return str(template.render(record=record, pictures=pictures, names=names or {}, words=_words, record_name=RECORD))


def write_report(
    folder: str | Path,
    record: Mapping[str, Any],
    *,
    figures: Mapping[str, Drawable] | None = None,
    names: Mapping[str, Any] | None = None,
) -> Path:
    """Write `hamu_record.json`, `report.html` and `model_card.md` into a folder.

    Args:
        folder: It is made if there is none; files of these names are replaced.
        record: From `make_record`, signed or not.
        figures: Pictures by title, for the page.
        names: As for `render_page`; the record holds none of these names.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    page = render_page(record, figures, names)
    write_record(folder / RECORD, record)
    for name, text in ((CARD, model_card(record)), (PAGE, page)):
        write_whole(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    return folder / PAGE


def _environment() -> Any:
    try:
        jinja2 = import_module("jinja2")
    except ImportError as error:
        raise HAMUStateError(
            "Expected Jinja2 for the report, but it is not installed. Run: pip install hamu_lightning[report]"
        ) from error
    loader = jinja2.PackageLoader("hamu_lightning.evidence", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["with_code"] = _with_code
    return environment


def _with_code(text: str) -> Any:
    """The text, escaped, with what stands between backticks as code."""
    markupsafe = import_module("markupsafe")
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def _encode(figure: Drawable) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
