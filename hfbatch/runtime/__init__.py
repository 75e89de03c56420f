"""Work inside one process: preprocessing, batching, prediction, isolation of bad rows. Imports no Ray."""
