"""The plugin manager of a run: built-ins, installed distributions and `--plugin` modules, through the same hooks."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

import pluggy

from aegpo.core import hookspecs
from aegpo.core.declared import check_declared
from aegpo.core.first_edition import told
from aegpo.core.foreign import Common, of_user
from aegpo.core.registries import Registries
from aegpo.core.registry import Registry, Spec, suggestion
from aegpo.errors import PluginError
from aegpo.plugin import built_in, given
from aegpo.plugin.given import GivenParts

GROUP = "aegpo"  # of entry points
BLOCK_VARIABLE = "AEGPO_BLOCK_PLUGINS"
BUILTIN = "aegpo"
_HOOK_PREFIX = "aegpo_"


@dataclass(frozen=True)
class _Candidate:
    """A plugin that may be loaded: an installed entry point or a module named on the command line."""

    name: str  # in the plugin manager
    module: str  # what is imported
    entry: EntryPoint | None = None

    @property
    def source(self) -> str:
        """Who ships it: the distribution, or the module as it was named."""
        return self.name if self.entry is None else _distribution(self.entry)[0]

    @property
    def title(self) -> str:
        """How messages call it."""
        if self.entry is None:
            return f"plugin module {self.name!r}"
        return f"plugin {self.name!r} of distribution {self.source!r}"

    @property
    def way_out(self) -> str:
        """What to do when it cannot be mended."""
        return f"leave it out with {BLOCK_VARIABLE}={self.source}"

    @property
    def block_names(self) -> set[str]:
        """Names under which it may be blocked."""
        return {_normalised(name) for name in (self.name, self.module, self.source)}


def plugin_manager(modules: Sequence[str] = (), parts: Sequence[type[Spec]] = ()) -> pluggy.PluginManager:
    """A fresh manager with the built-ins, every installed plugin and `modules`, less what AEGPO_BLOCK_PLUGINS names.

    Args:
        modules: importable names, or paths of `.py` files. One that an installed plugin brings already counts once.
        parts: spec classes that are registered beside them.

    Raises:
        PluginError: for a plugin that cannot be imported, has no hook or a wrong one; the message names its
            distribution and the way out.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(built_in, BUILTIN)
    candidates = [*_installed(), *(_Candidate(module, module) for module in dict.fromkeys(modules))]
    blocked = _blocked(candidates)
    for candidate in candidates:
        if not candidate.block_names & blocked:
            _register(manager, candidate)
    if parts:
        manager.register(GivenParts(parts), given.NAME)
    return manager


def load_registries(manager: pluggy.PluginManager) -> Registries:
    """The eleven registries, filled by each plugin's registration hooks; every entry knows who ships it.

    Raises:
        PluginError: for a spec class that cannot be registered, or a hook that fails.
    """
    registries = Registries.empty()
    candidates = {candidate.name: candidate for candidate in _installed() if candidate.name != BUILTIN}
    for registry in registries:
        for hook in getattr(manager.hook, f"aegpo_register_{registry.axis}").get_hookimpls():
            candidate = candidates.get(hook.plugin_name, _Candidate(hook.plugin_name, hook.plugin_name))
            _call(hook, registry, candidate)
    check_declared(registries)
    return registries


def distributions(manager: pluggy.PluginManager) -> tuple[tuple[str, str], ...]:
    """(name, version) of every installed distribution that brought a loaded plugin, in alphabetical order."""
    loaded = {name for name, plugin in manager.list_name_plugin() if plugin is not None}
    return tuple(sorted({_distribution(each.entry) for each in _installed() if each.entry and each.name in loaded}))


def _installed() -> Iterator[_Candidate]:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (_distribution(entry), entry.name)):
        named = entry.pattern.match(entry.value)
        yield _Candidate(entry.name, entry.value if named is None else entry.module, entry)


def _distribution(entry: EntryPoint) -> tuple[str, str]:  # (name, version)
    assert entry.dist is not None, "entry points found by group know their distribution"
    return entry.dist.name, entry.dist.version


def _normalised(name: str) -> str:
    return re.sub(r"[-_]+", "-", name).lower()


def _blocked(candidates: Sequence[_Candidate]) -> set[str]:
    """The names in AEGPO_BLOCK_PLUGINS, each of which must match a plugin."""
    wanted = [name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",") if name.strip()]
    known = {name: candidate for candidate in candidates for name in candidate.block_names}
    for name in wanted:
        if _normalised(name) not in known:
            hint = suggestion(name, (candidate.source for candidate in candidates))
            raise PluginError(f"{BLOCK_VARIABLE} names {name!r}, but no plugin is called that; {hint}")
    return {_normalised(name) for name in wanted}


def _register(manager: pluggy.PluginManager, candidate: _Candidate) -> None:
    plugin = _import(candidate)
    if manager.is_registered(plugin):
        return
    if manager.has_plugin(candidate.name):
        raise PluginError(
            f"{candidate.title} has the name of a plugin that is loaded already; rename its entry point, "
            f"or {candidate.way_out}"
        )
    try:
        manager.register(plugin, candidate.name)
    except pluggy.PluginValidationError as error:
        reason = " ".join(str(error).split())
        raise PluginError(
            f"{candidate.title} has a hook that does not fit: {reason}; mend it, or {candidate.way_out}"
        ) from error
    _check_hooks(manager, plugin, candidate)


def _import(candidate: _Candidate) -> object:
    common = Common.now()
    try:
        plugin = _imported(candidate)
    except BaseException as error:  # a plugin may fail in any way; the user needs to know whose failure it is
        common.restore()
        if of_user(error):
            raise
        beside = f"{candidate.module}.py"
        is_file = candidate.entry is None and isinstance(error, ModuleNotFoundError) and Path(beside).is_file()
        mend = f"give its path, --plugin {beside}" if is_file else "mend it"
        reason = told(error, "plugin")
        raise PluginError(f"{candidate.title} cannot be imported: {reason}; {mend}, or {candidate.way_out}") from error
    if (changed := common.restore()) is not None:
        raise PluginError(f"{candidate.title} {changed}; mend it, or {candidate.way_out}")
    return plugin


def _imported(candidate: _Candidate) -> object:
    if candidate.entry is not None:
        if candidate.entry.pattern.match(candidate.module) is None:
            raise ValueError(f"its entry point names {candidate.module!r}, which is no module")
        return candidate.entry.load()
    if candidate.module.endswith(".py"):
        return _import_file(Path(candidate.module))
    return importlib.import_module(candidate.module)


def _import_file(given: Path) -> ModuleType:
    path = given.resolve()
    # By its whole path: files of one stem live side by side, and a child or a later start finds the same names.
    whole = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    name = f"aegpo_plugin_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{whole}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {str(given)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic resolves annotations there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_hooks(manager: pluggy.PluginManager, plugin: object, candidate: _Candidate) -> None:
    """Every `aegpo_*` function must be a marked hook that exists, and there must be one."""
    callers = manager.get_hookcallers(plugin) or []
    known = [name for name in vars(hookspecs) if name.startswith(_HOOK_PREFIX)]
    marked = {caller.name for caller in callers}
    functions = inspect.getmembers(plugin, inspect.isfunction) if isinstance(plugin, ModuleType) else []
    written = {name for name, _ in functions if name.startswith(_HOOK_PREFIX)}
    for name in sorted(marked | written):
        if name not in known:
            raise PluginError(f"{candidate.title} defines {name!r}, which is no hook; {suggestion(name, known)}")
    for name in sorted(written - marked):
        raise PluginError(f"{candidate.title} defines {name!r} without the mark @aegpo.hookimpl, so it would never run")
    if not marked:
        raise PluginError(f"{candidate.title} implements no hook; known: {', '.join(sorted(known))}")


def _call(hook: pluggy.HookImpl, registry: Registry[Spec], candidate: _Candidate) -> None:
    if hook.hookwrapper or hook.wrapper:
        raise PluginError(
            f"{candidate.title} wraps a registration hook, which only adds; drop 'wrapper', or {candidate.way_out}"
        )
    registry.source, common = candidate.source, Common.now()
    try:
        hook.function(*(registry for _ in hook.argnames))
        changed = common.restore()
    except PluginError:
        raise
    except BaseException as error:  # as for imports
        common.restore()
        if candidate.name == BUILTIN or of_user(error):
            raise
        reason = told(error, "plugin")
        raise PluginError(
            f"{candidate.title} fails to register its {registry.axis}: {reason}; mend it, or {candidate.way_out}"
        ) from error
    finally:
        registry.source = BUILTIN
    if changed is not None:
        raise PluginError(f"{candidate.title} {changed}; mend it, or {candidate.way_out}")
