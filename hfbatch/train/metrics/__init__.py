"""Metrics: predictions and references to figures. Knows nothing of models, files and Ray."""
