"""The training process: model, loop, checkpoints, evaluation, export."""
