"""What OpenAI's requests can ask of an answer beyond its length, sampling and stops -> `AnswerOptions`.

    class ChatRequest(OptionFields): ...
    ChatRequest.model_validate(body).options()

It owns the shapes of functions, formats, penalties and log-probabilities in a request. Whether a model can do what is
asked, the engine says. It knows no HTTP.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from lorikeet.messages import HALF_CHARACTERS, AnswerOptions, ToolCall, has_half_characters

MAX_TOOLS = 128
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_NESTING = 128
"""Of JSON within a request: what is deeper could not be walked."""


def _check_nesting(value: Any) -> Any:
    """Return the JSON value. Raises ValueError if it is nested too deeply."""
    layer, depth = [value], 0
    while layer := [item for part in layer for item in _inner(part)]:
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError(f"is nested too deeply; at most {MAX_NESTING} levels are taken")
    return value


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _check_json(text: str) -> str:
    """Return the text. Raises ValueError if it is no JSON."""
    try:
        _check_nesting(json.loads(text))
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"must be the text of a JSON object: {error}") from error
    return text


def _check_choice(choice: Any) -> Any:
    """Return a `tool_choice` of a known form. Raises ValueError for another one."""
    if choice not in (None, "none", "auto", "required"):
        function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}')
    return choice


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
JsonObject = Annotated[dict[str, Any], AfterValidator(_check_nesting)]


class Strict(BaseModel):
    """What requests are made of: nothing is converted, unknown fields pass."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Function(Strict):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    """JSON schema of its arguments; without one it takes none."""
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: Function

    def fields(self) -> dict[str, Any]:
        """Return it as engines take it."""
        function = {name: value for name, value in self.function.model_dump().items() if value is not None}
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}} | function}


class FunctionName(Strict):
    """The name of a function."""

    name: Name


class NamedTool(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Strict):
    """A function that was called."""

    name: Name
    arguments: Annotated[str, AfterValidator(_check_json)]


class CalledTool(Strict):
    """A call in an earlier turn of the assistant."""

    id: str = Field(min_length=1, max_length=200)
    type: Literal["function"] = "function"
    function: CalledFunction

    def call(self, index: int) -> ToolCall:
        """Return it as the assistant takes it."""
        return ToolCall(index, self.id, self.function.name, self.function.arguments)


class NamedSchema(Strict):
    """A JSON schema that the answer is held to."""

    name: Name
    description: str | None = None
    definition: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """Text, any JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = Field(None, validate_default=True)

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with the type "json_schema", and that type with it')
        return self

    def fields(self) -> dict[str, Any] | None:
        """Return it as engines take it; None for text."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return {"type": self.type}
        given = {"name": self.json_schema.name, "schema": self.json_schema.definition, "strict": True}
        return {"type": self.type, "json_schema": {name: value for name, value in given.items() if value is not None}}


class Body(Strict):
    """A request as a whole."""

    @model_validator(mode="before")
    @classmethod
    def _is_whole_text(cls, body: Any) -> Any:
        if isinstance(body, dict) and has_half_characters(body):
            raise ValueError(HALF_CHARACTERS)
        return body


class OptionFields(Body):
    """The fields of a request that become `AnswerOptions`."""

    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^\d{1,7}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    """Token id -> what is added to its logit."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedTool | None, BeforeValidator(_check_choice)] = (
        None
    )
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> OptionFields:
        """Check what one field says of another."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: asks for a call, but no tools are given")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no function {self.tool_choice.function.name!r} in tools")
        return self

    def options(self) -> AnswerOptions:
        """Return what is asked of the answer.

        A named function is offered alone and required: that says the same, and llama-server reads no names.
        """
        tools, choice, parallel = self.tools or [], self.tool_choice, self.parallel_tool_calls
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
            choice, parallel = "required", False
        return AnswerOptions(
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias or None,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            response_format=self.response_format.fields() if self.response_format else None,
            tools=tuple(tool.fields() for tool in tools),
            tool_choice=choice if tools else None,
            parallel_tool_calls=parallel if tools else None,
        )
