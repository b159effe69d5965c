"""Reports of a run while it goes on: progress, a log of its steps, and curves."""
