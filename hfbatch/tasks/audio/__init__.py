"""Audio tasks and their base classes."""
