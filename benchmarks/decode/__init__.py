"""Generation behind a prompt."""
