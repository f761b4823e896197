"""One wrapped server, from a request to its exit code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ash_hub.backends.local.keeper.launchers.bubblewrap import BubblewrapLauncher
from ash_hub.backends.local.keeper.launchers.plan import Plan
from ash_hub.backends.local.plans import HOME, WORKSPACE
from ash_hub.backends.local.runtime import find_runtime, loader_of
from ash_hub.wrap.host_view import cache_directory, facts_of_host
from ash_hub.wrap.packages import INSIDE, Package, installed, package_of
from ash_hub.wrap.program import hidden_arguments, shown_for, which
from ash_hub.wrap.registries import npm_registries, python_registries
from ash_hub.wrap.request import Folder, WrapRequest
from ash_hub.wrap.supervisor import Streams, control_group, supervise
from ash_hub.wrap.walls import Contents, WrapPlans

__all__ = ["run_wrapped"]

_CERTIFICATES = ("NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "PIP_CERT")
_INSTALL_PYTHON = """set -e
"$0" -m venv /opt/server
exec /opt/server/bin/python -m pip install --no-cache-dir --disable-pip-version-check --quiet -- "$@"
"""
_INSTALL_NPM = ("--no-audit", "--no-fund", "--no-update-notifier", "--no-package-lock", "--loglevel=error", "--")


def run_wrapped(request: WrapRequest, say: Callable[[str], None]) -> int:
    """Run a server behind walls, on this process's standard streams, and return its exit code.

    Args:
        say: Takes a sentence for whoever reads the log.

    Raises:
        ConfigError: It cannot be started as it was asked for, or not on this host.
    """
    directory = os.getcwd()
    cache = cache_directory()
    with ExitStack() as ends:
        start = _Start(cache, ends, say)
        contents = start.contents(request, directory)
        os.chdir(cache)  # where the launcher's names for overlays are
        return start.run(contents, request.network, Streams())


class _Start:
    """What the starts of one process have in common."""

    def __init__(self, cache: Path, ends: ExitStack, say: Callable[[str], None]) -> None:
        self._cache = cache
        self._ends = ends
        self._say = say
        self._facts = facts_of_host(cache)
        self._system = (*self._facts.directories, *self._facts.links)
        self._runtime = find_runtime()
        enforcement, self._group = ends.enter_context(control_group())
        self._plans = WrapPlans(self._facts, enforcement, self._runtime, self._loader())
        self._launcher = BubblewrapLauncher(self._facts.bubblewrap, self._facts.options)

    def contents(self, request: WrapRequest, directory: str) -> Contents:
        """Return what is inside the walls of a request; its package is installed by then."""
        package = package_of(request.words)
        usual = Contents(
            words=request.words,
            folders=request.folders,
            environment={**_certificates(os.environ), **request.environment},
            has_network=request.network != "none",
            memory_bytes=request.memory_bytes,
            directory=directory if _is_shown(directory, request.folders) else WORKSPACE,
        )
        if package is not None:
            return self._packaged(package, request, usual)
        program = which(request.words[0])
        shown = list(shown_for(program, self._system))
        self._hint(request.words[1:], (*shown, *(it.path for it in request.folders)))
        search = [os.path.dirname(path) for path in (program, *shown) if os.path.isfile(path)]
        search += [f"{path}/bin" for path in shown if os.path.isdir(f"{path}/bin")]
        return replace(
            usual,
            words=(program, *request.words[1:]),
            shown={path: path for path in shown},
            search=tuple(dict.fromkeys(path for path in search if path not in self._system)),
        )

    def _packaged(self, package: Package, request: WrapRequest, usual: Contents) -> Contents:
        is_npm = package.kind == "npm"
        manager = which("npm" if is_npm else "sh")
        shown = {path: path for path in shown_for(manager, self._system)}
        if is_npm:
            shown |= {path: path for path in shown_for(which("node"), self._system)}
        search = tuple(f"{path}/bin" for path in shown if os.path.isdir(f"{path}/bin"))
        library = {"LD_LIBRARY_PATH": ":".join(self._runtime.library_path)} if self._runtime.library_path else {}
        environment = {**_certificates(os.environ), **({} if is_npm else library)}

        def install(files: Path, exceeded: Callable[[], str | None]) -> int:
            found = npm_registries(manager) if is_npm else python_registries(os.environ)
            if is_npm:
                words = (manager, "install", "--prefix", INSIDE, *_INSTALL_NPM, *package.specs)
            else:
                words = (manager, "-c", _INSTALL_PYTHON, self._runtime.python, *package.specs)
            self._say(f"installing {' '.join(package.specs)} ({package.kind}), from {', '.join(found.network)}")
            contents = Contents(
                words=words,
                shown=shown,
                folders=(),
                environment={**environment, **found.environment},
                search=search,
                has_network=True,
            )
            plan = self._plans.plan_of(contents, {INSIDE: str(files)})
            before = os.getcwd()
            os.chdir(self._cache)
            try:
                return self._supervise(plan, found.network, Streams(None, 2, 2), exceeded)
            finally:
                os.chdir(before)

        made_of = self._runtime.python + self._runtime.host_python if not is_npm else which("node")
        files, command = self._ends.enter_context(
            installed(
                package,
                parent=self._cache / "packages",
                made_of=made_of,
                refresh=request.refresh,
                install=install,
            )
        )
        self._hint(package.arguments, [it.path for it in request.folders])
        return replace(
            usual,
            words=(f"{INSIDE}/{command}", *package.arguments),
            shown={**shown, INSIDE: files},
            environment={**environment, **usual.environment},
            search=(*search, f"{INSIDE}/{os.path.dirname(command)}"),
        )

    def run(self, contents: Contents, network: str | Sequence[str], streams: Streams) -> int:
        return self._supervise(self._plans.plan_of(contents), network, streams)

    def _supervise(
        self,
        plan: Plan,
        network: str | Sequence[str],
        streams: Streams,
        until: Callable[[], str | None] | None = None,
    ) -> int:
        return supervise(
            plan, self._launcher, self._group, network=network, streams=streams, say=self._say, until=until
        )

    def _loader(self) -> tuple[str, ...]:
        """Return what starts the Python of the first process, so that no variable of it is in the server's."""
        if not self._runtime.library_path:
            return ()
        return (loader_of(self._runtime.host_python), "--library-path", ":".join(self._runtime.library_path))

    def _hint(self, arguments: Sequence[str], shown: Sequence[str]) -> None:
        for path in hidden_arguments(arguments, (*shown, *self._system, HOME, WORKSPACE, "/tmp", "/dev", "/proc")):
            self._say(f"{path} is not shown to the server; say --folder {path} if it needs it")


def _certificates(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that name certificates which are shown."""
    found = {name: environment[name] for name in _CERTIFICATES if name in environment}
    return {name: path for name, path in found.items() if path.startswith(("/etc/ssl/certs/", "/usr/"))}


def _is_shown(directory: str, folders: Sequence[Folder]) -> bool:
    return any(directory == it.path or directory.startswith(f"{it.path}/") for it in folders)
