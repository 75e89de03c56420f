"""Fine-tuning on Ray Train. Only this package and `cluster` import ray."""
