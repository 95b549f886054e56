"""Machinery on a frozen model: views of it, its projections, its tokens; nothing of a single family."""
