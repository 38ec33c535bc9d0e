"""What tests of several packages share: random tiny checkpoints, written without torch."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoints import hf_config, random_tensors, write_hf

from convert import hf
from lmmjax import engine, orders
from lmmjax.checkpoint import load, save
from lmmjax.linears import kernels_of, with_kernels
from lmmjax.llava import Params

# Tests compile much and compute little: without XLA's expensive passes the suite takes less than half the time, and
# without its emitters of fusions, which go through MLIR, three quarters of that. On a GPU they prove what users run.
# XLA reads the environment once, with the backend: processes that tests start are as a user's.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the suite's own processes share a GPU
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    jax.local_devices()
    del os.environ["XLA_FLAGS"]
jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a random Hugging Face LLaVA checkpoint and returns its directory.

    `hf_checkpoint()` has 4 tokens an image (28 pixels, patch 14, image token 3), a tower of 3 layers, a decoder
    of 2 layers with 4 query and 2 kv heads, 264 vocabulary rows and a context of 128; a tokenizer of single
    bytes, a chat template and an image preprocessor. Keyword arguments: `layout` (a key of
    tiny_checkpoints.LAYOUTS), `dtype`, `seed`, `shards`, and changes of config.json (`text={...}`,
    `vision={...}`, top-level attributes). Tests that damage it copy it first.
    """

    def write(layout: str = "hub", dtype: str = "float32", seed: int = 0, shards: int = 1, **changes) -> Path:
        directory = tmp_path_factory.mktemp("hf") / "model"
        config = hf_config(**changes)
        write_hf(directory, config, random_tensors(config, seed, dtype), layout=layout, shards=shards)
        return directory

    return write


@pytest.fixture(scope="session")
def checkpoint(hf_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an lmmjax checkpoint: `hf_checkpoint()`, converted. Read only; `lmmjax.checkpoint.load` it."""
    target = tmp_path_factory.mktemp("lmmjax") / "model"
    hf.convert(hf_checkpoint(), target)
    return target


@pytest.fixture(scope="session")
def pruned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`checkpoint` as it is ("dense") and with half of its weights zero, the smaller: of an output, or of each four.

    "permuted" has the zeros of 2:4 in random orders of inputs, each linear in its own.
    """
    stored, paths = load(checkpoint).params, {"dense": checkpoint}
    for name, most in (("bitmap", None), ("2:4", 4), ("permuted", 4)):
        of_layer = [_orders(stored["text"][f"layers_{i}"], i if name == "permuted" else None) for i in range(2)]
        layers = {f"layers_{i}": _halved(stored["text"][f"layers_{i}"], most, of_layer[i]) for i in range(2)}
        paths[name] = tmp_path_factory.mktemp("pruned") / "model"
        save(paths[name], stored | {"text": stored["text"] | layers}, like=checkpoint, plan=None)
        if name == "permuted":
            named = {orders.name_of(i, linear): order for i in range(2) for linear, order in of_layer[i].items()}
            for file, content in orders.as_file(named).items():
                (paths[name] / file).write_bytes(content)
    return paths


def _orders(layer: Params, seed: int | None) -> dict[str, np.ndarray]:
    """An order of inputs for each linear, as they are without a seed."""
    rng = np.random.default_rng(seed)
    sizes = {name: len(kernel) for name, kernel in kernels_of(layer).items()}
    return {name: np.arange(size) if seed is None else rng.permutation(size) for name, size in sizes.items()}


def _halved(layer: Params, together: int | None, of_linear: dict[str, np.ndarray]) -> Params:
    """The smaller half of all inputs of an output dropped, or of each so many of an order."""
    kernels = {}
    for name, kernel in kernels_of(layer).items():
        size = np.abs(np.asarray(kernel))[of_linear[name]].reshape(-1, together or len(kernel), kernel.shape[1])
        kept = (size.argsort(1).argsort(1) >= size.shape[1] // 2).reshape(kernel.shape)
        kernels[name] = kernel * kept[of_linear[name].argsort()]
    return with_kernels(layer, kernels)


@pytest.fixture
def interrupt_second_decode(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after whose call the engine's second decode is met by Ctrl-C."""
    decode, calls = engine.decode, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args)

    return lambda: monkeypatch.setattr(engine, "decode", interrupted)
