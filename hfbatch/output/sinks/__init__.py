"""Sinks: where the rows of a job go, one file each. Parquet files are the first."""
