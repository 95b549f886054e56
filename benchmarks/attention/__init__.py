"""The attention of one layer behind a prompt, alone: right, how fast, and against whom."""
