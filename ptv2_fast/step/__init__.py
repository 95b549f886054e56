"""What a training step leaves out: padding, logits nobody labelled, work below the first prompt."""
