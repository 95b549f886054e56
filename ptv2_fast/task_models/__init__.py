"""The model classes of the tasks."""
