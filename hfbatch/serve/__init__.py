"""Online predictions: the steps of a job as an HTTP endpoint on Ray Serve."""
