"""Pictures of result JSON and of profiles."""
