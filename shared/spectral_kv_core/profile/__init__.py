"""The profile: facts about a model, in one file."""
