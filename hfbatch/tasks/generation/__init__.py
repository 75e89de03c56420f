"""Text generation tasks and their base classes."""
