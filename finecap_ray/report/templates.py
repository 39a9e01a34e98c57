"""The pages' templates, beside this file."""

from __future__ import annotations

import jinja2


def template(name: str) -> jinja2.Template:
    """What isn't given is an error, and what is given can't be HTML."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("finecap_ray", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)
