"""Splits, reading, writing, the ledger. Knows nothing of models and of Ray."""
