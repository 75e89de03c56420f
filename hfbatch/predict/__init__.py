"""A prediction job: plan, run, status, verification."""
