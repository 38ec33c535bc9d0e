"""The compiled library of CPU kernels: found, loaded and made known to XLA once."""

import ctypes
import functools
import importlib.util
import os
from pathlib import Path

import jax

TARGETS = ("lmmjax_product", "lmmjax_unpack")
"""XLA's custom calls, by the names of their handlers in the library."""
PATHS = ("avx512", "avx2", "portable")
"""The ways to run a kernel, fastest first; which of them there are depends on the CPU."""
PACKAGE = "lmmjax_cpu"
"""The directory that the library is installed to, beside the packages: see CMakeLists.txt."""


@functools.cache
def missing() -> str | None:
    """Returns why there is no library, or None; loads it the first time.

    Raises:
        ValueError: LMMJAX_CPU names a path that this CPU does not have: an explicit choice never falls back.
    """
    try:
        load()
    except (AttributeError, OSError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def path() -> str:
    """Returns the name of the path that kernels take, a name in `PATHS`."""
    return load().lmmjax_path().decode()


def choose(name: str) -> None:
    """Has all kernels take a path from now on, in programs that are compiled already, too; "": the fastest.

    Raises:
        ValueError: this CPU or this build of the library does not have it.
    """
    _choose(load(), name)


@functools.cache
def load() -> ctypes.CDLL:
    """Returns the library, whose calls XLA knows from then on.

    Raises:
        OSError: it was not compiled.
        ValueError: LMMJAX_CPU names a path that this CPU does not have.
    """
    library = ctypes.CDLL(str(_file()))
    library.lmmjax_path.restype = ctypes.c_char_p
    library.lmmjax_choose.argtypes, library.lmmjax_choose.restype = [ctypes.c_char_p], ctypes.c_bool
    _choose(library, os.environ.get("LMMJAX_CPU", ""))
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


def _file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    for directory in spec.submodule_search_locations or () if spec else ():
        for file in Path(directory).glob(f"lib{PACKAGE}.*"):
            return file
    raise OSError("the CPU kernels were not compiled: install a C++ compiler (gcc or clang), then lmmjax once more")


def _choose(library: ctypes.CDLL, name: str) -> None:
    if not library.lmmjax_choose(name.encode()):
        raise ValueError(f"LMMJAX_CPU: got {name!r}, expected one of {', '.join(PATHS)} that this CPU has")
