"""One training run: job, schedule, trainer, checkpoints and what is written."""
