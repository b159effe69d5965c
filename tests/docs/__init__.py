"""README and the pages of docs/: what they say is there, and their commands work."""
