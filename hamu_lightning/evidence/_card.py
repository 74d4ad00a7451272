"""A section for a model card in the layout of the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hamu_lightning.evidence._words import COLUMNS, KINDS, METRICS, order_metrics, say, say_interval, say_size

_SHOWN = 8
# What Markdown or HTML would read as markup.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~-])")


def model_card(record: Mapping[str, Any]) -> str:
    """Return a model card's metadata and its section about unlearning, in Markdown.

    The metadata are the keys `library_name`, `tags` and `metrics` of the Hub
    (https://huggingface.co/docs/hub/model-cards); yours (`license`, `base_model`, `datasets`) are to be added.

    Args:
        record: From `make_record`.

    Example:
        >>> from hamu_lightning.evidence import make_record
        >>> print(model_card(make_record(requests={"request-17": [1, 2]}))[:54])
        ---
        library_name: lightning
        tags:
        - machine-unlearning
    """
    sections = (_front_matter(record), "## Unlearning", _verdict(record), _asked(record), _table(record), _rest(record))
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(record: Mapping[str, Any]) -> str:
    lines = ["library_name: lightning", "tags:", "- machine-unlearning", "- hamu-lightning"]
    if "TA" in (record["metrics"]["after"] or {}):
        lines += ["metrics:", "- accuracy"]
    return "\n".join(["---", *lines, "---"])


def _verdict(record: Mapping[str, Any]) -> str:
    verdict = record["verdict"]
    return f"**{KINDS[verdict['kind']]}.** {_escape(verdict['text'])}"


def _asked(record: Mapping[str, Any]) -> str:
    lines = [f"- {_escape(one['name'])}: {say_size(one)} to forget" for one in record["requests"]]
    after = record["weights"]["after"]
    return "\n".join(lines + ([f"- SHA-256 of the weights: `{after['sha256']}`"] if after else []))


def _table(record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    names = [name for name in order_metrics(metrics) if name in METRICS][:_SHOWN]
    if not names:
        return ""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " | interval of after |", "| --- " + "| ---: " * 3 + "| --- |"]
    for name in names:
        cells = [say((metrics[column] or {}).get(name), name) for column in COLUMNS]
        interval = say_interval((metrics["after"] or {}).get(name), name)
        lines.append(f"| {METRICS[name]} | {' | '.join(cells)} | {_escape(interval)} |")
    return "\n".join(lines)


def _rest(record: Mapping[str, Any]) -> str:
    limits = [f"- {_escape(limit)}" for limit in record["limits"]]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join(["### Limits", "", *limits, "", f"Measured with {json.dumps(versions)[1:-1]}."])


def _escape(text: str) -> str:
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
