"""Lists that are read off the code when the pages are built, so that they cannot fall behind it."""

import inspect
from collections.abc import Iterable

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from pytest_circuitfreeze import checks, fixtures
from pytest_circuitfreeze.settings import OPTIONS


class Listed(SphinxDirective):
    """A list of names, each with what it is."""

    def entries(self) -> Iterable[tuple[str, str]]:
        """Names, and text in reStructuredText."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Lays the list out."""
        return self.parse_text_to_nodes("\n\n".join(f"`{name}`\n   {text}" for name, text in self.entries()))


class Options(Listed):
    """Every option of the plugin."""

    def entries(self) -> Iterable[tuple[str, str]]:
        for option in OPTIONS:
            default = f"; default: `{option.default}`" if option.default else ""
            yield f"{option.flag} {option.metavar or ''}".strip(), option.help + default


class Claims(Listed):
    """The function of every claim, and what it says."""

    def entries(self) -> Iterable[tuple[str, str]]:
        for name, sentence in checks.claims().items():
            yield f"check_{name}", sentence


class Fixtures(Listed):
    """Every fixture of the plugin, by its docstring."""

    def entries(self) -> Iterable[tuple[str, str]]:
        for name, found in vars(fixtures).items():
            if type(found).__name__ == "FixtureFunctionDefinition":
                yield name, " ".join((inspect.getdoc(found) or "").split())


def setup(app: Sphinx) -> ExtensionMetadata:
    """Adds the directives."""
    app.add_directive("all-options", Options)
    app.add_directive("all-claims", Claims)
    app.add_directive("all-fixtures", Fixtures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
