"""Specs, which users write as YAML, flags or Python. Validates their structure; opens no data."""
