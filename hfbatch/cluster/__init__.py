"""Ray: session, resources, and the stages of a split."""
