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
# For the tests that shard. JAX must know before it starts, so all have them; that costs the others nothing measurable.
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile much and run little: with these flags XLA takes less than half the time to compile them. It stops at a
# flag that it does not know. JAX 0.8.1, 0.9, 0.10 and 0.11 take both. 0.12 has dropped the first, and neither the
# second nor what else it has (optimisation level, FAST_COMPILE, cheaper passes) makes a difference there.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 12):
    fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()

# A test that calls the library inside `jax.jit` compiles two or three programs. One that calls it step by step compiles
# each primitive for each shape, which is what most of the time of a test goes to. Examples in docstrings may: they are
# short. The README is one item, so it has no limit.
MOST_COMPILATIONS = {"test": 30, "docstring": 100}
_compilations = 0
_before = pytest.StashKey[int]()
_peaks = []
_start = time.perf_counter()


def _count(event: str, duration_secs: float, **_):
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One process runs all tests of a file unless they say otherwise, since they share programs."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    item.stash[_before] = _compilations
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a test that compiles more than its budget, fixtures included: the first user of a program pays for it."""
    result = yield
    count = _compilations - item.stash[_before]
    item.user_properties.append(("compilations", count))
    most = MOST_COMPILATIONS["docstring" if isinstance(item, pytest.DoctestItem) else "test"]
    exempt = item.path.suffix == ".md" or item.get_closest_marker("many_compilations") is not None
    if count > most and not exempt:
        pytest.fail(
            f"{count} XLA compilations, at most {most}: call the library inside jax.jit, or say why not by"
            ' @pytest.mark.many_compilations("reason")',
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
        count = dict(call.user_properties).get("compilations", 0)
        terminalreporter.write_line(f"{call.duration:8.2f} s {count:4d} compilations {call.nodeid}")


def _peak():
    """The most memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
