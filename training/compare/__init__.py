"""`manyhats compare`: methods trained on one task under one budget, and what each costs and gives."""
