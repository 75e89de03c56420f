"""What recipes share; each file one thing."""
