"""The backend that a hive's settings choose: the whole of it, or its documents alone."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from importlib.metadata import entry_points

import anyio
from pydantic import ValidationError

from ash_hub.backends.base import Backend, BackendFactory, DocumentsFactory, Places
from ash_hub.backends.documents import DocumentKind, Documents
from ash_hub.settings import HubSettings
from ash_hub.spawning.recipes import explain_invalid
from ash_mcp.errors import ConfigError
from ash_router.admission.api_keys import KeyDocument

__all__ = ["explained", "followed_keys", "load_backend", "open_documents", "shared_by_replicas"]


@asynccontextmanager
async def open_documents(settings: HubSettings) -> AsyncGenerator[Documents]:
    """Open the documents of a hive that need not run, as its backend keeps them, and nothing else of the backend.

    Raises:
        ConfigError: The backend cannot open them alone, or its settings are wrong.
    """
    known = {point.name: point for point in entry_points(group="ash.documents")}
    kind = settings.backend["kind"]
    if kind not in known:
        raise ConfigError(f"the {kind} backend keeps this hive's documents, and they cannot be changed from here")
    async with AsyncExitStack() as stack:
        with explained(kind):
            opens: DocumentsFactory = known[kind].load()
            documents = await stack.enter_async_context(opens(settings.backend, _places(settings, ())))
        yield documents


def load_backend(settings: HubSettings, ports: tuple[int, ...]) -> Backend:
    """Return the backend, not entered yet.

    Args:
        ports: Where on this host the hive listens.

    Raises:
        ConfigError: There is no such backend, or its settings are wrong.
    """
    known = {point.name: point for point in entry_points(group="ash.backends")}
    kind = settings.backend["kind"]
    if kind not in known:
        raise ConfigError(f"there is no backend {kind!r}; there are: {', '.join(sorted(known))}")
    with explained(kind):
        factory: BackendFactory = known[kind].load()
        return factory(settings.backend, _places(settings, ports))


@contextmanager
def explained(kind: str) -> Generator[None]:
    """Raise as `ConfigError` what is wrong with the settings of a backend, and that its packages are not there."""
    try:
        yield
    except ImportError as exc:
        more = f"pip install 'ash-mcp[{kind}]'"
        raise ConfigError(f"the {kind} backend needs packages that are not there ({exc}): {more}") from exc
    except ValidationError as exc:
        raise ConfigError(f"settings of the {kind} backend (ASH_HUB_BACKEND__…): {explain_invalid(exc)}") from exc


def _places(settings: HubSettings, ports: tuple[int, ...]) -> Places:
    directories = (settings.state_dir, settings.run_dir, settings.logs)
    return Places(*directories, ports, shared=shared_by_replicas(settings), keep=settings.keeps)


def shared_by_replicas(settings: HubSettings) -> str | None:
    """Return what only the replicas of one hive have in common, without the password in it."""
    if settings.redis_url is None:
        return None
    return hashlib.sha256(f"{settings.redis_url.get_secret_value()} {settings.redis_prefix}".encode()).hexdigest()[:32]


@asynccontextmanager
async def followed_keys(documents: Documents) -> AsyncGenerator[KeyDocument]:
    """Follow the API keys that a backend keeps for replicas which may have no disk in common."""
    keys = KeyDocument(await documents.read(DocumentKind.KEYS, "keys"))
    async with anyio.create_task_group() as group:
        group.start_soon(documents.follow, DocumentKind.KEYS, "keys", keys.take)
        yield keys
        group.cancel_scope.cancel()
