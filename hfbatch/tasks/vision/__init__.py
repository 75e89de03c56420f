"""Image and video tasks and their base classes."""
