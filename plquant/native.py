"""C++ files of the package: built by the machine's compiler when first needed, then kept.

Of torch at most the headers of its stable interface are compiled, so that it takes seconds. A library lies in
``$XDG_CACHE_HOME/plquant`` (``~/.cache``) under a name made of its source and flags. ``CXX`` names another compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path


def compiler() -> list[str]:
    """The compiler's command; empty if there is none."""
    return shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "")


def missing(load: Callable[[], object]) -> str:
    """Why a library cannot be had; empty if it can.

    Args:
        load: Makes or opens it, by ``library``.
    """
    if not compiler():
        return "there is no C++ compiler; install g++ or clang++, or name one in CXX"
    try:
        load()
    except (OSError, RuntimeError) as error:  # the compiler, what it needs, or the folder of what is kept
        return str(error)
    return ""


@cache
def library(source: Path, *flags: str) -> ctypes.CDLL:
    """The shared library made of one source file, and the headers beside it, with these flags.

    Raises:
        RuntimeError: It does not compile; the message has what the compiler says.
    """
    command = compiler()
    flags = ("-std=c++17", "-shared", "-fPIC", "-fopenmp", *flags)
    read = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(read + " ".join([*command, *flags]).encode()).hexdigest()[:16]
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plquant" / f"{source.stem}-{key}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            build = [*command, str(source), *flags, "-o", str(built)]  # libraries come after what needs them
            done = subprocess.run(build, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(build)} failed:\n{done.stderr}")
            built.replace(path)
    return ctypes.CDLL(str(path))
