"""Teachers: whatever scores the rows of a rollout."""
