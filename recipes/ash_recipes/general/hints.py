"""What each tool of this recipe does to the world: the recipe's own word, by which hosts decide whether to ask.

The hive takes such hints from a recipe and never from a running server, since hosts run a `readOnlyHint` tool unasked.
"""

from __future__ import annotations

from typing import Final

__all__ = ["HINTS"]

Hints = dict[str, bool]


def _hints(
    *, reads_only: bool = False, destructive: bool = False, idempotent: bool = False, open_world: bool = False
) -> Hints:
    return {
        "readOnlyHint": reads_only,
        "destructiveHint": destructive,
        "idempotentHint": idempotent or reads_only,
        "openWorldHint": open_world,
    }


HINTS: Final[dict[str, Hints]] = {
    "terminal-controller_execute_command": _hints(destructive=True, open_world=True),
    "terminal-controller_get_command_history": _hints(reads_only=True),
    "terminal-controller_get_current_directory": _hints(reads_only=True),
    "terminal-controller_change_directory": _hints(idempotent=True),
    "terminal-controller_list_directory": _hints(reads_only=True),
    "terminal-controller_read_file": _hints(reads_only=True),
    "terminal-controller_write_file": _hints(destructive=True, idempotent=True),
    "terminal-controller_insert_file_content": _hints(destructive=True),
    "terminal-controller_delete_file_content": _hints(destructive=True),
    "terminal-controller_update_file_content": _hints(destructive=True, idempotent=True),
    "terminal-controller_start_job": _hints(destructive=True, open_world=True),
    "terminal-controller_read_job": _hints(reads_only=True),
    "terminal-controller_write_job": _hints(destructive=True),
    "terminal-controller_stop_job": _hints(destructive=True, idempotent=True),
    "terminal-controller_list_jobs": _hints(reads_only=True),
    "fetch_fetch": _hints(reads_only=True, open_world=True),
    "ddgs_search_mcp_search": _hints(reads_only=True, open_world=True),
    "ddgs_search_mcp_search_images": _hints(reads_only=True, open_world=True),
    "ddgs_search_mcp_search_videos": _hints(reads_only=True, open_world=True),
    "ddgs_search_mcp_search_news": _hints(reads_only=True, open_world=True),
}
