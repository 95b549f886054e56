"""Where a run's examples come from, as settings keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptv2_fast.training.data.read import read_examples
from ptv2_fast.training.labels import LabelSet


@dataclass(frozen=True)
class DataSource:
    """A file, a folder or a data set's name, with the columns and the split to read, as `read_examples` takes them."""

    path: str
    split: str | None = None
    text_column: tuple[str, ...] = ()
    label_column: str | tuple[str, ...] | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    format: str | None = None
    tag_scheme: str | None = None
    label_names: tuple[str, ...] = ()

    def read(
        self,
        task_type: str,
        labels: LabelSet | None = None,
        *,
        labelled: bool = True,
        problem_type: str | None = None,
    ) -> list[dict[str, Any]]:
        """The examples, checked; see `read_examples`."""
        return read_examples(
            self.path,
            task_type,
            text_column=self.text_column or None,
            label_column=self.label_column,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
            split=self.split,
            labels=labels,
            labelled=labelled,
            problem_type=problem_type,
            format=self.format,
            tag_scheme=self.tag_scheme,
            label_names=self.label_names,
        )
