"""From a target to a served assistant, in the order in which things can fail.

    serve(Path("model-q8_0.gguf"), ServeConfig(port=0), system_prompt="...", model_name="my-model")

The port is taken first, then engine, ears, voice and page are loaded, each announced on stderr; the URL is printed
when the page answers.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorikeet.card import public_name
from lorikeet.config import ServeConfig
from lorikeet.engine import HttpEngine, LateEngine, LlamaEngine
from lorikeet.errors import InputError
from lorikeet.files import expanded, sha256_file
from lorikeet.gguf_header import read_header
from lorikeet.grounding import approximate_tokens
from lorikeet.run import RunFolder, require_memory
from lorikeet.serve.memory import Memory, identify
from lorikeet.serve.note import Origin
from lorikeet.serve.server import Listener, run_server
from lorikeet.weights import base_gguf_path

if TYPE_CHECKING:
    from lorikeet.serve.assistant import Assistant
    from lorikeet.serve.models import Served
    from lorikeet.speech import Ears, Voice

T = TypeVar("T")


def serve(target: Path | str, config: ServeConfig, *, system_prompt: str, model_name: str) -> None:
    """Serve `target`, a GGUF file or the URL of an OpenAI-compatible server, until Ctrl-C or SIGTERM.

    Raises InputError for settings that cannot be served, MachineError or EngineError for what cannot be loaded.
    """
    check_exposure(config)
    if config.slots < 1 or config.queue < 0:
        raise InputError(
            f"--slots {config.slots} --queue {config.queue}: slots must be above 0, the queue not negative"
        )
    if isinstance(target, Path):
        read_header(target)
    # Imported here and not above: the search and web packages are extras, and the settings are checked first.
    from lorikeet.serve.search.service import load_search

    provider = load_search(config.search, deadline_s=config.search_deadline_s)
    with _sigterm_as_ctrl_c(), Listener(config.host, config.port) as listener, ExitStack() as stack:
        memory = _memory(config)
        if memory is not None:
            stack.callback(memory.close)
        engine, origin = _step(f"model {model_name}", lambda: _open(target, config, model_name))
        stack.callback(engine.close)
        ears = None if config.ears == "off" else _step(f"ears {config.ears}", lambda: _ears(config.ears))
        voice = None if config.voice == "off" else _step(f"voice {config.voice}", lambda: _voice(config.voice))
        count_tokens = _counter(engine) if isinstance(engine, LlamaEngine) else approximate_tokens
        # Imported here and not above: the web packages are an extra.
        from lorikeet.serve.assistant import Assistant

        assistant = Assistant(
            engine,
            system_prompt=system_prompt,
            provider=provider,
            config=config,
            count_tokens=count_tokens,
            memory=memory,
            origin=origin,
        )
        _step("first words", lambda: _warm(assistant, ears, voice))
        models = _models(target, origin, assistant, config)
        for model in models[1:]:
            stack.callback(model.assistant.close)
        if provider:
            _say(f"search: {provider.name}; {assistant.search_note}")

        def build() -> Any:
            from lorikeet.serve.http import create_app
            from lorikeet.serve.limits import Limits
            from lorikeet.serve.models import Models

            return create_app(
                Models(*models),
                ears=ears,
                voice=voice,
                api_key=config.api_key,
                hosts=_allowed_hosts(config),
                limits=Limits() if config.public else None,
            )

        app = _step("page", build)
        try:
            run_server(app, listener, proxy=config.proxy, on_ready=_announce)
        except KeyboardInterrupt:
            _say("stopped")


def check_exposure(config: ServeConfig) -> None:
    """Raise InputError for a server that others could use, or read each other in, without that being asked for."""
    if config.api_key is not None and not config.api_key.strip():
        raise InputError("--api-key is empty; give a key, or leave the flag out")
    if config.proxy:
        _check_proxy(config.proxy)
    doors = [f"--proxy {config.proxy}"] if config.proxy else []
    doors += [] if is_loopback(config.host) else [f"--host {config.host}"]
    if doors and not config.api_key and not config.public:
        raise InputError(
            f"{' '.join(doors)} lets other machines in; give --api-key too, or --public to let anybody in within limits, "
            "or leave it out and listen on 127.0.0.1 (the default)"
        )
    if config.public and config.memory and not config.api_key:
        raise InputError("--memory would keep strangers' conversations; with --public it needs --api-key")


def _check_proxy(proxy: str) -> None:
    try:
        is_everybody = ipaddress.ip_network(proxy, strict=False).prefixlen == 0
    except ValueError as error:
        raise InputError(f"--proxy {proxy} is no address or network; give one such as 10.0.0.0/8") from error
    if is_everybody:
        raise InputError(f"--proxy {proxy} would believe everybody; name the proxy's own address or network")


def is_loopback(host: str) -> bool:
    """Say whether `host` can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _allowed_hosts(config: ServeConfig) -> tuple[str, ...] | None:
    """Return the names in a Host header that mean this server; None where its names cannot be known."""
    from lorikeet.serve.guard import LOOPBACK_HOSTS

    if config.public or config.proxy or not is_loopback(config.host):
        return None
    return (*LOOPBACK_HOSTS, config.host)


def _open(target: Path | str, config: ServeConfig, model_name: str) -> tuple[HttpEngine, Origin]:
    """Return the engine of a target, and what is known of the model in it."""
    origin = identify(target, model_name, hashes=False)  # the engine takes the hash, once
    if isinstance(target, str):
        remote = HttpEngine.connect(target, api_key=os.environ.get("OPENAI_API_KEY", ""))
        from lorikeet.serve.models import DEFAULT

        return remote, replace(origin, name=origin.name if remote.name == DEFAULT else remote.name)
    engine = _start(target, origin, config)
    return engine, replace(origin, gguf_sha256=engine.sha256)


def _start(gguf: Path, origin: Origin, config: ServeConfig) -> LlamaEngine:
    return LlamaEngine(
        gguf,
        name=origin.name,
        context_tokens=config.context_tokens,
        slots=config.slots + 1,  # one is kept for who speaks
        sha256=origin.gguf_sha256,
        restart=True,
    )


def _models(target: Path | str, origin: Origin, assistant: Assistant, config: ServeConfig) -> list[Served]:
    """Return the target's model and, where a run's proof compared both, its base; say why there is no base.

    The base's engine starts when it is first asked.
    """
    from lorikeet.serve.models import Served

    if isinstance(target, str) or not origin.adapter_sha256:
        return [Served.of(origin, assistant)]
    run = RunFolder.open(target.resolve().parent.parent)
    files = (run.report("proof") or {}).get("files", {})
    again = f"lorikeet prove {run.root} --quant {origin.quant}"
    if files.get("tuned") != f"gguf/{target.name}":
        _say(f"only the tuned model is served: no proof is about {target.name}; to serve its base too: {again}")
        return [Served.of(origin, assistant)]
    tuned = Served.of(origin, assistant, proved=True)
    gguf = base_gguf_path(run.manifest(), origin.quant)
    if "base_sha256" not in files:
        _say(
            f"only the tuned model is served: the proof does not say which file the base was; to serve it too: {again}"
        )
        return [tuned]
    if not gguf.is_file() or sha256_file(gguf) != files["base_sha256"]:
        export = f"lorikeet export {run.root} --quant {origin.quant}"
        _say(f"only the tuned model is served: the base that was proved is not in the cache; {export}, then {again}")
        return [tuned]
    name = public_name(run.manifest()["base"]["id"])
    beside = Origin(
        name=name if name != origin.name else f"{name}-base", quant=origin.quant, gguf_sha256=files["base_sha256"]
    )

    def start() -> LlamaEngine:
        require_memory(gguf.stat().st_size, to=f"answering with {beside.name} too", instead=f"ask {origin.name}")
        return _start(gguf, beside, config)

    engine = LateEngine(start, name=beside.name)
    _say(f"beside it: {beside.name}, the base that it was proved against, loaded when it is first asked")
    return [tuned, Served.of(beside, assistant.beside(engine, origin=beside), proved=True)]


def _ears(name: str) -> Ears:
    from lorikeet.speech.hear import load_ears

    return load_ears(name)


def _voice(name: str) -> Voice:
    from lorikeet.speech.speak import load_voice

    return load_voice(name)


def _memory(config: ServeConfig) -> Memory | None:
    """Open the memory, and say that there is one."""
    if config.memory_days < 0:
        raise InputError(f"--memory-days is {config.memory_days}; give a number of days, or 0 to keep conversations")
    if not config.memory:
        if config.memory_days:
            raise InputError("--memory-days needs --memory FILE; without it nothing is kept")
        return None
    memory = Memory.open(expanded(config.memory), days=config.memory_days)
    _say(f"conversations are kept in {config.memory}" + (f" for {memory.days} days" if memory.days else ""))
    return memory


def _warm(assistant: Assistant, ears: Ears | None, voice: Voice | None) -> None:
    """Have every part do its work once, so that the first turn is as fast as the others."""
    assistant.warm()
    if voice is None:
        return
    sound = [*voice.speak("Hello there, this is how I sound.")]
    if ears is not None and sound:
        import numpy as np

        from lorikeet.speech import HEARING_HZ
        from lorikeet.speech.audio import resample

        ears.transcribe(resample(np.concatenate(sound), voice.sample_rate_hz, HEARING_HZ))


def _counter(engine: LlamaEngine) -> Callable[[str], int]:
    return lambda text: len(engine.tokenize(text))


def _step(what: str, load: Callable[[], T]) -> T:
    """Load one part and say on stderr how long it took."""
    began = time.monotonic()
    _say(f"loading {what} ...", end="\r" if sys.stderr.isatty() else "\n")
    part = load()
    _say(f"loaded {what} in {time.monotonic() - began:.1f} s    ")
    return part


def _announce(url: str) -> None:
    _say(f"ready: {url}  (Ctrl-C ends)")


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Make SIGTERM end things as Ctrl-C does, so that the engine's process is ended in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str, *, end: str = "\n") -> None:
    print(line, end=end, file=sys.stderr, flush=True)
