"""What a run shows and writes while it goes: progress, steps and curves."""
