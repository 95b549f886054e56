"""Pictures that nobody looks at: whole PNG files of the right size, with nothing drawn into them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Drawing the curves takes longer than training a tiny model. A file that looks at pictures overrides this."""
    figure = pytest.importorskip("matplotlib.figure")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "draw", lambda self, renderer: None)
        yield
