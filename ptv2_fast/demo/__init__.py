"""The demo: two tasks, two small prompts, one frozen encoder."""
