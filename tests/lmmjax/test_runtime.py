"""What a command sets up: the user's own settings win, and compile time is counted once."""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lmmjax import runtime


def test_the_users_settings_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    before = jax.config.values["jax_compilation_cache_dir"]
    runtime.prepare()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] == ""
    assert jax.config.values["jax_compilation_cache_dir"] == before


def test_a_gpu_is_not_taken_whole_and_programs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("LMMJAX_CACHE", str(tmp_path))
    runtime.prepare()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert told["jax_compilation_cache_dir"] == str(tmp_path / "xla")


def test_nested_compilations_are_counted_once():
    """JAX reports what is traced within another trace before that one, which contains it."""
    before = runtime.compile_seconds()
    time.sleep(0.5)  # so that what is reported lies behind all that was
    for duration in (0.001, 0.4):
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", duration)
    assert runtime.compile_seconds() - before == pytest.approx(0.4)


def test_what_is_compiled_is_counted_and_what_is_not_is_not():
    program = jax.jit(lambda x: jnp.where(x > 0, jnp.sin(x) @ x, -x))
    before, began = runtime.compile_seconds(), time.perf_counter()
    jax.block_until_ready(program(jnp.ones((4, 4))))
    wall = time.perf_counter() - began
    assert 0 < runtime.compile_seconds() - before <= wall
    before = runtime.compile_seconds()
    jax.block_until_ready(program(jnp.ones((4, 4))))
    assert runtime.compile_seconds() == before
