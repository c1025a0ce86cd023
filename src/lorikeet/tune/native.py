"""The part of the fast path that is C++: built on the machine that runs it, once, and kept in the cache.

    if why_not := load_attention("g++"): ...      # torch.ops.lorikeet_cpu.document_attention is there, or here is why not

It is built by the compiler that torch.compile uses, for the vectors that this processor has, against the torch that is here.
On Linux only: elsewhere torch's threads are not the compiler's own OpenMP.
"""

from __future__ import annotations

import hashlib
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

LONGEST_S = 300
"""Building takes 10 seconds; a compiler that takes so long hangs."""


def is_loaded() -> bool:
    """Return whether torch has the operators already."""
    return hasattr(torch.ops.lorikeet_cpu, "document_attention")


def load_attention(compiler: str) -> str:
    """Let torch have the operators of `attention.cpp`, built by `compiler` if they are not in the cache; return '' or why not."""
    if is_loaded():
        return ""
    try:
        torch.ops.load_library(_built(compiler))  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    except subprocess.CalledProcessError as error:
        return next((line for line in error.stderr.splitlines() if "error" in line), f"{compiler} failed")
    except (OSError, subprocess.TimeoutExpired, InputError, MachineError) as error:
        return " ".join(str(error).split())
    return ""


def _built(compiler: str) -> Path:
    """Return the library, building it if none is in the cache that was made of the same."""
    from torch.utils.cpp_extension import include_paths, library_paths

    command = [
        compiler,
        *FLAGS,
        *VECTORS.get(torch.backends.cpu.get_cpu_capability(), ()),
        *(f"-I{path}" for path in include_paths()),
        *(f"-L{path}" for path in library_paths()),
        str(SOURCE),
        "-ltorch_cpu",
        "-lc10",
    ]
    made_of = (*command, torch.__version__, sysconfig.get_platform(), SOURCE.read_text(encoding="utf-8"))
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()
    library = cache_folder() / "native" / f"attention-{digest[:16]}.so"
    if not library.is_file():
        with atomic_file(library) as target:
            subprocess.run([*command, "-o", str(target)], check=True, capture_output=True, text=True, timeout=LONGEST_S)
    return library
