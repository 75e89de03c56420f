"""What several tasks share: bases to subclass, and the work on tokens, pictures and sound."""
