"""The page: one self-contained HTML file, rendered from a measurement's JSON."""

from collections.abc import Sequence
from typing import Any

import jinja2

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("weft.report"), autoescape=True, undefined=jinja2.StrictUndefined
)


def render_page(
    measurement: dict[str, Any], rows: Sequence[tuple[str, str, str, str]], *, title: str, command: str = ""
) -> str:
    """Renders the page.

    Args:
        measurement: as `Measurement.to_json` gives it.
        rows: the table's rows: what, dense, compressed, rate.
        title: the page's title.
        command: the command that repeats the run.

    Returns:
        HTML that needs nothing from elsewhere; all names are escaped.
    """
    template = _ENVIRONMENT.get_template("page.html")
    return template.render(measurement=measurement, rows=rows, title=title, command=command)
