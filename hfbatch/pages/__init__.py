"""HTML reports, charts and the model card."""
