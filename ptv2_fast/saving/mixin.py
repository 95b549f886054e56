"""Saving and loading of a PTuningV2Model: folders, and a state dict of nothing but what is trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from ptv2_fast.adapter import Adapter, check_tensors
from ptv2_fast.adapter_set import AdapterSet
from ptv2_fast.backbone.sharded_weights import is_sharded, whole_of
from ptv2_fast.saving import checkpoint
from ptv2_fast.storage.tensors import FLOATS

M = TypeVar("M", bound="Persistence")

# What save_pretrained takes elsewhere, and the values that say what happens here anyway.
_AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True, None),
    "push_to_hub": (False, None),
    "max_shard_size": (None,),
    "variant": (None,),
    "token": (None,),
}


class Persistence(AdapterSet):
    """Saving and loading of a set of adapters; what a PTuningV2Model knows of it.

    The state dict holds the adapters alone, with a description of themselves: Trainer's checkpoints therefore hold only
    what is trained, resume exactly, and can be read by `from_pretrained`.
    """

    @classmethod
    @abstractmethod
    def of_adapters(
        cls: type[M], base: PreTrainedModel, adapters: Mapping[str, tuple], first: str, *, is_trainable: bool
    ) -> M:
        """A model with ready adapters over a base, the one named `first` active; PTuningV2Model says how."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        adapter_names: Sequence[str] | None = None,
        format: str = "ptv2",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters: a single one into the folder itself, several into a sub-folder each.

        All files are switched at once: killed at any moment, the folder holds the old save or the new one. What an
        earlier save of several adapters left there and the model no longer has is removed.

        Args:
            save_directory: a folder; created where it does not exist.
            adapter_names: which adapters; None means all.
            format: "ptv2", or "peft" for folders that `peft.PeftModel.from_pretrained` reads: prefix and shallow
                prompts as they are, deep ones as the prefix that they make.
            is_main_process: whether this process writes. Of prompts that FSDP2 has sharded each process brings its
                part, so all of them call this.
            state_dict: tensors to write instead of the model's own, named as `state_dict()` names them (what
                `accelerator.get_state_dict(model)` gathers); not with format "peft".
            save_function: None, or accelerate's `accelerator.save`, which means: on the main process alone. Files are
                safetensors in any case.
            kwargs: arguments that save_pretrained has elsewhere, at values that ask for nothing else.

        Raises:
            ValueError: an adapter is unknown, the folder is a file, parameters of the base train, an argument asks for
                what does not happen, or PEFT cannot do what an adapter does; the message says why, and nothing is
                written.
        """
        if format not in ("ptv2", "peft"):
            raise ValueError(f"format must be 'ptv2' or 'peft'; got {format!r}")
        _check_asked(format, state_dict, save_function, kwargs)
        names = list(self.adapters) if adapter_names is None else list(dict.fromkeys(adapter_names))
        if isinstance(adapter_names, str) or not names:
            raise ValueError(f"adapter_names must be a list of at least one name, or None; got {adapter_names!r}")
        for name in names:
            self._check_name(name)
        writes = is_main_process and getattr(getattr(save_function, "__self__", None), "is_main_process", True)
        # FSDP2 takes the parts apart for a state dict alone: between a forward and its backward parameters are whole.
        if not writes and not any(is_sharded(tensor) for tensor in self.adapters.state_dict().values()):
            return
        self._check_frozen()
        if format == "peft":
            from ptv2_fast.saving.peft_export import save_peft

            return save_peft(self, Path(save_directory), names)
        parts = {}
        for name in names:
            adapter = self.adapters[name]
            own = adapter.state_dict()
            tensors = own if state_dict is None else _given(name, own, state_dict)
            whole = {key: whole_of(tensor) for key, tensor in tensors.items()}
            parts[name] = checkpoint.part_of(self._described(name), whole)
        if not writes:
            return
        checkpoint.save_adapters(save_directory, parts, list(self.adapters))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Create the hub's repository where it does not exist and upload adapters with a model card, in one commit.

        What is pushed is what the repository then holds: the commit removes adapters that an earlier push left there.

        Args:
            repo_id: the repository, "name" or "owner/name".
            kwargs: adapter_names, a list (None means all); metrics, name -> value of a single adapter, for the card;
                private; token; revision; commit_message.

        Returns:
            The hub's description of the commit.

        Raises:
            ValueError: as `save_pretrained`; nothing is created then.
        """
        from ptv2_fast.saving.hub import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls: type[M],
        base: PreTrainedModel,
        load_directory: str | Path,
        *,
        is_trainable: bool = False,
        adapter_name: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> M:
        """Rebuild the model that `save_pretrained` (or Trainer) wrote, over `base`.

        A copied head has the size and label names that it was saved with, whatever the base's own head has;
        `model.config` says them while the adapter is active, and the base's configuration stays as it is.

        Args:
            base: a model of the architecture that the adapters were trained on.
            load_directory: a folder with one adapter, with a sub-folder per adapter, or a Trainer
                checkpoint; or the name of such a repository on the hub.
            is_trainable: whether the active adapter goes on training; otherwise everything is
                frozen and in eval mode.
            adapter_name: which adapter becomes active; None means the first. A folder with a single
                adapter gives it this name.
            revision: of the hub's repository: a branch, a tag or a commit.
            token: for the hub, where the repository is private.

        Raises:
            ValueError: nothing to load, a damaged or foreign checkpoint, an unknown version,
                another base, or tensors that do not fit; the message names the file or the tensor.
        """
        folder = _found(load_directory, revision, token)
        adapters = checkpoint.load_adapters(folder, base)
        if adapter_name is not None and len(adapters) == 1:
            adapters = {adapter_name: next(iter(adapters.values()))}
        first = adapter_name if adapter_name is not None else next(iter(adapters))
        if first not in adapters:
            raise ValueError(f"adapter_name must be one of {', '.join(adapters)}; got {adapter_name!r}")
        with _named(folder):
            return cls.of_adapters(base, adapters, first, is_trainable=is_trainable)

    def load_adapter(self, load_directory: str | Path, adapter_name: str, *, is_trainable: bool = False) -> None:
        """Add the single adapter of a folder, or of a hub's repository, under a name.

        Args:
            load_directory: a folder, or a repository's name, with one adapter.
            adapter_name: what it is called here.
            is_trainable: whether it becomes the active one, and trains.

        Raises:
            ValueError: as `from_pretrained`, or the folder holds several adapters, or the name is
                taken.
        """
        folder = _found(load_directory)
        found = checkpoint.load_adapters(folder, self.base_model)
        if len(found) != 1:
            raise ValueError(f"load_directory must hold one adapter; got {', '.join(found)}")
        self._check_unused(adapter_name)
        with _named(folder):
            adapter = Adapter.from_tensors(self.base_model, adapter_name, *next(iter(found.values())))
        self._register(adapter_name, adapter)
        if is_trainable:
            self.set_adapter(adapter_name)

    def state_dict(  # type: ignore[override]  # torch's overloads are of positional arguments that it deprecates
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The adapters' tensors and their description; the frozen base is left out.

        Raises:
            ValueError: parameters of the base train, which would be lost.
        """
        self._check_frozen()
        state = self.adapters.state_dict(destination=destination, prefix=f"{prefix}adapters.", keep_vars=keep_vars)
        descriptions = [self._described(name) for name in self.adapters]
        state[prefix + checkpoint.DESCRIPTION_KEY] = checkpoint.pack_description(descriptions)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; the base keeps its weights.

        Raises:
            RuntimeError: a tensor is missing, unknown (both with `strict`), of another shape, or no floating point.
        """
        own = {k: v for k, v in state_dict.items() if k != checkpoint.DESCRIPTION_KEY}
        ours = {k: v for k, v in own.items() if k.startswith("adapters.") and isinstance(v, Tensor)}
        wrong = [f"{k} is {v.dtype}" for k, v in ours.items() if v.dtype not in FLOATS]
        if wrong:
            raise RuntimeError(f"state_dict does not fit: {', '.join(wrong[:5])}, where floating point is expected")
        result = super().load_state_dict(own, strict=False, assign=assign)
        kept = [key for key in result.missing_keys if not key.startswith("base_model.")]
        result.missing_keys[:] = kept
        if strict and (kept or result.unexpected_keys):
            raise RuntimeError(f"state_dict does not fit: missing {kept}, unexpected {result.unexpected_keys}")
        return result

    def _described(self, name: str) -> dict[str, Any]:
        adapter = self.adapters[name]
        return checkpoint.describe(name, adapter.config, self.base_model, adapter.saved_labels(self.base_model))

    def _check_frozen(self) -> None:
        """Refuse to save while parameters of the base train: a save holds adapters alone, and would lose them."""
        training = [name for name, p in self.base_model.named_parameters() if p.requires_grad]
        if training:
            more = f" and {len(training) - 5} more" if len(training) > 5 else ""
            raise ValueError(
                f"parameters of the base must be frozen, since a save holds adapters alone; {', '.join(training[:5])}"
                f"{more} train: save them with the base, then call requires_grad_(False) on them"
            )


def _check_asked(
    format: str, state_dict: Any, save_function: Callable[..., Any] | None, kwargs: Mapping[str, Any]
) -> None:
    """Refuse what `save_pretrained` takes elsewhere and does not do here."""
    unknown = sorted(set(kwargs) - set(_AS_IT_IS))
    if unknown:
        raise ValueError(f"{unknown[0]} is no argument of save_pretrained here; got {kwargs[unknown[0]]!r}")
    for name, value in kwargs.items():
        if not any(value is allowed for allowed in _AS_IT_IS[name]):
            raise ValueError(f"{name} must be left out: files are safetensors, whole and local; got {value!r}")
    if state_dict is not None and format == "peft":
        raise ValueError("state_dict must be None with format='peft', which is made by the model itself")
    owner = getattr(save_function, "__self__", None)
    if save_function is not None and not (hasattr(owner, "is_main_process") and hasattr(owner, "get_state_dict")):
        raise ValueError(
            f"save_function must be None or accelerate's accelerator.save: files are safetensors that are switched at "
            f"once; got {save_function!r}"
        )


def _given(name: str, own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors out of a state dict of the whole model.

    Raises:
        ValueError: they are not those that the adapter has.
    """
    prefix = f"adapters.{name}."
    found = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)}
    check_tensors(f"state_dict, adapter {name!r}", own, found)
    return found


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What is wrong with a folder's adapters is said with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _found(load_directory: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    if Path(load_directory).is_dir():
        return Path(load_directory)
    from ptv2_fast.saving.hub import adapter_folder

    return adapter_folder(load_directory, revision=revision, token=token)
