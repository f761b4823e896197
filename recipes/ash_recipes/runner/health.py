"""The health of a recipe's server, and the part of it that each asker is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ash_recipes.runner.config import RunnerConfig
from ash_recipes.runner.problems import refusal

__all__ = ["HEALTH_PATH", "STARTING", "Health"]

HEALTH_PATH = "/_ash/health"
STARTING = refusal("starting", "the recipe's server is still starting; try again", retryable=True)


@dataclass(frozen=True, slots=True)
class Health:
    status: Literal["starting", "ready", "failed"]
    reason: str = ""
    """Why its server could not be started."""

    def answer(self, config: RunnerConfig, *, admitted: bool) -> tuple[int, dict[str, Any]]:
        """Return HTTP status and body; whoever comes without a token learns the bare status."""
        code = {"starting": 503, "ready": 200, "failed": 500}[self.status]
        shape: dict[str, Any] = {"status": self.status}
        if admitted and self.status == "failed":
            shape |= refusal("start_failed", self.reason)
        elif admitted:
            shape |= {"sandbox_id": config.sandbox_id}
        return code, shape
