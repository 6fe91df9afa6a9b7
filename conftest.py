"""`pytest` runs the tests, `pytest --benchmark` the benchmarks."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vix_kernels")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks in bench/ instead of the tests")
    group.addoption(
        "--compiled", action="store_true", help="with --benchmark: torch.compile of plain PyTorch, too; compiling takes minutes"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install 'vix_kernels[bench]'")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        # Not rootpath: a file named after --benchmark-json counts where pytest looks for its root.
        config.args = [str(Path(__file__).parent / "bench")]
    config.pluginmanager.import_plugin("bench.plugin")
