"""Pytest options. `pytest` runs the tests, and `pytest --benchmark` runs the benchmarks."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vix_kernels")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks in bench/ instead of the tests")
    group.addoption(
        "--compiled", action="store_true", help="with --benchmark: also time plain PyTorch with torch.compile (takes minutes)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install 'vix_kernels[bench]'")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        # config.rootpath is unreliable: pytest also considers a path after --benchmark-json when it determines the root.
        config.args = [str(Path(__file__).parent / "bench")]
    config.pluginmanager.import_plugin("bench.plugin")
