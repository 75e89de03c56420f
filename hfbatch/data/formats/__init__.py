"""Text formats: parses CSV and JSONL to columns."""
