"""An nn.ModuleDict whose modules' class a type checker knows; where the package runs it is torch's own."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping, ValuesView
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class ModuleDictOf(nn.ModuleDict, Generic[M]):
        """Modules of one class by name."""

        def __init__(self, modules: Mapping[str, M] | None = None) -> None: ...
        def __getitem__(self, key: str) -> M: ...
        def items(self) -> ItemsView[str, M]: ...
        def values(self) -> ValuesView[M]: ...

else:
    # A subclass would be another kind of container to torch.compile and to whoever looks for an nn.ModuleDict.
    ModuleDictOf = nn.ModuleDict
