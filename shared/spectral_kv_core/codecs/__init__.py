"""Keys and values <-> packed codes: one file a family, one registry."""
