"""Failures of plugins where nobody calls them by name: of an attribute of a spec, say, or of what it returned."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from aegpo.core.first_edition import told
from aegpo.errors import AegpoError, ContractError, UserInterrupt


@contextmanager
def blaming_plugins() -> Iterator[None]:
    """Inside, what was raised in a plugin is told with who ships it; anything else passes as it is.

    Raises:
        ContractError: if a plugin failed; its cause is the plugin's own error.
    """
    try:
        yield
    except AegpoError:
        raise
    except BaseException as error:
        found = _in_a_plugin(error)
        if found is None:
            raise
        failed, source = found
        raise ContractError(f"plugin {source!r} failed with {told(failed, 'plugin')}") from failed


def _in_a_plugin(error: BaseException) -> tuple[BaseException, str] | None:
    """The first error of a chain that was raised in a plugin, or by what it called, and who ships the plugin."""
    registry = sys.modules.get("aegpo.core.registry")  # not imported for this: where it is not, there is no plugin
    sources = {} if registry is None else registry.shippers()
    each: BaseException | None = error
    while each is not None and not isinstance(each, UserInterrupt):
        names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(each.__traceback__))
        source = next((sources[top] for name in names if (top := name.partition(".")[0]) in sources), None)
        if source is not None:
            return each, source
        each = each.__cause__ or each.__context__
    return None
