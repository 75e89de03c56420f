"""Every task with a tiny model, rows, and transformers' own answers."""
