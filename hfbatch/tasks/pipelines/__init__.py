"""The adapter that runs tasks with transformers pipelines."""
