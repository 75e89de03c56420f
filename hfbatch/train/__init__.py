"""Fine-tuning on Ray Train. Beside `cluster`, the only place that imports ray."""
