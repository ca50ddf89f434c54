"""HTML pages from the templates beside this file. Autoescape is on; a page loads no external files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rawdream_env.evaluation.reporting.numbers import Json, estimate_text, percent, rate_text

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters.update(rate=rate_text, percent=percent, estimate=estimate_text, json=json.dumps)
_TEMPLATES.filters["when"] = lambda time: str(time).replace("T", " ").replace("+00:00", " UTC")


def render(template: str, **values: Any) -> str:
    """Fill in a template of the folder ``templates``."""
    return _TEMPLATES.get_template(template).render(values)


def page(template: str, title: str, report: Json, config: Json, **values: Any) -> str:
    """A whole report: ``report`` is its JSON, with ``run`` as :func:`provenance` gives it; ``config`` its options."""
    return render(template, title=title, report=report, run=report["run"], config=config, **values)


def base64_text(content: bytes) -> str:
    """Bytes for a data URL."""
    return base64.b64encode(content).decode("ascii")
