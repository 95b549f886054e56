"""What a training step leaves out (padding, logits nobody labelled), and its capture in graphs that are replayed."""
