"""What a call brings: texts, images and sounds, their masks, positions, caches and lengths."""
