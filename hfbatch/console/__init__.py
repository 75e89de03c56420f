"""Terminal output: text, progress, and the message when a process ends."""
