"""The memory's routes: `/v1/feedback`, and `/v1/conversations/{id}` to read and delete.

    add_memory_routes(app, memory, registry)      # None: every one of them says that nothing is kept

An id opens one conversation and is known to nobody but the client that was given it. There is no list over HTTP: all
who share a server's key would read each other in it. `lorikeet memory FILE` lists, for whoever may read the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from lorikeet.serve.memory import MAX_CORRECTION_CHARACTERS, Memory
from lorikeet.serve.wire_options import Body

MAX_ID_CHARACTERS = 100
MAX_COMMENT_CHARACTERS = 4000

OFF = "this server keeps no conversations: it was started without --memory"


class Feedback(Body):
    """The body of `/v1/feedback`: what is named is set, null takes it back, what is left out stays."""

    model_config = ConfigDict(extra="forbid")
    id: str = Field(min_length=1, max_length=MAX_ID_CHARACTERS)
    rating: Literal["up", "down"] | None = None
    correction: Annotated[str, Field(max_length=MAX_CORRECTION_CHARACTERS)] | None = None
    comment: Annotated[str, Field(max_length=MAX_COMMENT_CHARACTERS)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Feedback:
        if not self.changes():
            raise ValueError("rating: give a rating, a correction or a comment")
        if self.correction is not None and not self.correction.strip():
            raise ValueError("correction: is empty; give the better answer, or null to take one back")
        return self

    def changes(self) -> dict[str, str | None]:
        """Return the fields that were given."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set - {"id"})}


def add_memory_routes(app: FastAPI, memory: Memory | None, registry: CollectorRegistry) -> None:
    """Add the routes to `app`, and what was kept and lost to `registry`."""
    if memory is not None:
        registry.register(_Counts(memory))

    @app.post("/v1/feedback")
    def feedback(body: Feedback) -> dict[str, Any]:
        given = _present(memory).rate(body.id, body.changes())
        if given is None:
            raise HTTPException(404, f"id: no answer {body.id[:40]!r} is kept here")
        return {"object": "feedback", "id": body.id, **given}

    @app.get("/v1/conversations/{conversation_id}")
    def read(conversation_id: str) -> dict[str, Any]:
        conversation = _present(memory).conversation(conversation_id[:MAX_ID_CHARACTERS])
        if conversation is None:
            raise _unknown(conversation_id)
        return {"object": "conversation", **conversation}

    @app.delete("/v1/conversations/{conversation_id}")
    def delete(conversation_id: str) -> dict[str, Any]:
        if not _present(memory).forget(conversation_id[:MAX_ID_CHARACTERS]):
            raise _unknown(conversation_id)
        return {"object": "conversation.deleted", "id": conversation_id, "deleted": True}


def _present(memory: Memory | None) -> Memory:
    if memory is None:
        raise HTTPException(404, OFF)
    return memory


def _unknown(conversation_id: str) -> HTTPException:
    return HTTPException(404, f"there is no conversation {conversation_id[:40]!r} here")


class _Counts(Collector):
    """What the memory has kept and lost, read when Prometheus asks."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def collect(self) -> Iterator[Metric]:
        turns = CounterMetricFamily("lorikeet_memory_turns", "Turns that were to be kept.", labels=["result"])
        turns.add_metric(["kept"], self._memory.kept_turns)
        turns.add_metric(["failed"], self._memory.failed_turns)
        yield turns
