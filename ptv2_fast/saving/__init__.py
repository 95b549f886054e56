"""Saving and loading: folders, the hub, and the formats of others."""
