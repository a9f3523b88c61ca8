"""The documentation as a site, by Sphinx: `make docs` writes it to build/docs.

Two small parts of our own: the directive `options`, which makes the tables of settings from the dataclasses, so that
they cannot go stale; and formulas as MathML, which browsers draw themselves, so that the site needs no network.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any, ClassVar

import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from marval_rl import __version__
from marval_rl.runtime.settings import conditions_of, default_of

project, release = "marval_rl", __version__
copyright = "the marval_rl maintainers, Apache-2.0"  # Sphinx's name for it
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"marval_rl {release}"
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
html_static_path, html_css_files = ["_static"], ["site.css"]
html_math_renderer = "mathml"
default_role = "code"  # `name` in docstrings
nitpicky = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
napoleon_use_ivar = True


class Options(SphinxDirective):
    """A table of the settings that dataclasses declare, one table a class.

    The arguments are their paths; the content is YAML, setting -> when to touch it. `:only:` names those to show.
    """

    required_arguments, optional_arguments, final_argument_whitespace, has_content = 1, 0, True, True
    option_spec: ClassVar = {"only": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        when = yaml.safe_load("\n".join(self.content)) or {}
        kinds = [_find(path) for path in self.arguments[0].split()]
        shown = [(kind, field) for kind in kinds for field in _own_fields(kind)]
        if "only" in self.options:
            wanted = self.options["only"].split()
            shown = [(kind, field) for kind, field in shown if field.name in wanted]
            when |= {name: when.get(name, "") for name in wanted}
        unknown = set(when) - {field.name for _, field in shown}
        if unknown:
            raise self.error(f"{', '.join(map(str, sorted(unknown)))}: no settings of {self.arguments[0]}")
        rows = ["| setting | what it does, and when to touch it |", "|---|---|"]
        needs = {name: need.description for name, need in conditions_of(kinds)}
        for _, field in shown:
            help_text = _cell(field.metadata["help"])
            if field.metadata.get("choices"):
                help_text += " One of " + ", ".join(f"`{choice}`" for choice in field.metadata["choices"]) + "."
            if field.name in needs:
                help_text += f" *Only with {_cell(needs[field.name])}.*"
            if when.get(field.name):
                help_text += f" **When:** {_cell(when[field.name])}."
            rows.append(f"| `{field.name}`{_default(field)} | {help_text} |")
        return self.parse_text_to_nodes("\n".join(rows))


def _find(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _own_fields(kind: type) -> list[dataclasses.Field]:
    """The fields that the class itself declares, or declares again."""
    return [field for field in dataclasses.fields(kind) if field.name in vars(kind).get("__annotations__", {})]


def _default(field: dataclasses.Field) -> str:
    value = default_of(field)
    if value is dataclasses.MISSING or value is None or value == []:
        return ""
    return f"<br>= `{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    """Text inside a table of Markdown."""
    return re.sub(r"([|<*])", r"\\\1", " ".join(str(text).split()))


def _inline_math(writer: Any, node: nodes.math) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block_math(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def _plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: |x| and a * b mean themselves. Before napoleon reads them."""
    for index, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
        lines[index] = "".join(parts)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _plain_docstring, priority=400)
    app.add_directive("options", Options)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
