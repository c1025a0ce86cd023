"""The house's rules: imports run downwards, `--help` is light, everything public is documented, texts are our own."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lorikeet"

FLOORS = (
    {"errors", "messages", "files", "__init__"},
    {"config", "prompt", "grounding", "weights", "gguf_header"},
    {
        "run",
        "card",
        "engine",
        "completion",
        "exchange",
        "answer_schema",
        "engine_child",
        "scoring",
        "compare",
        "speech",
        "data",
    },
    {"tune", "export", "prove", "serve"},
    {"chat", "quickstart"},
    {"cli"},
)
"""Ground first; a module may import from its own floor or below, a stage from no other stage."""

STAGES = FLOORS[3]
PAGE_MAY_SEE = {"serve.assistant", "serve.memory", "serve.note", "serve.ui", "serve.voice"}
"""What of its own stage the page and the voice may see; `speech` and the floors below are open to both."""

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
HEAVY = (
    "torch",
    "transformers",
    "gradio",
    "xllamacpp",
    "onnxruntime",
    "soundfile",
    "faster_whisper",
    "ctranslate2",
    "hibari",
    "av",
)


def modules(source: Path) -> dict[str, ast.Module]:
    """Return every module below `source` by its dotted name, parsed."""
    trees = {}
    for path in sorted(source.rglob("*.py")):
        name = ".".join(path.relative_to(source).with_suffix("").parts)
        trees[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def targets(source: Path) -> dict[str, set[str]]:
    """Return what each module below `source` imports from lorikeet."""
    found = {}
    for module, tree in modules(source).items():
        is_folder = (source / module.replace(".", "/")).is_dir()
        found[module] = imports(tree, package=module if is_folder else module.rpartition(".")[0])
    return found


def imports(tree: ast.Module, *, package: str = "") -> set[str]:
    """Return the names inside lorikeet that a module imports, wherever in it: in functions and for types too.

    `package` is the dotted name of the folder that the module lies in, from which relative imports count.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folders = package.split(".") if package else []
            base = [*folders[: len(folders) - node.level + 1], *(node.module.split(".") if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
            continue
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("lorikeet.") for alias in node.names if alias.name.startswith("lorikeet.")
            }
        elif isinstance(node, ast.ImportFrom) and node.module == "lorikeet":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorikeet."):
            module = (node.module or "").removeprefix("lorikeet.")
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def floor(name: str) -> int:
    """Return the floor of a module by the first part of its name."""
    part = name.partition(".")[0]
    for number, names in enumerate(FLOORS):
        if part in names:
            return number
    raise AssertionError(f"{name} has no floor: add {part} to FLOORS in {Path(__file__).name}")


def broken_imports(source: Path) -> list[str]:
    """Return every import that runs upwards, or from one stage to another, or from the page past its windows."""
    broken = []
    for module, found in targets(source).items():
        mine = module.partition(".")[0]
        for target in sorted(found):
            theirs = target.partition(".")[0]
            upwards = floor(target) > floor(module)
            across = mine in STAGES and theirs in STAGES and mine != theirs
            inside_page = module.startswith(("serve.ui", "serve.voice"))
            allowed = any(target == seen or target.startswith(f"{seen}.") for seen in PAGE_MAY_SEE)
            past_page = inside_page and theirs == "serve" and not allowed
            if upwards or across or past_page:
                broken.append(f"{module} imports {target}")
    return broken


def cycles(source: Path) -> list[str]:
    """Return the modules that import themselves by way of others."""
    imported = targets(source)

    def home(target: str) -> str:
        while target and target not in imported:
            target = target.rpartition(".")[0]
        return target

    edges = {module: {home(target) for target in found} - {module, ""} for module, found in imported.items()}

    def reaches(start: str) -> set[str]:
        seen: set[str] = set()
        stack = list(edges[start])
        while stack:
            module = stack.pop()
            if module not in seen:
                seen.add(module)
                stack += edges.get(module, ())
        return seen

    return sorted(module for module in imported if module in reaches(module))


def undocumented(source: Path) -> list[str]:
    """Return the public modules, classes and functions without a docstring."""
    bare = []

    def visit(name: str, node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        if not ast.get_docstring(node):
            bare.append(name)
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                if isinstance(child, DEFINITIONS) and not child.name.startswith("_"):
                    visit(f"{name}.{child.name}", child)

    for module, tree in modules(source).items():
        visit(module, tree)
    return bare


def foreign_words(text: str, *, issues: bool = True) -> list[str]:
    """Return each line, with its number, that names a path of one machine, a registry's host or an issue by number."""
    # Written in pieces, so that this file does not name them itself.
    hosts = "|".join(("py" + r"pi\.org", "python" + "hosted", r"registry\.np" + "mjs", r"deb\.deb" + "ian"))
    paths = r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot|home)/[\w.]"
    numbers = (
        r"\b(?i:issue|pull request|gh|pr)[ -]?#?\d+\b",
        r"\b(?i:fix(?:e[sd])?|close[sd]?|resolve[sd]?|see|issues?|in|from)\s+#\d+\b",
        r"/(?:issues|pull)/\d+",
        r"\(#\d+\)",
    )
    forbidden = re.compile("|".join((hosts, paths, *(numbers if issues else ()))))
    return [
        f"{number}: {line.strip()[:80]}" for number, line in enumerate(text.splitlines(), 1) if forbidden.search(line)
    ]


def test_imports_run_downwards() -> None:
    assert broken_imports(SOURCE) == []


def test_there_are_no_cycles() -> None:
    assert cycles(SOURCE) == []


def test_everything_public_is_documented() -> None:
    assert undocumented(SOURCE) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("prompt", "from lorikeet.tune.loop import tune"),
        ("export/gguf", "def f():\n    from lorikeet.tune import loop"),
        ("messages", "import lorikeet.engine"),
        ("serve/ui/page", "from lorikeet.serve.http import create_app"),
        ("tune/loop", "from lorikeet import cli"),
        ("tune/loop", "from ..prove import stage"),
        ("messages", "from . import engine"),
        ("serve/ui/page", "from ..http import create_app"),
        ("serve/ui/__init__", "from .. import http"),
        ("run", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lorikeet.tune.loop import tune"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, module: str, line: str) -> None:
    (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / f"{module}.py").write_text(line)
    assert len(broken_imports(tmp_path)) == 1


def test_a_planted_cycle_and_a_bare_name_are_found(tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text('"""A."""\nfrom lorikeet.run import x\n')
    (tmp_path / "run.py").write_text('"""A."""\nfrom lorikeet.engine import x\ndef bare(): ...\n')
    assert cycles(tmp_path) == ["engine", "run"]
    assert undocumented(tmp_path) == ["run.bare"]


def test_relative_imports_make_cycles_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "load.py").write_text("from .clean import x\n")
    (tmp_path / "data" / "clean.py").write_text("def f():\n    from . import load\n")
    assert cycles(tmp_path) == ["data.clean", "data.load"]


def test_a_bare_module_method_and_coroutine_are_found(tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text(
        'class A:\n    """A."""\n    async def m(self): ...\nasync def f(): ...\ndef _g(): ...\n'
    )
    assert undocumented(tmp_path) == ["engine", "engine.A.m", "engine.f"]


def test_imports_the_house_allows_pass(tmp_path: Path) -> None:
    (tmp_path / "serve" / "ui").mkdir(parents=True)
    lines = (
        "lorikeet.serve.assistant import x",
        "lorikeet.serve import assistant",
        "lorikeet.speech.audio import x",
        ". import look",
    )
    (tmp_path / "serve" / "ui" / "page.py").write_text("".join(f"from {line}\n" for line in lines))
    (tmp_path / "cli.py").write_text("from lorikeet.tune.loop import x\nfrom lorikeet.prove.stage import y\n")
    assert broken_imports(tmp_path) == []


def test_a_module_without_a_floor_is_named(tmp_path: Path) -> None:
    (tmp_path / "novel.py").write_text("import lorikeet.engine")
    with pytest.raises(AssertionError, match="novel has no floor"):
        broken_imports(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "see /wo" + "rk/main",
        "/ro" + "ot/.cache/x",
        "https://py" + "pi.org/simple",
        "fixes #" + "12",
        "closed by a change (#" + "7)",
        "iss" + "ue 12",
        "P" + "R-7",
        "https://example.org/a/b/pu" + "ll/7",
    ],
)
def test_foreign_words_are_found(line: str) -> None:
    assert len(foreign_words(f"fine\n{line}\nfine")) == 1


@pytest.mark.parametrize(
    "line",
    ["color: #123456; --line:#888", "a homework/answer", "prompt 3", "&#39;", "https://download.pytorch.org/whl/cpu"],
)
def test_ordinary_words_are_not(line: str) -> None:
    assert foreign_words(line) == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lorikeet import cli\ntry:\n    cli.run(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert done.stderr.strip() == "[]"


def test_texts_name_no_machine_no_registry_and_no_issue() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            text = content.decode("utf-8", errors="replace")
            # Conversations are data: an invoice or a magazine in them may have a number.
            found += [f"{name}:{line}" for line in foreign_words(text, issues=path.suffix != ".jsonl")]
    assert found == []


def test_the_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
