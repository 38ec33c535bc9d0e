"""The compiled decode loop: a donated cache is written in place, and nothing as large as its buffers is copied."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from small import CONFIG

from lmmjax import engine, llava
from lmmjax.plan import CacheFormat, Plan, uniform
from lmmjax.sample import GREEDY

ROOM = 2048
LONG = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, head_dim=16, context=4096))
APART = dataclasses.replace(uniform(LONG.text, bits=4), cache=CacheFormat(visual_values="tokens", sinks=4, window=64))
PLANS: dict[str, Plan | None] = {
    "no plan": None,
    "16": uniform(LONG.text),
    **{str(bits): uniform(LONG.text, bits=bits) for bits in (8, 6, 4, 3, 2)},
    "before RoPE": uniform(LONG.text, bits=4, cache=CacheFormat(keys="before_rope", metadata="float8")),
    "parts and window": APART,
}
NAMES = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "uint16": "u16",
    "float8_e4m3fn": "f8e4m3fn",
}


def empty_state(plan: Plan | None, rows: int = 3) -> engine.State:
    params = llava.init(LONG, jax.random.key(0))
    return engine.State(
        cache=engine.new_cache(LONG, params, plan, rows, ROOM, images=64),
        answer=jnp.zeros((rows, ROOM), jnp.int32),
        counts=jnp.ones(rows, jnp.int32),
        limits=jnp.full(rows, 100),
        done=jnp.zeros(rows, bool),
        keys=jax.random.split(jax.random.key(0), rows),
        sampling=GREEDY.typed(),
        eos=jnp.array([], jnp.int32),
    )


@pytest.mark.parametrize("name", PLANS)
def test_no_buffer_of_the_cache_is_copied_in_a_decode_step(name):
    state = jax.eval_shape(lambda: empty_state(PLANS[name]))
    params = jax.eval_shape(lambda: llava.init(LONG, jax.random.key(0)))
    compiled = engine.decode.lower(LONG, params, state, jnp.asarray(5), None).compile()
    # A ring and the sinks are a few tokens, whatever the context.
    long = [leaf for leaf in jax.tree.leaves(state.cache.layers) if max(leaf.shape[2:]) > 200]
    assert len(long) >= 4
    for leaf in long:
        shape = re.escape(f"{NAMES[str(leaf.dtype)]}[{','.join(map(str, leaf.shape))}]")
        assert not re.findall(rf"= {shape}\S* (?:copy|transpose|copy-start)\(.*", compiled.as_text())
    assert compiled.memory_analysis().alias_size_in_bytes >= state.cache.nbytes


def test_the_test_above_finds_a_copy():
    """The same look at a program that keeps its input: there the buffer is copied before it is written."""

    def keep_and_write(buffer):
        return buffer, buffer.at[0].set(1)

    text = jax.jit(keep_and_write).lower(jnp.zeros((300, 7))).compile().as_text()
    assert re.findall(r"= f32\[300,7\]\S* (?:copy|transpose|copy-start)\(.*", text)
