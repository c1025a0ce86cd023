"""The OpenAPI document by schemathesis: what it allows is answered as it promises, and what it forbids is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.memory import Memory
from tests.serve.fakes import CountingEars, ScriptedEngine, ToneVoice, served, serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 40
OPERATIONS = (
    "GET /health", "GET /v1/models", "GET /v1/models/{name}", "POST /v1/chat/completions", "POST /v1/audio/transcriptions",
    "POST /v1/audio/translations", "POST /v1/audio/speech", "GET /metrics", "POST /v1/feedback",
    "GET /v1/conversations/{conversation_id}", "DELETE /v1/conversations/{conversation_id}",
)  # fmt: skip


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with Memory.open(tmp_path_factory.mktemp("memory") / "memory.db") as memory:
        assistant = Assistant(ScriptedEngine(), memory=memory)
        app = create_app(serving(assistant), ears=CountingEars(), voice=ToneVoice(), page=False)
        with served(app) as url:
            read = schemathesis.openapi.from_dict(app.openapi())
            read.config.update(base_url=url)
            yield read


def operations(schema: Any) -> dict[str, Any]:
    found = (result.ok() for result in schema.get_all_operations())
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def test_the_document_has_every_route(schema: Any) -> None:
    assert set(operations(schema)) == set(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_server_keeps_to_its_document(schema: Any, name: str, mode: GenerationMode) -> None:
    operation = operations(schema)[name]
    if mode == GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("nothing of it can be forbidden")

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    ask()
