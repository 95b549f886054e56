"""The Triton kernels, importable as `ptv2_fast.kernels.<file>`.

In a checkout the files live in the folder `kernels/` at the root; an installed wheel carries them
here.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "kernels"))
