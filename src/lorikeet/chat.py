"""A conversation in the terminal, streamed.

    chat(engine, system_prompt="...")

`/new` starts over, `/quit` or Ctrl-D ends; Ctrl-C stops the answer. From a pipe it answers each line and ends.
"""

from __future__ import annotations

import sys
from contextlib import closing

from lorikeet.engine import Engine
from lorikeet.errors import RequestError
from lorikeet.messages import Conversation, Message


def chat(engine: Engine, *, system_prompt: str, max_tokens: int, temperature: float) -> None:
    """Talk until the input ends; answers go to stdout, everything else to stderr."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # gives input() a line editor and history

        print(f"{engine.name}: type, and Enter. /new starts over, /quit ends.", file=sys.stderr)
    history: list[Message] = []
    while True:
        try:
            line = input("you: " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return
        if line == "/quit":
            return
        if line == "/new":
            history = []
        elif line:
            history.append(Message("user", line))
            answer = _answer(engine, history, system_prompt, max_tokens=max_tokens, temperature=temperature)
            history.append(Message("assistant", answer))


def _answer(engine: Engine, history: list[Message], system_prompt: str, *, max_tokens: int, temperature: float) -> str:
    """Print the answer as it comes and return what was printed."""
    text = ""
    messages = Conversation(tuple(history)).with_system(system_prompt).messages
    try:
        with closing(engine.stream(messages, max_tokens=max_tokens, temperature=temperature)) as deltas:
            for delta in deltas:
                text += delta.text
                print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except RequestError as error:
        print(f"{error}; /new starts over", file=sys.stderr)
    print()
    return text
