"""The words by which options are chosen: of the configuration, of training and of the command line.

Nothing is imported here, so that the command line's help can name them at once.
"""

from __future__ import annotations

INJECTIONS = ("deep", "shallow", "prefix")
INITS = ("text", "normal", "gated")
POOLINGS = ("first", "last", "mean")
STACKS = ("encoder", "decoder", "cross")
SCHEDULES = ("linear", "exponential")
EXPORTS = ("kv", "embeddings")
BACKENDS = ("auto", "triton", "torch", "reference")
