"""Metrics, computed from predictions and references. Does not import torch or Ray."""
