"""Saving and loading of a PTuningV2Model: folders, and a state dict of nothing but what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast import checkpoint
from ptv2_fast.adapter import Adapter
from ptv2_fast.config import PTuningV2Config

if TYPE_CHECKING:
    from ptv2_fast.model import PTuningV2Model


class Persistence(nn.Module):
    """What a PTuningV2Model knows of saving; mixed into it.

    The state dict holds the adapters alone, with a description of themselves: Trainer's checkpoints
        therefore hold only what is trained, resume exactly, and can be read by `from_pretrained`.
    """

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        adapter_names: list[str] | None = None,
        format: str = "ptv2",
        **kwargs: Any,
    ) -> None:
        """Write adapters: a single one into the folder itself, several into a sub-folder each.

        Args:
            save_directory: a folder; created where it does not exist.
            adapter_names: which adapters; None means all.
            format: "ptv2", or "peft" for folders that `peft.PeftModel.from_pretrained` reads: prefix and shallow
                prompts as they are, deep ones as the prefix that they make.
            kwargs: arguments that save_pretrained has elsewhere; `is_main_process=False` writes
                nothing.

        Raises:
            ValueError: an adapter is unknown, the folder is a file, or PEFT cannot do what an adapter does; the
                message says why, and nothing is written.
        """
        if format not in ("ptv2", "peft"):
            raise ValueError(f"format must be 'ptv2' or 'peft'; got {format!r}")
        names = list(self.adapters) if adapter_names is None else list(adapter_names)
        for name in names:
            self._check_name(name)
        if not kwargs.get("is_main_process", True):
            return
        folders = {name: Path(save_directory) if len(names) == 1 else Path(save_directory) / name for name in names}
        if format == "peft":
            from ptv2_fast.interop.peft_export import save_peft

            return save_peft(cast("PTuningV2Model", self), folders)
        for name, folder in folders.items():
            adapter = self.adapters[name]
            description = checkpoint.describe(name, adapter.config, self.base_model)
            checkpoint.save_adapter(folder, description, adapter.state_dict())
        if len(names) > 1:
            # An adapter saved here by itself before would be the one that is loaded.
            checkpoint.remove_adapter(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload adapters with a model card; see `ptv2_fast.hub.push_to_hub` for what it takes."""
        from ptv2_fast.hub import push_to_hub

        return push_to_hub(cast("PTuningV2Model", self), repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        base: PreTrainedModel,
        load_directory: str | Path,
        *,
        is_trainable: bool = False,
        adapter_name: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> PTuningV2Model:
        """Rebuild the model that `save_pretrained` (or Trainer) wrote, over `base`.

        Args:
            base: a model of the architecture that the adapters were trained on.
            load_directory: a folder with one adapter, with a sub-folder per adapter, or a Trainer
                checkpoint; or the name of such a repository on the hub.
            is_trainable: whether the active adapter goes on training; otherwise everything is
                frozen and in eval mode.
            adapter_name: which adapter becomes active; None means the first. A folder with a single
                adapter gives it this name.
            revision, token: of the hub's repository.

        Raises:
            ValueError: nothing to load, a damaged or foreign checkpoint, an unknown version,
                another base, or tensors that do not fit; the message names the file or the tensor.
        """
        adapters = checkpoint.load_adapters(_found(load_directory, revision, token), base)
        if adapter_name is not None and len(adapters) == 1:
            adapters = {adapter_name: next(iter(adapters.values()))}
        first = adapter_name if adapter_name is not None else next(iter(adapters))
        if first not in adapters:
            raise ValueError(f"adapter_name must be one of {', '.join(adapters)}; got {adapter_name!r}")
        return assembled(base, adapters, first, is_trainable=is_trainable)

    def load_adapter(
        self, load_directory: str | Path, adapter_name: str, *, is_trainable: bool = False
    ) -> None:
        """Add the single adapter of a folder, or of a hub's repository, under a name.

        `is_trainable` makes it the active one.

        Raises:
            ValueError: as `from_pretrained`, or the folder holds several adapters, or the name is
                taken.
        """
        found = checkpoint.load_adapters(_found(load_directory), self.base_model)
        if len(found) != 1:
            raise ValueError(f"load_directory must hold one adapter; got {', '.join(found)}")
        self._check_unused(adapter_name)
        adapter = _rebuild(self.base_model, adapter_name, *next(iter(found.values())))
        self._check_alike(adapter.config)
        self._take(adapter_name, adapter)
        if is_trainable:
            self.set_adapter(adapter_name)

    def state_dict(  # type: ignore[override]  # torch's overloads are of positional arguments that it deprecates
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The adapters' tensors and their description; the frozen base is left out."""
        state = self.adapters.state_dict(
            destination=destination, prefix=f"{prefix}adapters.", keep_vars=keep_vars
        )
        descriptions = [
            checkpoint.describe(name, adapter.config, self.base_model)
            for name, adapter in self.adapters.items()
        ]
        state[prefix + checkpoint.DESCRIPTION_KEY] = checkpoint.pack_description(descriptions)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; the base keeps its weights."""
        own = {k: v for k, v in state_dict.items() if k != checkpoint.DESCRIPTION_KEY}
        result = super().load_state_dict(own, strict=False, assign=assign)
        kept = [key for key in result.missing_keys if not key.startswith("base_model.")]
        result.missing_keys[:] = kept
        if strict and (kept or result.unexpected_keys):
            raise RuntimeError(
                f"state_dict does not fit: missing {kept}, unexpected {result.unexpected_keys}"
            )
        return result


def _found(load_directory: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    if Path(load_directory).is_dir():
        return Path(load_directory)
    from ptv2_fast.hub import adapter_folder

    return adapter_folder(load_directory, revision=revision, token=token)


def assembled(
    base: PreTrainedModel, adapters: Mapping[str, tuple], first: str, *, is_trainable: bool
) -> PTuningV2Model:
    """A model of ready adapters over a base, the one named `first` active.

    Args:
        adapters: name -> (configuration, tensors), as `checkpoint.load_adapters` gives them.
        is_trainable: whether `first` goes on training; otherwise everything is frozen and in eval mode.

    Raises:
        ValueError: adapters, base and each other do not fit together.
    """
    from ptv2_fast.tasks import MODEL_CLASSES

    # Everything is built and checked before the base is touched.
    built = {name: _rebuild(base, name, *parts) for name, parts in adapters.items()}
    config = adapters[first][0]
    model = MODEL_CLASSES[config.task_type](base, config, first, adapter=built.pop(first))
    for name, adapter in built.items():
        model._check_alike(adapter.config)
        model._take(name, adapter)
    if is_trainable:
        model.set_adapter(first)
    else:
        model.requires_grad_(False)
        model.eval()
    return model


def _rebuild(base: PreTrainedModel, name: str, config: PTuningV2Config, tensors: dict[str, Tensor]) -> Adapter:
    """An adapter with the given tensors.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    adapter = Adapter(base, config)
    expected = adapter.state_dict()
    if set(expected) != set(tensors):
        missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ValueError(f"adapter {name!r}: tensors missing {missing}, unknown {unknown}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"adapter {name!r}: {key} must have shape {tuple(expected[key].shape)}; "
                f"got {tuple(tensor.shape)}"
            )
    adapter.load_state_dict(tensors)
    return adapter
