"""The OpenAPI description of the seed's REST, made from the models of its bodies. Pure."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ash_hub.rest.shapes import Deprovisioned, DeprovisionedAll, Failure, SpawnBody, Spawned

__all__ = ["description"]

_REF = "#/components/schemas/{model}"
_MODELS: tuple[type[BaseModel], ...] = (SpawnBody, Spawned, Deprovisioned, DeprovisionedAll, Failure)
_WHY = {
    "400": "the request is wrong; the error says what",
    "401": "this hive wants a key",
    "403": "the caller may not do this",
    "404": "no living sandbox of the caller's has that uuid",
    "409": "the sandbox of this idempotency key was not made here",
    "410": "the sandbox was ended while it started",
    "413": "the body is too long",
    "429": "a limit is reached; Retry-After says when to come back",
    "500": "a defect of the hive",
    "501": "the backend does not have what was asked for",
    "502": "the start failed, or the backend cannot be reached",
}


def description() -> dict[str, Any]:
    """Return the description as JSON."""
    _, schemas = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_REF)
    uuid = {"name": "uuid", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[a-z0-9-]+$"}}
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "the same key is answered with the same sandbox, so that a spawn may be sent again",
        "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
    }
    body = {"required": True, "content": _content(SpawnBody)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Ash: spawn and deprovision sandboxes", "version": version("ash-mcp")},
        "paths": {
            "/spawn": {
                "post": {
                    "operationId": "spawn",
                    "parameters": [key],
                    "requestBody": body,
                    "responses": _answers(Spawned, "400", "409", "410", "413", "429", "501"),
                }
            },
            "/deprovision/{uuid}": {
                "delete": {
                    "operationId": "deprovision",
                    "parameters": [uuid],
                    "responses": _answers(Deprovisioned, "404"),
                }
            },
            "/deprovision-all": {
                "delete": {"operationId": "deprovision_all", "responses": _answers(DeprovisionedAll)},
            },
            "/healthz": {"get": {"operationId": "healthz", "responses": {"200": _text("ok")}}},
            "/readyz": {
                "get": {
                    "operationId": "readyz",
                    "responses": {"200": _text("ready, and a note if there is one"), "503": _text("why not")},
                }
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "url": {"type": "http", "scheme": "basic", "description": "the key as user: http://KEY@host"},
            },
        },
        "security": [{"key": []}, {"url": []}, {}],
    }


def _answers(good: type[BaseModel], *more: str) -> dict[str, Any]:
    failures = {status: _answer(Failure, _WHY[status]) for status in sorted({"403", "500", "502", *more})}
    unknown = {"description": _WHY["401"]}  # the gate's answer, the same for every path
    return {"200": _answer(good, "done"), "401": unknown, **failures}


def _answer(model: type[BaseModel], words: str) -> dict[str, Any]:
    return {"description": words, "content": _content(model)}


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}


def _text(words: str) -> dict[str, Any]:
    return {"description": words, "content": {"text/plain": {"schema": {"type": "string"}}}}
