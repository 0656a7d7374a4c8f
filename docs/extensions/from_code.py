"""Tables that are read off the code when the pages are built, so that they cannot fall behind it."""

import inspect
import itertools
from collections.abc import Iterable, Sequence

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from pytest_circuitfreeze import checks, fixtures
from pytest_circuitfreeze.settings import OPTIONS


class Table(SphinxDirective):
    """A table of reStructuredText in its cells."""

    head: Sequence[str]

    def rows(self) -> Iterable[Sequence[str]]:
        """The cells below the head."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Lays the cells out."""
        lines = [".. list-table::", "   :header-rows: 1", ""]
        for row in itertools.chain([self.head], self.rows()):
            lines += [f"   {'-' if at else '* -'} {cell}".replace("   -", "     -") for at, cell in enumerate(row)]
        return self.parse_text_to_nodes("\n".join(lines))


class OptionTable(Table):
    """Every option of the plugin, with its ini twin."""

    head = ("option", "in the ini file", "meaning")

    def rows(self) -> Iterable[Sequence[str]]:
        for option in OPTIONS:
            default = f"; default: `{option.default}`" if option.default else ""
            yield f"`{option.flag} {option.metavar or ''}`".replace(" `", "`"), f"`{option.ini}`", option.help + default


class ClaimTable(Table):
    """The function of every claim, and what it says."""

    head = ("function", "claim")

    def rows(self) -> Iterable[Sequence[str]]:
        for name, sentence in checks.claims().items():
            yield f"`check_{name}`", sentence


class FixtureTable(Table):
    """Every fixture of the plugin, by its docstring."""

    head = ("fixture", "what it is")

    def rows(self) -> Iterable[Sequence[str]]:
        for name, found in vars(fixtures).items():
            if type(found).__name__ == "FixtureFunctionDefinition":
                yield f"`{name}`", " ".join((inspect.getdoc(found) or "").split())


def setup(app: Sphinx) -> ExtensionMetadata:
    """Adds the directives."""
    app.add_directive("option-table", OptionTable)
    app.add_directive("claim-table", ClaimTable)
    app.add_directive("fixture-table", FixtureTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
