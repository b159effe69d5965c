"""Many jobs at once over one resident base: `manyhats train --jobs`."""
