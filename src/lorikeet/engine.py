"""The engine that answers: one protocol, llama.cpp as a supervised child process, and any OpenAI-compatible server.

    with LlamaEngine(gguf) as engine:
        for delta in engine.stream([Message("user", "Hello")]):
            print(delta.text, end="")

llama.cpp runs in a child, so a native abort cannot take page and voice along; it listens on a free loopback port
behind a random key, and both kinds of engine are reached by the same HTTP client. It knows nothing of runs or pages.
"""

from __future__ import annotations

import json
import logging
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from lorikeet.answer_schema import check_answer_schema
from lorikeet.completion import AnswerReader, error_text, read_events
from lorikeet.errors import EngineError, InputError, LorikeetError, MissingExtraError, RequestError
from lorikeet.exchange import Exchange
from lorikeet.files import sha256_file
from lorikeet.gguf_header import Header, read_header
from lorikeet.messages import AnswerOptions, Delta, Message
from lorikeet.prompt import defuse
from lorikeet.run import usable_cores

START_TIMEOUT_S = 120.0
READ_TIMEOUT_S = 600.0
RESTART_FIRST_S, RESTART_MOST_S = 0.5, 30.0
"""How long a child that ended is left alone before it is started again: doubled each time that this was in vain."""

STEADY_S = 60.0
"""A child that ran for so long was well; the next pause is the first one again."""


LATE_WAIT_S, LATE_LOOK_UP_S = 5.0, 0.25
"""How long a request waits for an engine that is being loaded, in a slot, and how often it looks up."""

_log = logging.getLogger(__name__)


class EngineDownError(EngineError):
    """The engine's process has ended; where it is supervised, it is being started again."""


class EngineBusyError(EngineError):
    """A remote engine has too much to do, or its owner has asked too often."""


class Engine(Protocol):
    """What answers a conversation."""

    name: str

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 512,
        temperature: float = 0.3,
        top_p: float = 0.95,
        seed: int | None = None,
        stop: Sequence[str] = (),
        options: AnswerOptions | None = None,
    ) -> Generator[Delta, None, None]:
        """Yield the answer in whole characters; the last delta has the finish reason and the usage.

        With a `seed` no cached prefix is used, so the same request, alone, gives the same answer. Closing the iterator
        stops the generation. Raises RequestError for what the engine refuses, EngineError if it fails.
        """
        ...

    def healthy(self) -> bool:
        """Say whether the engine would answer now."""
        ...

    def problem(self) -> str:
        """Return why it would not answer now, in words for the user; '' if it would."""
        ...

    def close(self) -> None:
        """Free what it holds; it can be called twice."""
        ...


class HttpEngine:
    """An OpenAI-compatible server, local or remote."""

    def __init__(self, url: str, *, name: str, api_key: str = "", specials: Sequence[str] = ()) -> None:
        """Talk to `url` (with or without `/v1`) and ask for the model `name`; messages cannot contain `specials`."""
        self.name = name
        self._specials = tuple(specials)
        self._is_llama_server = False
        """Whether it knows llama-server's own fields."""
        self._http = _client(url, api_key)
        self._address = public_address(url)

    @classmethod
    def connect(cls, url: str, *, api_key: str = "") -> HttpEngine:
        """Return an engine for a running server, with the first model that it lists, or the one named after a `#`.

        Raises InputError for what is no address and a model that is not listed, EngineError if the server does not answer.
        """
        address, _, name = url.partition("#")
        shown = public_address(address)
        engine = cls(address, name=name, api_key=api_key)
        try:
            listed = {str(model["id"]): model for model in engine.get("/v1/models")["data"]}
            engine.name = name or next(iter(listed))
            is_llama_server = {key: model.get("owned_by") == "llamacpp" for key, model in listed.items()}
        except (KeyError, StopIteration, TypeError, AttributeError) as error:
            raise EngineError(f"{shown} lists no model at /v1/models; is it an OpenAI-compatible server?") from error
        if engine.name not in listed:
            raise InputError(f"{shown} has no model {name}; after the # it takes one of: {', '.join(listed)[:500]}")
        engine._is_llama_server = is_llama_server[engine.name]
        return engine

    def __enter__(self) -> Self:
        """Return itself; `close` is called at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def healthy(self) -> bool:
        """Say whether the server lists its models."""
        try:
            return self._http.get("/v1/models", timeout=5.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def problem(self) -> str:
        """Return that it does not answer, or ''."""
        return "" if self.healthy() else f"the engine at {self._address} does not answer"

    def get(self, route: str) -> Any:
        """Return the JSON of a GET. Raises EngineError."""
        return self._exchange("GET", route, None)

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """Return the JSON of a POST. Raises RequestError for a 4xx, EngineError for anything else."""
        return self._exchange("POST", route, body)

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 512,
        temperature: float = 0.3,
        top_p: float = 0.95,
        seed: int | None = None,
        stop: Sequence[str] = (),
        options: AnswerOptions | None = None,
    ) -> Generator[Delta, None, None]:
        """Yield the answer; see `Engine.stream`."""
        options = options or AnswerOptions()
        self._check_request(messages, options)
        body: dict[str, Any] = {
            "model": self.name,
            "messages": self._defused([message.as_dict() for message in messages]),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if seed is not None:
            body |= {"seed": seed} | ({"cache_prompt": False} if self._is_llama_server else {})
        if stop:
            body["stop"] = list(stop)
        body |= self._defused(options.fields())
        yield from self._deltas(body, AnswerReader(top_logprobs=options.top_logprobs))

    def _check_request(self, messages: Sequence[Message], options: AnswerOptions) -> None:
        """Raise RequestError for what this engine would not do; a remote one says so itself."""

    def _defused(self, value: Any) -> Any:
        """Return a JSON value in which no text contains a special token."""
        if isinstance(value, str):
            return defuse(value, self._specials)
        if isinstance(value, dict):
            return {name: self._defused(item) for name, item in value.items()}
        return [self._defused(item) for item in value] if isinstance(value, list | tuple) else value

    def _deltas(self, body: dict[str, Any], reader: AnswerReader) -> Generator[Delta, None, None]:
        with self._failures(), Exchange(self._http, "/v1/chat/completions", body, read=self._events) as exchange:
            for event in exchange.items():
                yield from reader.read(event)
        yield reader.last()

    def _events(self, response: httpx.Response) -> Iterator[Any]:
        if not response.is_success:
            response.read()
            self._raise(response)
        yield from read_events(response)

    def _exchange(self, method: str, route: str, body: dict[str, Any] | None) -> Any:
        with self._failures():
            response = self._http.request(method, route, json=body)
            if not response.is_success:
                self._raise(response)
            return response.json()

    def _raise(self, response: httpx.Response) -> None:
        try:
            text = error_text(response.json())
        except ValueError:
            text = response.text[:200]
        if response.status_code in {400, 404, 413, 422}:
            raise RequestError(text)
        if response.status_code in {401, 403}:
            raise EngineError(f"the engine refused the key ({text}); set OPENAI_API_KEY to one that it takes")
        if response.status_code in {429, 503}:
            raise EngineBusyError(f"the engine is busy ({text}); ask again later")
        raise EngineError(f"the engine answered {response.status_code}: {text}")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn the client's exceptions into EngineError."""
        try:
            yield
        except (httpx.HTTPError, ValueError) as error:
            raise EngineError(
                f"the engine at {self._address} does not answer: {error or type(error).__name__}"
            ) from error


class LlamaEngine(HttpEngine):
    """llama.cpp on a GGUF file, in a child process that this object supervises."""

    def __init__(
        self,
        gguf: Path,
        *,
        name: str = "",
        context_tokens: int = 4096,
        slots: int = 1,
        threads: int | None = None,
        scoring: bool = False,
        sha256: str = "",
        restart: bool = False,
    ) -> None:
        """Start the child and wait until it is ready.

        `context_tokens` is for each of the `slots` (conversations answered at once). `scoring` starts it for `hidden`,
        with the whole context in one batch. With `sha256` only the file of that hash is loaded. With `restart` a child
        that ends is started again on the same bytes, after a pause that grows; until then every request is an
        EngineDownError. Raises
        InputError for a file that is no whole GGUF or not that one, EngineError if the child fails.
        """
        self.path = gguf
        self.sha256 = sha256
        """Of the file, where it was given or can be needed again, which is with `restart`; else ''."""
        self._settings = {
            "gguf": str(gguf),
            "context_tokens": context_tokens * slots,
            "slots": slots,
            "threads": threads or usable_cores(),
            "scoring": scoring,
        }
        self._closing = threading.Event()
        self._down = ""
        """Why there is no child now."""
        specials = self._check().special_tokens()
        if restart and not sha256:
            self.sha256 = sha256_file(gguf)
        key = secrets.token_hex(32)
        self._process, self._log, port = _start_child({**self._settings, "key": key}, gguf)
        super().__init__(f"http://127.0.0.1:{port}", name=name or gguf.stem, api_key=key, specials=specials)
        self._is_llama_server = True
        self._supervisor = threading.Thread(target=self._supervise, name="engine supervisor", daemon=True)
        if restart:
            self._supervisor.start()

    def healthy(self) -> bool:
        """Say whether the child runs and answers."""
        return not self._down and self._process.poll() is None and super().healthy()

    def problem(self) -> str:
        """Return how the child ended, or that it does not answer; '' if all is well."""
        if self._down or self._process.poll() is not None:
            return self._down or self._failure(self._process)
        return super().problem()

    def close(self) -> None:
        """End the child."""
        self._closing.set()
        super().close()
        _end(self._process)
        if self._supervisor.is_alive():
            self._supervisor.join(timeout=5)  # one that is starting a child ends it itself
        _end(self._process)

    def _check(self) -> Header:
        """Return the file's header. Raises InputError for one that is damaged, or is not the file that is meant."""
        header = read_header(self.path)
        if self.sha256 and sha256_file(self.path) != self.sha256:
            raise InputError(f"{self.path} was changed: it is not the file of sha256 {self.sha256}; export it again")
        return header

    def _supervise(self) -> None:
        """Start the child again whenever it ends, until `close`."""
        pause_s, began_s = RESTART_FIRST_S, time.monotonic()
        while True:
            self._process.wait()
            if self._closing.is_set():
                return
            self._down = self._failure(self._process)
            _end(self._process)
            if time.monotonic() - began_s > STEADY_S:
                pause_s = RESTART_FIRST_S
            while self._down:
                _log.warning("engine: %s; starting it again in %.1f s", self._down, pause_s)
                if self._closing.wait(pause_s):
                    return
                pause_s = min(2 * pause_s, RESTART_MOST_S)
                self._start_again()
            began_s = time.monotonic()

    def _start_again(self) -> None:
        """Replace the child, or say in `_down` why that failed."""
        key = secrets.token_hex(32)
        try:
            self._check()
            self._process, self._log, port = _start_child({**self._settings, "key": key}, self.path)
        except (LorikeetError, OSError) as error:
            self._down = str(error)
            return
        if self._closing.is_set():
            _end(self._process)
        before, self._http = self._http, _client(f"http://127.0.0.1:{port}", key)
        before.close()
        self._down = ""
        _log.warning("engine: %s answers again", self.path.name)

    def _check_request(self, messages: Sequence[Message], options: AnswerOptions) -> None:
        """Raise RequestError for what llama.cpp would silently leave undone."""
        check_answer_schema(options.response_format)
        called = any(message.tool_calls or message.role == "tool" for message in messages)
        if (called or (options.tools and options.tool_choice != "none")) and not self._knows_tools:
            raise RequestError(
                "tools: this model's chat template knows none; leave them out, or serve a model that does",
                field="tools",
            )

    @cached_property
    def _knows_tools(self) -> bool:
        """Whether the file's template has a place for tools; llama-server drops them in silence otherwise."""
        return bool(self.get("/props").get("chat_template_caps", {}).get("supports_tools"))

    def tokenize(self, text: str) -> list[int]:
        """Return llama.cpp's ids for a rendered prompt, its special tokens parsed and its BOS added as when serving."""
        ids: list[int] = self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        return ids

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text that the file's own template gives for `messages`, ready for the answer."""
        rows = self._defused([message.as_dict() for message in messages])
        text: str = self.post("/apply-template", {"messages": rows})["prompt"]
        return text

    def hidden(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the final normalised hidden state of each token, shape (tokens, width); needs `scoring`."""
        answer = self.post("/embeddings", {"content": list(ids), "embd_normalize": -1})
        return np.asarray(answer[0]["embedding"], dtype=np.float32)

    def _failure(self, process: subprocess.Popen[bytes]) -> str:
        return f"{self.path.name}: llama.cpp ended with {process.returncode}: {self._log.last_lines()}".rstrip(": ")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        if self._down:
            raise EngineDownError(f"the engine is being started again: {self._down}")
        process = self._process
        try:
            with super()._failures():
                yield
        except EngineError as error:
            try:
                process.wait(timeout=0.5)  # a connection that broke off may be the first sign of its end
            except subprocess.TimeoutExpired:
                raise error from None
            raise EngineDownError(self._failure(process)) from error


class LateEngine:
    """An engine that is started when it is first asked, and costs nothing until then."""

    def __init__(self, start: Callable[[], Engine], *, name: str) -> None:
        """Call `start`, in a thread, when the first answer is asked for; where that fails, again after a pause that grows."""
        self.name = name
        self._start = start
        self._engine: Engine | None = None
        self._starter: threading.Thread | None = None
        self._failure, self._pause_s, self._again_s = "", RESTART_FIRST_S, 0.0
        """Why the last start failed, the pause after the next failure, and when it may be tried again."""
        self._closed = False
        self._lock = threading.Lock()

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 512,
        temperature: float = 0.3,
        top_p: float = 0.95,
        seed: int | None = None,
        stop: Sequence[str] = (),
        options: AnswerOptions | None = None,
    ) -> Generator[Delta, None, None]:
        """Yield the answer; see `Engine.stream`. Raises EngineDownError if the engine does not start."""
        until_s = time.monotonic() + LATE_WAIT_S
        while (engine := self._started()) is None:
            if time.monotonic() >= until_s:
                raise EngineDownError(f"{self.name} is being loaded; ask again in a moment")
            yield Delta("")  # a sign of life: whoever asked may have left meanwhile
        answer = engine.stream(
            messages,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            options=options,
        )
        yield from answer

    def healthy(self) -> bool:
        """Say whether the engine would answer, as far as is known before its start."""
        return not self.problem()

    def problem(self) -> str:
        """Return the engine's problem, or that of its last start; '' before the first."""
        return self._engine.problem() if self._engine else self._failure

    def close(self) -> None:
        """End the engine; one that is being started ends when it is."""
        with self._lock:
            self._closed = True
            engine, starter = self._engine, self._starter
        if starter:
            starter.join(timeout=5)
        if engine:
            engine.close()

    def _started(self) -> Engine | None:
        """Return the engine, or None after a moment in which it was still being loaded. Raises EngineDownError."""
        with self._lock:
            if self._closed:
                raise EngineDownError(f"{self.name} is closed")
            if self._engine is None and self._starter is None:
                if time.monotonic() < self._again_s:
                    raise EngineDownError(self._failure)
                starter = threading.Thread(target=self._begin, name=f"start of {self.name}", daemon=True)
                starter.start()
                self._starter = starter
            engine, starting = self._engine, self._starter
        if engine is None and starting is not None:
            starting.join(timeout=LATE_LOOK_UP_S)
        return engine

    def _begin(self) -> None:
        try:
            engine = self._start()
        # The edge of a thread: whatever it is, it must be told to who asks.
        except Exception as error:  # noqa: BLE001
            if not isinstance(error, LorikeetError | OSError):
                _log.exception("the start of %s failed", self.name)
            with self._lock:
                self._failure = f"{self.name} could not be started: {error}"
                self._again_s = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, RESTART_MOST_S)
                self._starter = None
            return
        with self._lock:
            self._starter, self._failure = None, ""
            if not self._closed:
                self._engine = engine
                return
        engine.close()


def public_address(url: str) -> str:
    """Return a server's address as it may be shown, without the name and password in it. Raises InputError if it is none."""
    try:
        return str(httpx.URL(url).copy_with(userinfo=b""))
    except httpx.InvalidURL as error:
        raise InputError(f"{url[:100]!r} is no address ({error}); give one such as http://127.0.0.1:8080") from error


def _client(url: str, api_key: str) -> httpx.Client:
    # llama-server closes idle connections on its own, and httpx may hand one to a thread while another closes it:
    # no connection is used twice.
    headers = {"Connection": "close"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    base = url.rstrip("/").removesuffix("/v1")
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=10.0)
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(base_url=base, headers=headers, timeout=timeout, limits=limits, trust_env=False)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a child, and close its pipes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(BrokenPipeError):  # what was not yet written to a child that is gone
                pipe.close()


class _Log:
    """The last lines that a child wrote, kept by a thread so that its pipe never fills."""

    def __init__(self, pipe: Any) -> None:
        self._lines: list[str] = []
        threading.Thread(target=self._keep, args=(pipe,), daemon=True).start()

    def _keep(self, pipe: Any) -> None:
        with pipe:
            for line in pipe:
                self._lines = [*self._lines[-19:], line.decode("utf-8", "replace").rstrip()]

    def last_lines(self) -> str:
        """Return the end of what was written, on one line."""
        return " / ".join(line for line in self._lines if line)[-400:]


def _start_child(settings: dict[str, Any], gguf: Path) -> tuple[subprocess.Popen[bytes], _Log, int]:
    """Start `engine_child`, hand it its settings, and return the process, its log and its port."""
    from importlib.util import find_spec

    if find_spec("xllamacpp") is None:
        raise MissingExtraError("xllamacpp", "serve")
    process = subprocess.Popen(
        [sys.executable, "-m", "lorikeet.engine_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin and process.stdout
    log = _Log(process.stderr)
    timer = threading.Timer(START_TIMEOUT_S, process.kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith(b"PORT "):
                return process, log, int(line.split()[1])
    except BrokenPipeError:
        pass
    except BaseException:
        _end(process)
        raise
    finally:
        timer.cancel()
    process.wait()
    _end(process)
    raise EngineError(
        f"llama.cpp could not load {gguf} (exit code {process.returncode}): {log.last_lines() or 'no message'}; "
        "the file may be damaged or need more memory than there is"
    )
