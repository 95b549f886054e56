"""A page about finished runs: one HTML file that needs nothing else, made of what their folders hold."""
