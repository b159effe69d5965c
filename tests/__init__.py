"""The suite: one folder a room, mirrored; `kit` is what tests share, `benchmarks` what is measured."""
