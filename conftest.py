"""Doctests see what their reader would have imported, in the precision of the tests; what every test may cost."""

import os
import resource
import sys
import time

import jax
import jax.monitoring
import jax.numpy as jnp
import optax
import pytest

import curvax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile much and run little: with these two flags XLA compiles them three times as fast. XLA stops at a flag
# that it does not know, so they are given to the versions that they were tried with alone.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__[:2] == (0, 10):
    fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()

# A test that calls the library inside `jax.jit` compiles two or three programs. One that calls it step by step compiles
# each primitive for each shape, which is what most of the time of a test goes to.
MOST_COMPILATIONS = 30
_compilations = 0
_before = pytest.StashKey[int]()
_peaks = []
_start = time.perf_counter()


def _count(event, _, **__):
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, curvax=curvax)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
    """Compiled programs live as long as the module that made them: all of them together would take gigabytes."""
    yield
    jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    item.stash[_before] = _compilations
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a test that compiles more than its budget, its fixtures included: the first user of a cache pays for it."""
    result = yield
    count = _compilations - item.stash[_before]
    item.user_properties.append(("compilations", count))
    if count > MOST_COMPILATIONS and item.get_closest_marker("many_compilations") is None:
        pytest.fail(
            f"{count} XLA compilations, at most {MOST_COMPILATIONS}: call the library inside jax.jit, or say why not"
            ' by @pytest.mark.many_compilations("reason")',
            pytrace=False,
        )
    return result


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = _peak()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _peaks.append(getattr(node, "workeroutput", {}).get("peak", 0.0))


def pytest_terminal_summary(terminalreporter, config):
    seconds, peak = time.perf_counter() - _start, max([_peak(), *_peaks])
    terminalreporter.write_line(f"{seconds:.0f} s; the largest process took {peak:.2f} GiB")
    if config.option.durations is None:
        return
    calls = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.when == "call"]
    for call in sorted(calls, key=lambda call: -call.duration)[: config.option.durations or None]:
        count = dict(call.user_properties)["compilations"]
        terminalreporter.write_line(f"{call.duration:8.2f} s {count:4d} compilations {call.nodeid}")


def _peak():
    """The most memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
