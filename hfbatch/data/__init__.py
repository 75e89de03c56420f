"""Input: listing, splits, reading, filters, media files. Does not import Ray or models."""
