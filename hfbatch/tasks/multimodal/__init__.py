"""Multimodal tasks and their base classes."""
