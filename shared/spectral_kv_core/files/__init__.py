"""Files with a checksum, and where files are kept."""
