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
    {"run", "engine", "engine_child", "speech", "data"},
    {"tune", "export", "prove", "serve", "deploy"},
    {"chat", "quickstart"},
    {"cli"},
)
"""Ground first; a module may import from its own floor or below, a stage from no other stage."""

STAGES = FLOORS[3]
PAGE_MAY_SEE = {"serve.assistant", "speech"}
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


def imports(tree: ast.Module) -> set[str]:
    """Return the names inside lorikeet that a module imports, wherever in it: in functions and for types too."""
    found = set()
    for node in ast.walk(tree):
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
    return next(number for number, names in enumerate(FLOORS) if part in names)


def broken_imports(source: Path) -> list[str]:
    """Return every import that runs upwards, or from one stage to another, or from the page past its windows."""
    broken = []
    for module, tree in modules(source).items():
        mine = module.partition(".")[0]
        for target in imports(tree):
            theirs = target.partition(".")[0]
            upwards = floor(target) > floor(module)
            across = mine in STAGES and theirs in STAGES and mine != theirs
            inside_page = module.startswith(("serve.ui", "serve.voice"))
            allowed = target.startswith(("serve.ui", "serve.voice", *PAGE_MAY_SEE))
            past_page = inside_page and theirs == "serve" and not allowed
            if upwards or across or past_page:
                broken.append(f"{module} imports {target}")
    return broken


def cycles(source: Path) -> list[str]:
    """Return the modules that import themselves by way of others."""
    trees = modules(source)
    known = set(trees)

    def home(target: str) -> str:
        while target and target not in known:
            target = target.rpartition(".")[0]
        return target

    edges = {module: {home(target) for target in imports(tree)} - {module, ""} for module, tree in trees.items()}

    def reaches(start: str) -> set[str]:
        seen: set[str] = set()
        stack = list(edges[start])
        while stack:
            module = stack.pop()
            if module not in seen:
                seen.add(module)
                stack += edges.get(module, ())
        return seen

    return sorted(module for module in trees if module in reaches(module))


def undocumented(source: Path) -> list[str]:
    """Return the public modules, classes and functions without a docstring."""
    bare = []
    for module, tree in modules(source).items():
        if not ast.get_docstring(tree):
            bare.append(module or "__init__")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                members = [node, *(node.body if isinstance(node, ast.ClassDef) else [])]
                bare += [
                    f"{module}.{node.name}.{m.name}"
                    for m in members
                    if isinstance(m, ast.FunctionDef | ast.ClassDef)
                    and not m.name.startswith("_")
                    and not ast.get_docstring(m)
                ]
    return bare


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
    assert undocumented(tmp_path) == ["run.bare.bare"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lorikeet import cli\ntry:\n    cli.run(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert done.stderr.strip() == "[]"


def test_texts_name_no_machine_and_no_registry() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    hosts = "|".join(("py" + "pi\\.org", "python" + "hosted", "registry\\.np" + "mjs", "deb\\.deb" + "ian"))
    forbidden = re.compile(rf"{hosts}|(?<![\w.])/(?:wo" + r"rk|root|home)/\w")
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.suffix not in {".png", ".svg"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if forbidden.search(line):
                    found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert found == []


def test_the_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
