"""Text tasks and their base classes."""
