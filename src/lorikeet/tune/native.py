"""The part of the fast path that is C++: built on the machine that runs it, once, and kept in the cache.

    if why_not := load_attention("g++"): ...      # torch.ops.lorikeet_cpu.document_attention is there, or here is why not

It is built by the compiler that torch.compile uses, for the vectors that this processor has, against the torch that is here.
On Linux, and by GCC only: the OpenMP of others is not the one that torch's threads are.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
from pathlib import Path

import torch

from lorikeet.errors import InputError, MachineError
from lorikeet.files import atomic_file
from lorikeet.weights import cache_folder

SOURCE = Path(__file__).with_name("attention.cpp")

FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")

VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""What a compiler is told of a processor that torch names so; of others nothing."""


def is_loaded() -> bool:
    """Return whether torch has the operators already."""
    return hasattr(torch.ops.lorikeet_cpu, "document_attention")


def load_attention(compiler: str) -> str:
    """Let torch have the operators of `attention.cpp`, built by `compiler` if they are not in the cache; return '' or why not."""
    if is_loaded():
        return ""
    try:
        library = _library(compiler)
        for attempt in (1, 2):
            if not library.is_file():
                _build(library, compiler)
            try:
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                break
            except OSError:
                library.unlink()  # a damaged one is not kept
                if attempt == 2:
                    raise
    except subprocess.CalledProcessError as error:
        lines: list[str] = [line for line in error.stderr.splitlines() if line.strip()] or [f"{compiler} failed"]
        return next((line for line in lines if "error: " in line), lines[-1])
    except (OSError, InputError, MachineError) as error:
        return " ".join(str(error.__cause__ or error).split())
    return ""


def _library(compiler: str) -> Path:
    """Return where the library is kept: of another source, torch, processor or compiler, it has another name."""
    made_of = (*_command(compiler), torch.__version__, sysconfig.get_platform(), SOURCE.read_text(encoding="utf-8"))
    return cache_folder() / "native" / f"attention-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"


def _command(compiler: str) -> list[str]:
    """Return what builds the library, but for its name."""
    from torch.utils.cpp_extension import include_paths, library_paths

    folders = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    vectors = VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())
    return [compiler, *FLAGS, *vectors, *folders, str(SOURCE), "-ltorch_cpu", "-lc10"]


def _build(library: Path, compiler: str) -> None:
    """Write the library. Raises CalledProcessError, with what the compiler said in English, where it fails."""
    with atomic_file(library) as target:
        command = [*_command(compiler), "-o", str(target)]
        english = {**os.environ, "LC_ALL": "C"}
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", env=english)
