"""What the pages share: one look, numbers and pictures inside the page, and no script in it but our own."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

PICTURE_PX = 192  # larger pictures are shrunk to it
TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, *, script: str | None = None, **values: Any) -> str:
    """One HTML page without any link to another file; every text in `values` is escaped.

    Args:
        template: a file of templates/ that extends page.html.
        script: a file of templates/, the only script that the page's content security policy lets run.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "picture": picture}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    source = "" if script is None else (TEMPLATES / script).read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")),
        script=Markup(source),
        script_policy=f"'sha256-{digest}'" if source else "'none'",
        **values,
    )


def picture(path: Path) -> str:
    """A picture file as the address of an `<img>`."""
    with Image.open(path) as image:
        return embedded(image)


def embedded(image: Image.Image) -> str:
    """A picture, which is shrunk if it is large, as the address of an `<img>`."""
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def percent(share: float) -> str:
    """`0.125` as `12.5 %`, `0.5` as `50 %`."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def number(value: float) -> float | None:
    """For JSON: five digits, which is more than anyone looks at; None where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
