"""Two tasks on one frozen encoder, from nothing to predictions in a few minutes on a laptop: `make demo`."""
