"""Makes transformers' Auto classes know adapters as soon as they are loaded, without loading them; knows names only."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

# Importing ours registers with theirs; torch and transformers' models are slow to import, so this waits for the user.
_REGISTERS = {
    "transformers.models.auto.configuration_auto": "hf_adaptive_decode.configuration",
    "transformers.models.auto.modeling_auto": "hf_adaptive_decode.modeling",
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the Auto modules as usual and imports our side of the registration when they have run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _REGISTERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            sys.modules[name] = module
            importlib.import_module(_REGISTERS[name])

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Registers at once where transformers' Auto modules are loaded, and as they load otherwise."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for theirs, ours in _REGISTERS.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
