"""Tests of _triton/compiled.py, which launches compiled kernels. Triton's launcher calls a stub of the CUDA driver.

`compiled.known` contains the compiled kernels of earlier launches. A launch that matches an entry bypasses Triton's inspection
of the arguments.
"""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from vix_kernels.measure import host_time
from vix_kernels.testing import SPECS

PUBLIC = [name for name, spec in SPECS.items() if spec.public]


def in_process(check: str) -> None:
    """Run a function from this module in a process in which Triton finds only the stub driver."""
    with host_time.stub_environment() as (environment, stub):
        if not stub:
            pytest.skip("there is no C compiler for the stub driver")
        code = f"from tests import test_compiled; test_compiled.{check}()"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "check",
    [
        "check_arguments",
        "check_replays",
        "check_keys",
        "check_devices",
        "check_hooks",
        "check_knobs",
        "check_size",
        "check_threads",
        "check_unloading",
    ],
)
def test_in_a_process_with_the_stub_driver(check: str) -> None:
    in_process(check)


streams: list[tuple] = []  # the arguments of each call to Triton's launcher, including the stream


@contextmanager
def recorded() -> Iterator[list[tuple]]:
    """Yield a list that collects the arguments of Triton's launcher: grid, function, metadata and kernel arguments."""
    from triton.backends.nvidia.driver import CudaLauncher

    calls: list[tuple] = []
    original = CudaLauncher.__call__

    def call(launcher, *args):
        _, enter, leave = args[6:9]
        calls.append((args[:3], args[4], args[5], args[9:]))
        streams.append(args)
        assert enter is leave is None or (enter is not None and leave is not None)
        return original(launcher, *args)

    CudaLauncher.__call__ = call
    try:
        host_time.set_driver(stub=True)
        with host_time.launches("triton"):
            yield calls
    finally:
        CudaLauncher.__call__ = original


def check_arguments() -> None:
    """A repeated launch passes the same arguments as a launch by Triton, except that tensors are passed as addresses."""
    from vix_kernels import plans
    from vix_kernels._triton import compiled

    with recorded() as calls, patch.object(plans, "on_gpu", lambda *args, **kwargs: False):
        for op in PUBLIC:
            run = host_time.operator_calls(SPECS[op])["both"]
            run()
            entries = len(compiled.known)
            del calls[:]
            with patch.object(compiled, "run", lambda kernel, grid, args, meta: kernel[grid](*args, **meta)):
                run()
            first = calls[:]
            del calls[:]
            run()
            assert len(first) == len(calls) > 0 and len(compiled.known) == entries, op
            for before, after in zip(first, calls, strict=True):
                assert before[:3] == after[:3], op
                for x, y in zip(before[3], after[3], strict=True):
                    assert isinstance(y, int) if isinstance(x, Tensor) else type(x) is type(y) and x == y, (op, x, y)


def check_replays() -> None:
    """A replayed call launches the same kernels with the same arguments, except for tensor addresses."""
    from triton import knobs
    from triton.runtime.driver import driver

    from vix_kernels import plans

    def pattern(args: list) -> list:
        """Replace each address with a pair: its index among the addresses, and its remainder modulo 16."""
        addresses = [x for x in args if type(x) is int and x > 2**32]
        return [(addresses.index(x), x % 16) if type(x) is int and x > 2**32 else x for x in args]

    seen = []
    with recorded() as calls:
        for op in PUBLIC:
            for run in host_time.operator_calls(SPECS[op]).values():
                with patch.object(plans, "on_gpu", lambda *args, **kwargs: False):
                    run()
                    del calls[:]
                    run()
                expected = calls[:]
                for _ in range(2):
                    run()
                del calls[:]
                with (
                    patch.object(plans, "record", None),
                    patch.object(driver.active, "get_current_stream", lambda device: 7),
                ):
                    run()
                assert len(calls) == len(expected) > 0, op
                for before, after in zip(expected, calls, strict=True):
                    assert before[:3] == after[:3], op
                    # Skip empty tensors. Their address is 0 in an ordinary call, but not in a replay.
                    both = [(x, y) for x, y in zip(before[3], after[3], strict=True) if x != 0 or y < 2**32]
                    assert pattern([x for x, _ in both]) == pattern([y for _, y in both]), op
                assert {args[3] for args in streams[-len(calls) :]} == {7}
                knobs.runtime.launch_enter_hook.add(seen.append)
                del seen[:]
                run()
                knobs.runtime.launch_enter_hook.remove(seen.append)
                assert len(seen) == len(expected), op


def broadcast(q: Tensor, scale: float = 0.5) -> None:
    from vix_kernels.primitives import broadcast as operator

    slots, values = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    operator(q, slots, values, scale=scale, backend="triton")


def check_keys() -> None:
    """A new alignment, dtype, size, scalar value or scalar type adds an entry to `compiled.known`. New tensor values do not."""
    from vix_kernels._triton import compiled

    def entries(q: Tensor, scale: float = 0.5) -> int:
        broadcast(q, scale)
        return len(compiled.known)

    with recorded(), torch.no_grad():
        q = torch.randn(1, 2, 32, 16, dtype=torch.bfloat16)
        assert entries(q) == 1 and entries(q.clone()) == 1
        shifted = torch.randn(2 * 32 * 16 + 1, dtype=torch.bfloat16)[1:].view(1, 2, 32, 16)
        assert entries(shifted) == 2
        assert entries(q.half()) == 3
        assert entries(q[:, :, :31]) == 4
        assert entries(q, 1.0) == 5 and entries(q, 1) == 6
        assert entries(q) == 6


def check_devices() -> None:
    """A launch with a tensor on a new device goes through Triton, which raises an error if the GPU cannot read the tensor."""
    from vix_kernels._triton import compiled

    class OnGpu(Tensor):
        def get_device(self) -> int:
            return 0

    with recorded(), torch.no_grad():
        q = torch.randn(1, 2, 32, 16, dtype=torch.bfloat16)
        broadcast(q)
        (key,) = compiled.known
        assert key.count(-1) == sum(isinstance(each, torch.dtype) for each in key)  # the device index of a CPU tensor is -1
        kernel, grid, args, meta = launched(q)
        compiled.run(kernel, grid, (args[0].as_subclass(OnGpu), *args[1:]), meta)
        assert len(compiled.known) == 2


def launched(q: Tensor) -> tuple:
    """Return the launch of `broadcast`: the kernel, grid, arguments and options."""
    from vix_kernels import conditions

    launches: list[tuple] = []
    with conditions.under(observer=lambda *launch: launches.append(launch)):
        broadcast(q)
    return launches[0]


def check_knobs() -> None:
    """Triton handles all launches while debugging or instrumentation is enabled or a hook is set.

    If a hook makes Triton skip the compilation, nothing is added to `compiled.known`.
    """
    from triton import knobs

    from vix_kernels._triton import compiled

    with recorded(), torch.no_grad():
        q = torch.randn(1, 2, 32, 16, dtype=torch.bfloat16)
        broadcast(q)
        kernel, grid, args, meta = launched(q)
        assert not compiled.needs_triton()
        for owner, name, value in (
            (knobs.runtime, "debug", True),
            (knobs.runtime, "add_stages_inspection_hook", lambda *stages: ("", "")),
            (knobs.compilation, "instrumentation_mode", "fpsan"),
            (knobs.runtime, "launch_enter_hook", print),
        ):
            with patch.object(owner, name, value):
                assert compiled.needs_triton(), name
        with patch.object(knobs.runtime, "launch_enter_hook", None):
            assert not compiled.needs_triton()
        compiled.known.clear()
        compiled.remember((1,), kernel, None, args, meta)
        assert not compiled.known
        with pytest.raises(TypeError, match="expected constexprs as keywords"):
            compiled.remember((1,), kernel, object(), args[:-1], meta)


def check_hooks() -> None:
    """Triton's launch hooks are called for every launch while they are set."""
    from triton import knobs

    seen = []
    hook = seen.append
    with recorded(), torch.no_grad():
        q = torch.randn(1, 2, 32, 16, dtype=torch.bfloat16)
        broadcast(q)
        knobs.runtime.launch_enter_hook.add(hook)
        broadcast(q)
        broadcast(q)
        knobs.runtime.launch_enter_hook.remove(hook)
        broadcast(q)
    assert len(seen) == 2


def check_size() -> None:
    """`compiled.known` never has more than MOST entries."""
    from vix_kernels._triton import compiled

    compiled.MOST = 3
    with recorded(), torch.no_grad():
        for tokens in range(20, 30):
            broadcast(torch.randn(1, 2, tokens, 16, dtype=torch.bfloat16))
            assert 0 < len(compiled.known) <= 3


def check_threads() -> None:
    """Launches from several threads raise no errors, even if `compiled.known` is full and is cleared."""
    from vix_kernels._triton import compiled

    compiled.MOST = 2
    errors: list[BaseException] = []

    def work(tokens: int) -> None:
        try:
            with torch.no_grad():
                for step in range(100):
                    broadcast(torch.randn(1, 2, tokens + step % 2, 16, dtype=torch.bfloat16))
        except BaseException as error:
            errors.append(error)

    with recorded() as calls:
        threads = [Thread(target=work, args=(20 + 4 * index,)) for index in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not errors and len(calls) == 800


def check_unloading() -> None:
    """A kernel stays loaded while it is in `compiled.known`, even if it is no longer in Triton's cache."""
    from vix_kernels._triton import compiled

    with recorded(), torch.no_grad():
        q = torch.randn(1, 2, 32, 16, dtype=torch.bfloat16)
        broadcast(q)
        kernel = launched(q)[0]
        (entry,) = compiled.known.values()
        alive = weakref.ref(entry.kernel)
        del entry
        kernel.device_caches.clear()
        gc.collect()
        assert alive() is not None
        broadcast(q)
        assert len(compiled.known) == 1
