"""What a GPU kernel compiles to, found on a machine that has no GPU: registers, spills, shared memory, loops in SASS.

A test module says what to compile and asks for one device's results, compiled together and once:

    def variants():
        return {"int4": (functools.partial(decode, bits=4), (q, words))}  # shapes or arrays

    @sass.compiles
    def test_nothing_spills():
        assert sass.compile_variants(variants, "h200")["int4"].only().spilled_bytes == 0

It happens in another process (`sass_worker`): XLA reads its flags once, and some of what a compiler refuses ends it.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

TARGETS = Path(__file__).parent / "kernels" / "gpu" / "targets"
"""Descriptions of devices, `NAME.textproto`: XLA's GpuTargetConfigProto."""
OLDER_TARGETS = ["orin", *(pytest.param(name, marks=pytest.mark.slow) for name in ("a100", "l4"))]
"""The small device that this is for, and two others that .ci/gpu-compile leaves to those who ask."""
BULK = "bulk"
"""Stands for the width of a load that copies a whole tile to shared memory (TMA)."""
Loop = list[str]
"""The instructions that one pass through a loop may issue, without those of the loops inside it."""
Variants = Callable[[], dict[str, tuple[Callable, tuple[Any, ...]]]]
"""A module's function that gives, by name, functions to compile and their arguments: trees of arrays or shapes."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel for one device. `stack_bytes` and `spilled_bytes` are a thread's, `shared_bytes` a block's."""

    name: str
    threads: int
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    loops: list[Loop]

    @property
    def main_loop(self) -> Loop:
        """The loop with the most instructions of its own; empty if there is none."""
        return max(self.loops, key=len, default=[])

    @property
    def loaded_bytes(self) -> int:
        """What a block loads in one pass of its main loop, without bulk loads and as if no lane were masked.

        More than the source says if the compiler unrolls the loop, which it does as it likes: up to 8 times when small.
        """
        widths = loads(self.main_loop)
        return self.threads * sum(width * count for width, count in widths.items() if isinstance(width, int))

    def slots_per_element(self, elements: float) -> float:
        """Issue slots, times 32 lanes, an element, where a block reads `elements` in one pass of its main loop.

        Count them by `loaded_bytes`, or assert that it is what you expect of `elements`.
        """
        return slots(self.main_loop) * self.threads / elements


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A variant's Pallas kernels by name, or why it does not compile. XLA's own kernels are left out.

    A kernel that is called twice is there once; different ones of the same name are `name`, `name__1`, ...
    """

    kernels: dict[str, Kernel]
    error: str | None = None

    def only(self) -> Kernel:
        """The kernel of a variant that compiles and has one; an AssertionError otherwise."""
        assert self.error is None, self.error
        assert len(self.kernels) == 1, f"kernels: {', '.join(self.kernels)}"
        return next(iter(self.kernels.values()))


@functools.cache
def available() -> str | None:
    """Why nothing can be compiled here, or None."""
    versions = {}
    for name in ("jax", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed"
    if len(set(versions.values())) > 1:
        return f"versions differ: {versions}"
    if tuple(map(int, versions["jax"].split(".")[:2])) < (0, 11):
        return f"jax {versions['jax']}: needs 0.11 or later"
    missing = [name for name in ("ptxas", "nvdisasm") if tool(name) is None]
    return f"not found: {', '.join(missing)}" if missing else None


def compiles(test: Callable) -> Callable:
    """Marks a test with `compile`, and skips it with the reason where nothing can be compiled."""
    return pytest.mark.compile(pytest.mark.skipif(available() is not None, reason=str(available()))(test))


@functools.cache
def compile_variants(variants: Variants, target: str = "h200") -> dict[str, Compiled]:
    """Compiles all that `variants()` gives for a device in `TARGETS`, in another process.

    Raises:
        RuntimeError: the process ended before it came to a variant.
    """
    done: dict[str, Compiled] = {}
    while missing := [name for name in variants() if name not in done]:
        with tempfile.TemporaryDirectory() as folder:
            end, results, log = _work(variants, target, missing, Path(folder))
        if not results:
            raise RuntimeError(f"compiling for {target} ended with {end}: {log}")
        # What was begun and has no result ended the process; another one goes on behind it.
        crash = {"kernels": {}, "error": f"the process ended with {end}: {log}"}
        for name, result in results.items():
            kernels, error = (result or crash).values()
            done[name] = Compiled({key: Kernel(**value) for key, value in kernels.items()}, error)
    return done


def _work(variants: Variants, target: str, names: list[str], folder: Path) -> tuple[int, dict[str, Any], str]:
    """The worker's exit status, what it found for each variant that it began (None: did not finish), and its log."""
    environment = os.environ | {
        # LLVM would write a symbolized stack trace with each of Triton's remarks: a second a matrix product.
        "LLVM_DISABLE_SYMBOLIZATION": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what it gives back is not dumped
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}/dump --xla_dump_emitter_re=ptx",
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_TO": f"{folder}/dump",
    }
    source, worker = inspect.getsourcefile(variants), Path(__file__).with_name("sass_worker.py")
    command = [sys.executable, str(worker), str(source), variants.__name__, target, str(folder), *names]
    results, log = folder / "results", folder / "log"
    results.touch()
    with log.open("a") as output:
        run = subprocess.run(command, env=environment, stdout=output, stderr=output)
    return run.returncode, dict(map(json.loads, results.read_text().splitlines())), log.read_text()[-4000:]


def slots(loop: Iterable[str]) -> int:
    """Issue slots of one warp: one an instruction, two for conversions, which run at half the rate."""
    return sum(2 if opcode(text).split(".")[0] in ("I2F", "F2F", "F2I", "I2I") else 1 for text in loop)


def loads(loop: Iterable[str]) -> Counter[int | str]:
    """How many loads from global memory a thread issues, by their width in bytes or `BULK`."""
    return Counter(width for text in loop if (width := _load_width(opcode(text))) is not None)


def _load_width(opcode: str) -> int | str | None:
    name, *modifiers = opcode.split(".")
    if name in ("UTMALDG", "UBLKCP"):
        return BULK
    if name not in ("LDG", "LDGSTS", "LD"):
        return None
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[modifier] for modifier in modifiers if modifier in widths), 4)


def opcode(text: str) -> str:
    """An instruction's name with its modifiers, without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is: in NVIDIA's wheels, else on the path."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = [str(path) for folder in folders or () for path in Path(folder).glob(f"*/bin/{name}")]
    return found[0] if found else shutil.which(name)
