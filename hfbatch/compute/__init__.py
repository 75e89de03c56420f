"""Work inside one process: batching, prediction, precision. Knows nothing of Ray."""
