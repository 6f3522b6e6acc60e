"""The templates of pages, in the folder templates/."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


def load_templates() -> jinja2.Environment:
    """All templates; they escape values, and unknown names are errors."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("beam_nifti.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
