"""The command line: one thin function per verb, each importing its stage inside so that `--help` stays light.

Data goes to stdout, logs and progress to stderr. Exit codes: 0 done, 1 a verdict that says no, 2 the user's input,
3 the machine.
"""

from __future__ import annotations

import json as json_module
import os
import re
import sys
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Toml

from lorikeet.config import (
    COMMAS,
    PACKAGED_MODEL,
    SYSTEM_PROMPT,
    ExportConfig,
    ProveConfig,
    ServeConfig,
    TuneConfig,
    VerifyConfig,
    Whole,
    check_tune,
)
from lorikeet.errors import InputError, LorikeetError, MachineError, is_out_of_memory, printable
from lorikeet.files import NO_SUCH_PLACE, expanded

app = App(
    name="lorikeet",
    help=(
        "Teach a small language model on your own conversations, prove that it got better, talk with it. "
        "Every command takes --config FILE, a recipe such as recipes/quickstart.toml; flags beat the recipe."
    ),
    help_on_error=False,
    result_action="return_value",
)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
"""`owner/name`, with a revision after `@`: what is asked of the hub if no such path is here."""

Json = Annotated[bool, Parameter(name="--json", negative=())]


@app.command
def quickstart(*, out: Path = Path("runs/quickstart"), minutes: float = 5.0, serve: bool = True) -> int:
    """Run the whole loop on the packaged model and data: tune, export, prove, serve. No hub is needed.

    Parameters
    ----------
    out
        The run folder; a number is added if it is there already.
    minutes
        Bound of the tuning time.
    serve
        Serve the tuned model at the end, until Ctrl-C.
    """
    from lorikeet.quickstart import run_quickstart

    root = run_quickstart(out, minutes=minutes)
    if serve:
        _serve_run(root, ServeConfig())
    return 0


@app.command
def inspect(
    data: str,
    *,
    model: str = PACKAGED_MODEL,
    max_length: Whole = TuneConfig.max_length,
    on_long: Literal["error", "truncate", "drop"] = TuneConfig.on_long,
    system_prompt: str = "",
    validation_share: float = TuneConfig.validation_share,
    heldout_share: float = TuneConfig.heldout_share,
    seed: Whole = TuneConfig.seed,
    against: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    out: Path | None = None,
    json: Json = False,
) -> int:
    """Show what is in a dataset and what tuning would make of it: lengths, mask, repetitions, broken rows.

    Parameters
    ----------
    data
        What `tune --data` takes: `spoken`, a file, or a hub id.
    model
        The model whose tokens and chat template are used.
    max_length
        Longest conversation in tokens, as for tune.
    on_long
        What tune would do with longer ones; those that it would refuse are shown as truncated.
    system_prompt
        System turn for conversations without one, as for tune.
    validation_share
        Share kept for validation, as for tune.
    heldout_share
        Share kept for prove, as for tune.
    seed
        Seed of the split, as for tune.
    against
        Files of evaluation prompts that should not be in the data; can be given several times.
    out
        Where the page goes; by default runs/inspect-DATA.html.
    json
        Print the report as one JSON document.
    """
    from rich.console import Console

    from lorikeet.data.inspect import inspect_data, print_report, write_page

    as_tuned = TuneConfig(
        model=model,
        data=data,
        max_length=max_length,
        on_long=on_long,
        system_prompt=system_prompt,
        validation_share=validation_share,
        heldout_share=heldout_share,
        seed=seed,
    )
    check_tune(as_tuned)
    report = inspect_data(as_tuned, against=against)
    page = out or Path("runs") / f"inspect-{_short(data)}.html"
    write_page(report, page)
    if json:
        print(json_module.dumps(report, indent=2))
    else:
        print_report(report, Console(highlight=False))
        _say(f"page: {page}")
    return 0


@app.command
def tune(
    config: TuneConfig | None = None,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    sweep: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    sweep_trials: Whole = 0,
) -> int:
    """Tune a base model with LoRA on conversations.

    Parameters
    ----------
    out
        The run folder to make; by default runs/MODEL-DATA.
    resume
        A run folder or sweep to go on with, instead of starting one; its own settings are used.
    sweep
        FIELD=V1,V2,...: a run for each value, compared at the end; can be given several times.
    sweep_trials
        At most so many runs of a sweep; 0 for all combinations.
    """
    from lorikeet.tune import loop

    if resume is not None and (config is not None or out is not None or sweep):
        raise InputError("--resume takes the run's own settings; give no others with it")
    if sweep_trials < 0 or (sweep_trials and not sweep):
        raise InputError(f"--sweep-trials is {sweep_trials}; it needs --sweep and must not be negative")
    config = config or TuneConfig()
    out = out or _default_out(config)
    if sweep or (resume is not None and (resume / "sweep.json").is_file()):
        from lorikeet.tune.sweep import resume_sweep
        from lorikeet.tune.sweep import sweep as start_sweep

        root = resume_sweep(resume) if resume else start_sweep(config, sweep, trials=sweep_trials, out=out)
    else:
        root = (loop.resume(resume) if resume else loop.tune(config, out=out)).root
    _say(f"next: lorikeet export {root}")
    return 0


@app.command
def export(run: Path, config: ExportConfig | None = None, *, verify: bool = True) -> int:
    """Write a run's artefacts: adapter, merged 16-bit weights, GGUF; exits 1 if they are not the model that was tuned.

    Parameters
    ----------
    run
        The run folder.
    verify
        Compare the artefacts with what was tuned; without it, `verify` does so later.
    """
    from lorikeet.run import require_address_space

    require_address_space()
    from lorikeet.export.stage import export as export_run

    export_run(run, config or ExportConfig())
    if verify:
        from lorikeet.export.parity import describe
        from lorikeet.export.parity import verify as verify_run

        certificate = verify_run(run, VerifyConfig())
        for line in describe(certificate):
            _say(line)
        if not certificate["pass"]:
            _say(f"report: {run / 'reports' / 'parity.html'}")
            return 1
    _say(f"next: lorikeet prove {run}")
    return 0


@app.command
def verify(run: Path, config: VerifyConfig | None = None, *, json: Json = False) -> int:
    """Check that adapter, merged weights, GGUF files and the served route are one model; exits 1 if they are not.

    Parameters
    ----------
    run
        The run folder, exported.
    json
        Print the certificate as one JSON document.
    """
    from lorikeet.export.parity import describe
    from lorikeet.export.parity import verify as verify_run

    certificate = verify_run(run, config or VerifyConfig())
    if json:
        print(json_module.dumps(certificate, indent=2))
    else:
        for line in describe(certificate):
            print(line)
        print(f"report: {run / 'reports' / 'parity.html'}")
    return 0 if certificate["pass"] else 1


@app.command
def prove(run: Path, config: ProveConfig | None = None, *, json: Json = False) -> int:
    """Compare base and tuned model on held-out conversations; exits 1 if the verdict is no.

    Parameters
    ----------
    run
        The run folder, exported.
    json
        Print the proof as one JSON document.
    """
    from lorikeet.prove.stage import prove as prove_run
    from lorikeet.prove.words import next_steps

    proof = prove_run(run, config or ProveConfig())
    if json:
        print(json_module.dumps(proof, indent=2))
    else:
        print(_verdict_line(proof))
        for check in proof["checks"]:
            print(f"  {'passed' if check['pass'] else 'FAILED'}  {check['name']}: {check['value']} ({check['limit']})")
        for step in next_steps(proof, run=str(run)):
            print(step)
        print(f"report: {run / 'reports' / 'proof.html'}")
    return 0 if proof["verdict"] == "ship" else 1


@app.command
def publish(
    run: Path,
    *,
    repo: str,
    private: Annotated[bool, Parameter(negative=())] = False,
    formats: Annotated[tuple[Literal["adapter", "merged", "gguf"], ...], COMMAS] = ExportConfig.formats,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Upload a run to the Hugging Face hub; refuses without a passing certificate. Run it again after a break.

    Parameters
    ----------
    run
        The run folder, exported and verified.
    repo
        The repository, owner/name; it is made if it is not there.
    private
        Make it a private one.
    formats
        What is uploaded, separated by commas: merged and gguf lie at the root, the adapter in adapter/.
    dry_run
        List what would be uploaded, and send nothing.
    """
    from lorikeet.export.hub import publish as publish_run

    url = publish_run(run, repo=repo, private=private, formats=formats, dry_run=dry_run)
    if url:
        _say(f"published: {url}")
    return 0


@app.command
def chat(target: str, *, system: str | None = None, max_tokens: Whole = 512, temperature: float = 0.3) -> int:
    """Talk with a run, a GGUF file, a model or a server, in the terminal.

    Parameters
    ----------
    target
        A run folder, a GGUF file, a model (packaged, hub id or folder), or the URL of an OpenAI-compatible server.
    system
        The system turn; by default the run's own.
    max_tokens
        Longest answer.
    temperature
        Sampling temperature; 0 is greedy.
    """
    from lorikeet.chat import chat as talk

    engine, default_system, _ = _open(target, ServeConfig())
    with engine:
        talk(
            engine,
            system_prompt=default_system if system is None else system,
            max_tokens=max_tokens,
            temperature=temperature,
        )
    return 0


@app.command
def serve(target: str, config: ServeConfig | None = None) -> int:
    """Serve the assistant: the page at /, an OpenAI-compatible API beside it.

    Parameters
    ----------
    target
        A run folder, a GGUF file, a model (packaged, hub id or folder), or the URL of an OpenAI-compatible server.
    """
    _serve(target, config or ServeConfig())
    return 0


@app.command
def memory(
    file: Path,
    *,
    sft: Path | None = None,
    rated_only: Annotated[bool, Parameter(negative=())] = False,
    preferences: Path | None = None,
    delete: str | None = None,
    delete_all: Annotated[bool, Parameter(negative=())] = False,
    json: Json = False,
) -> int:
    """List the conversations that `serve --memory FILE` kept, write them as rows to tune on, delete them.

    Rows are written before anything is deleted. Without any of these, the list is printed.

    Parameters
    ----------
    file
        The memory; a server may be using it.
    sft
        A .jsonl file for conversations to tune on: corrections in the place of their answers, without answers rated down
        or cut short.
    rated_only
        With --sft: only answers that were rated up or corrected.
    preferences
        A .jsonl file for pairs: each corrected answer as rejected, its correction as chosen.
    delete
        The id of a conversation to delete and overwrite.
    delete_all
        Delete and overwrite all of them.
    json
        Print the list as one JSON document.
    """
    from lorikeet.serve.memory_command import check_outputs, counted, table, write_preferences, write_sft
    from lorikeet.serve.store import Store

    if rated_only and sft is None:
        raise InputError("--rated-only says which answers --sft OUT.jsonl takes; give both")
    if delete_all and delete is not None:
        raise InputError("--delete and --delete-all exclude each other; give one")
    check_outputs(file, (sft, preferences))
    with Store.open(file, create=False) as store:
        if sft is not None:
            _say(write_sft(store, sft, rated_only=rated_only))
        if preferences is not None:
            _say(write_preferences(store, preferences))
        if delete is not None:
            if not store.delete(delete):
                raise InputError(f"{file} holds no conversation {delete!r}; lorikeet memory {file} lists them")
            _say(f"deleted 1 conversation from {file}")
        if delete_all:
            _say(f"deleted {counted(store.delete_all(), 'conversation')} from {file}")
        if json:
            print(json_module.dumps({"file": str(file), "conversations": store.summaries()}, indent=2))
        elif sft is None and preferences is None and delete is None and not delete_all:
            for line in table(store.summaries()):
                print(line)
    return 0


@app.command
def weights(*, json: Json = False) -> int:
    """List what is packaged: names, where each comes from, its licence, and whether it is here.

    Parameters
    ----------
    json
        Print one JSON document.
    """
    from lorikeet.weights import cache_folder, inventory

    rows = inventory()
    if json:
        print(json_module.dumps({"cache": str(cache_folder()), "packaged": rows}, indent=2))
        return 0
    for row in rows:
        state = "here" if row["here"] else f"fetched on first use, {row['bytes'] / 1e6:.0f} MB"
        print(f"{row['name']:22} {row['what']:68} {row['licence']:11} {row['from']:28} {state}")
    print(f"cache: {cache_folder()}")
    return 0


def main() -> None:
    """Run the command line of this process and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; an error that a person can mend is one line on stderr."""
    try:
        app.config, rest = _recipe(arguments)
        return int(app(rest, exit_on_error=False, print_error=False) or 0)
    except CycloptsError as error:
        return _fail(" ".join(str(error).split()), "see: lorikeet --help", code=InputError.exit_code)
    except LorikeetError as error:
        return _fail(str(error), code=error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SUCH_PLACE and error.filename:
            return _fail(f"{error.filename}: {error.strerror}; name another path", code=InputError.exit_code)
        if isinstance(error, PermissionError) and error.filename:
            return _fail(f"{error.filename}: {error.strerror}; fix its rights", code=MachineError.exit_code)
        if not is_out_of_memory(error):
            raise
        return _fail("out of memory; what was there is kept: close other programs and try again", code=3)


def _recipe(arguments: list[str]) -> tuple[list[Any], list[str]]:
    """Return the recipe that `--config FILE` names, as cyclopts takes it, and the other arguments."""
    if "--config" not in arguments and not any(a.startswith("--config=") for a in arguments):
        return [], arguments
    place = next(i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--config")
    _, given, value = arguments[place].partition("=")
    if not given and place + 1 == len(arguments):
        raise InputError("--config names no file; give a recipe such as recipes/quickstart.toml")
    path = Path(value if given else arguments[place + 1])
    if not path.is_file():
        raise InputError(f"--config {path} is not there; the recipes are in the folder recipes/")
    import tomllib

    try:
        _check_recipe(path, tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is no TOML file: {error}") from error
    rest = arguments[:place] + arguments[place + (1 if given else 2) :]
    return [Toml(path, must_exist=True, use_commands_as_keys=True)], rest


def _check_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Raise InputError for a table or key that no stage has, naming the nearest."""
    stages = {
        "tune": TuneConfig,
        "export": ExportConfig,
        "verify": VerifyConfig,
        "prove": ProveConfig,
        "serve": ServeConfig,
    }
    for stage, values in recipe.items():
        if stage not in stages or not isinstance(values, dict):
            raise InputError(f"{path}: [{stage}] is no stage; a recipe has the tables {', '.join(stages)}")
        names = {field.name for field in fields(stages[stage])}
        for key in values:
            if key not in names:
                nearest = get_close_matches(key, names, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"see: lorikeet {stage} --help"
                raise InputError(f"{path}: [{stage}] has no {key}; {hint}")


def _default_out(config: TuneConfig) -> Path:
    return Path("runs") / f"{_short(config.model)}-{_short(config.data)}"


def _short(name: str) -> str:
    return Path(name.partition("@")[0]).name.partition(".json")[0]


def _open(target: str, config: ServeConfig) -> tuple[Any, str, str]:
    """Return the engine for a target, its system prompt and its name."""
    from lorikeet.engine import HttpEngine, LlamaEngine

    source, system, name = resolve_target(target, config)
    if isinstance(source, str):
        engine: Any = HttpEngine.connect(source, api_key=os.environ.get("OPENAI_API_KEY", ""))
        return engine, system, engine.name
    return LlamaEngine(source, name=name, context_tokens=config.context_tokens), system, name


def resolve_target(target: str, config: ServeConfig) -> tuple[Path | str, str, str]:
    """Return what a TARGET means: its GGUF file or URL, its system prompt and the name it is served under.

    A model that is not packaged is written as GGUF into the cache first. Raises InputError if it is none of these.
    """
    from lorikeet.run import RunFolder
    from lorikeet.weights import PACKAGES, packaged_gguf

    if target.startswith(("http://", "https://")):
        from lorikeet.engine import public_address

        return target, SYSTEM_PROMPT, public_address(target)
    path = expanded(target)
    if (path / "run.json").is_file():
        run = RunFolder.open(path)
        artefact = f"gguf/model-{config.quant}.gguf"
        gguf = run.require(artefact, command="lorikeet export")
        run.verify(artefact)
        return gguf, str(run.manifest().get("system_prompt", "")), path.resolve().name
    if path.is_file():
        return path, SYSTEM_PROMPT, path.stem
    if target in PACKAGES and any(file.endswith(".gguf") for file in PACKAGES[target].files):
        return packaged_gguf(target), SYSTEM_PROMPT, target
    if (path / "config.json").is_file() or (not path.exists() and HUB_ID.fullmatch(target)):
        from lorikeet.export.stage import convert

        return convert(target, config.quant), SYSTEM_PROMPT, target
    if path.is_dir():
        raise InputError(
            f"{target} is a folder but neither a run nor a model; name a run, a GGUF file, {PACKAGED_MODEL} or a URL"
        )
    raise InputError(
        f"{target} is not there; name a run folder, a GGUF file, a model such as {PACKAGED_MODEL}, or a URL"
    )


def _serve(target: str, config: ServeConfig) -> None:
    from lorikeet.serve.launch import serve as serve_target

    source, system, name = resolve_target(target, config)
    serve_target(source, config, system_prompt=system, model_name=name)


def _serve_run(root: Path, config: ServeConfig) -> None:
    _serve(str(root), config)


def _verdict_line(proof: dict[str, Any]) -> str:
    heldout = proof["heldout"]
    low, high = heldout["ci95"]
    return (
        f"{proof['verdict']}: held-out loss {heldout['base_loss']:.3f} -> {heldout['tuned_loss']:.3f} "
        f"({heldout['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, {heldout['n']} conversations)"
    )


def _fail(*parts: str, code: int) -> int:
    line = "; ".join(part.strip().rstrip(".") for part in parts if part.strip())
    print(f"lorikeet: {printable(line)}", file=sys.stderr)
    return code


def _say(line: str) -> None:
    print(line, file=sys.stderr)
