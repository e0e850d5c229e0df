"""Pages and cards from template files (Jinja2), beside the module that fills them in."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, **values) -> str:
    """The template's text with the values in it. In an .html file they are escaped; a value that is missing is an
    error."""
    # A page shows names and answers from files of others: a "<script>" among them must be shown, not run.
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=template.suffix == ".html",
        # Jinja2's defaults write nothing for a value that is missing, and drop the file's last line break.
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)
