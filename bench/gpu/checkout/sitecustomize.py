"""Make `vix_kernels.models` importable from a checkout that is not installed, if this folder is on PYTHONPATH.

Subprocesses inherit PYTHONPATH, so the import also works in them. In the repository, the package is the top-level folder
`models/`, which is installed as `vix_kernels.models`.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

MODELS = Path(__file__).resolve().parents[3] / "models"


class ModelsFinder(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "vix_kernels.models":
            return None
        return spec_from_file_location(name, MODELS / "__init__.py", submodule_search_locations=[str(MODELS)])


sys.meta_path.insert(0, ModelsFinder())
