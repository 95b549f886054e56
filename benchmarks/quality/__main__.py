"""Compare what the methods reach: `python -m benchmarks.quality --data DIR --out FILE`."""

from __future__ import annotations

from benchmarks.quality.run import main

if __name__ == "__main__":
    main()
