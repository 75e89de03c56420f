"""Training data: feature rows, chats, tags, packing, and the held-out evaluation set."""
