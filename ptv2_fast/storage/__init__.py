"""What stands on the disk: files that are switched together, tensors with a checksum, names that folders can have."""
