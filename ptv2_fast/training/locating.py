"""Where a base is, before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path


def locate(name: str | Path) -> tuple[str, dict[str, str]]:
    """What transformers' loaders take for a name: (folder or hub name, further keyword arguments).

    Raises:
        FileNotFoundError: the name looks like a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model {path} must be a GGUF file; there is none")
        return str(path.resolve().parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model {path} must be a folder with config.json; there is none in it")
        return str(path.resolve()), {}
    if path.exists() or path.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
        raise FileNotFoundError(f"model {path} must be a model folder, a .gguf file or a name on the hub")
    return str(name), {}


def check_base(name: str | Path) -> None:
    """Refuse a base that is not there, or whose configuration is no JSON; what is on the hub is not looked at.

    Raises:
        FileNotFoundError: as `locate`.
        ValueError: see above.
    """
    source, options = locate(name)
    config = Path(source) / "config.json"
    if options or not config.is_file():
        return
    try:
        values = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise not_loaded(name, ValueError(f"{config} is not JSON: {error}")) from error
    if not isinstance(values, dict):
        raise not_loaded(name, ValueError(f"{config} must hold a JSON object; got {type(values).__name__}"))


def not_loaded(name: str | Path, error: Exception) -> ValueError:
    """What to say where transformers cannot load a model: its own words, in one line."""
    reason = " ".join(str(error).split())
    if not isinstance(error, OSError | ValueError | KeyError | ImportError) or not reason:
        reason = f"{type(error).__name__}{': ' if reason else ''}{reason}"
    return ValueError(f"model {str(name)!r} could not be loaded: {reason}")
