"""What differs between model families, each in one small place."""
