"""Output: ledger, lock, parts, rejects and manifests. The output folder itself records which splits are done."""
