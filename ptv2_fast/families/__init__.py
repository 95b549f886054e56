"""What differs between model families, each in one small file."""
