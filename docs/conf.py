"""How Sphinx builds these pages: `tox -e docs`. Nothing is fetched, by the build or by what it builds."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from pytest_circuitfreeze import __version__

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "pytest-circuitfreeze"
author = "pytest-circuitfreeze contributors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code", "mathml"]
exclude_patterns = ["extensions"]

# Pages are Markdown with formulas, as GitHub shows them; docstrings have code in single backticks.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"
smartquotes_action = "D"  # dashes alone, which field lists are written with

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
maximum_signature_line_length = 100
add_module_names = False

# What other projects document is named and not linked, since looking it up takes a network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|hypothesis|st|transformers|pytest|_pytest|collections|contextlib|pathlib|os)\..+"),
    ("py:.*", "Tensor|ProcessGroup|PreTrainedModel|PathLike|Callable|AbstractContextManager|Freeze"),
]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["pages.css"]
pygments_dark_style = "monokai"
html_math_renderer = "mathml"
html_title = f"{project} {version}"
html_copy_source = False
html_show_sphinx = False


def _by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.reference | None:
    """Finds what an annotation names without its module, where that is imported for annotations alone."""
    if node["refdomain"] != "py" or node.get("refspecific"):
        return None
    node["refspecific"] = True
    found: nodes.reference | None = env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, contnode
    )
    return found


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", _by_last_name)
