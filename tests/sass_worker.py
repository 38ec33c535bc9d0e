"""The process behind `sass`: compiles a module's variants for a GPU that need not exist, and reads what came of it.

XLA and Mosaic dump every kernel's PTX (`sass` sets their flags). ptxas assembles it once more, because its log knows of
registers and spills. XLA calls the same ptxas, and Mosaic's own comes to the same instructions.
"""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from sass import TARGETS, Compiled, Kernel, Loop, Variants, opcode, tool


def main(source: str, function: str, target: str, folder: str, *names: str) -> None:
    """Compiles variants by name; writes lines of (name, null) before and (name, result) after each to `results`."""
    variants = load(source, function)()
    device = (TARGETS / f"{target}.textproto").read_text()
    dump, log = Path(folder) / "dump", Path(folder) / "log"
    with (Path(folder) / "results").open("w", buffering=1) as results:
        for name in names:
            results.write(json.dumps((name, None)) + "\n")
            shutil.rmtree(dump, ignore_errors=True)
            dump.mkdir()
            log.write_text("")
            try:
                result = Compiled(kernels(compile_for(device, *variants[name]), dump))
            except Exception:
                # MLIR says on stderr what it refuses; the exception often says no more than that it did.
                result = Compiled({}, traceback.format_exc()[-4000:] + log.read_text()[-4000:])
            results.write(json.dumps((name, dataclasses.asdict(result))) + "\n")


def load(source: str, function: str) -> Variants:
    """A function of a file that need not be importable by name, as tests are not."""
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, function)


def compile_for(device: str, f: Callable, shapes: tuple[Any, ...]) -> str:
    """Compiles for a device by its description; returns the StableHLO."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=device, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",))
    lowered.compile()
    return lowered.as_text()


def kernels(stablehlo: str, dump: Path) -> dict[str, Kernel]:
    """The Pallas kernels among those whose PTX lies in the dump.

    Raises:
        RuntimeError: a program without such kernels, or one of them is not in the dump.
    """
    triton = {
        re.sub(r"\W", "_", name) for name in re.findall(r'__gpu\$xla\.gpu\.triton.*?\bname = "([^"]+)"', stablehlo)
    }
    dynamic = dict(re.findall(r"(\w+) grid:.* shared_memory: (\d+) bytes", _read(dump.glob("*thunk_sequence.txt"))))
    found: dict[str, Kernel] = {}
    for path in sorted(dump.glob("*.ptx")):
        entry = next(iter(re.findall(r"\.entry (\w+)\(", path.read_text())), "")  # constants have a file without any
        if entry.endswith(suffix := "_mosaic_gpu_kernel"):
            name, shared = entry.removesuffix(suffix), _mosaic_shared(path)
        elif re.sub(r"__\d+$", "", entry) in triton:
            name, shared = entry, int(dynamic[entry])
        else:
            continue
        kernel = assemble(path, name, entry, shared)
        if name in found and found[name] != kernel:  # Mosaic names each as if there were no other
            name += f"__{sum(other.split('__')[0] == name for other in found)}"
        found[name] = dataclasses.replace(kernel, name=name)
    if lost := triton - set(found):
        raise RuntimeError(f"not in XLA's dump: {', '.join(lost)} (unused? XLA_FLAGS set by a module?)")
    if not found:
        raise RuntimeError("there is no Pallas kernel in it")
    return found


def _mosaic_shared(ptx: Path) -> int:
    passes = _read([ptx.with_suffix(".mlir-passes.log")])
    size = re.findall(r"dynamic_shared_memory_size (%\w+)", passes)[0]
    return int(re.findall(rf"{size} = arith\.constant (\d+) : i32", passes)[0])


def assemble(path: Path, name: str, entry: str, shared: int) -> Kernel:
    """What ptxas makes of one kernel's PTX, with so many bytes of shared memory that the launch asks for."""
    ptx, cubin = path.read_text(), path.with_suffix(".cubin")
    architecture = re.findall(r"^\s*\.target (\w+)", ptx, re.MULTILINE)[0]
    log = _call("ptxas", f"-arch={architecture}", "-v", str(path), "-o", str(cubin)).stderr
    log = log.partition(f"Function properties for {entry}\n")[2]
    stack, stores, reloads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)[:3])
    static = re.findall(r"Used \d+ registers.*?(\d+) bytes smem", log)
    listing = _call("nvdisasm", "-c", str(cubin)).stdout.partition(f".section\t.text.{entry},")[2]
    return Kernel(
        name=name,
        threads=int(re.findall(r"\.(?:req|max)ntid (\d+)", ptx)[0]),
        registers=int(re.findall(r"Used (\d+) registers", log)[0]),
        spilled_bytes=stores + reloads,
        stack_bytes=stack,
        shared_bytes=shared + sum(map(int, static[:1])),
        loops=find_loops(listing.partition(".section\t")[0]),
    )


def _call(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([str(tool(name)), *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)}: {run.stderr[-2000:]}")
    return run


def _read(paths: Iterable[Path]) -> str:
    return "".join(path.read_text() for path in paths)


def find_loops(listing: str) -> list[Loop]:
    """The natural loops of one function as nvdisasm prints it.

    Not by jumps backward: what waits for a barrier is laid out behind the function's end, and its jump back into the
    middle of the main loop is no loop.
    """
    code, labels = _parse(listing)
    after = [_successors(i, text, labels, len(code)) for i, text in enumerate(code)]
    before: list[list[int]] = [[] for _ in code]
    for i in (reached := _reach(after, 0)):
        for j in after[i]:
            before[j].append(i)
    bodies = []
    for head in (i for i in reached if len(before[i]) > 1):
        dominated = reached - _reach(after, 0, without=head)
        if ends := [i for i in before[head] if i in dominated]:
            bodies.append({head}.union(*(_reach(before, end, without=head) for end in ends)))
    own = [body.difference(*(other for other in bodies if other < body)) for body in bodies]
    return [[code[i] for i in sorted(body)] for body in own]


def _parse(listing: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and the index of the one behind each label."""
    code: list[str] = []
    labels = {}
    for line in listing.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(match[1])
    return code, labels


def _successors(i: int, text: str, labels: dict[str, int], count: int) -> list[int]:
    following = [i + 1] if i + 1 < count else []
    if re.match(r"(EXIT|RET)\b", text):
        return []
    # BRA.DIV leaves for code that gathers diverged lanes: none of these kernels lets them diverge.
    if not opcode(text).startswith(("BRA", "BRX")) or opcode(text).startswith("BRA.DIV"):
        return following
    targets = [labels[label] for label in re.findall(r"\.L_x_\d+", text) if label in labels]
    always = re.match(r"BRA(\.\w+)* `\(|BRX", text)
    return targets if always else targets + following


def _reach(edges: list[list[int]], start: int, without: int = -1) -> set[int]:
    seen: set[int] = set()
    todo = [start]
    while todo:
        if (i := todo.pop()) not in seen and i != without:
            seen.add(i)
            todo += edges[i]
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
