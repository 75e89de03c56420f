"""Tasks whose rows an endpoint answers, and their base class."""
