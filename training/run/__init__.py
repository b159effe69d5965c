"""Running a training job: its plan, trainer, checkpoints, and the artifact that it writes."""
