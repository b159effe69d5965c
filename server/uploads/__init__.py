"""Take artifacts in, keep them, delete them: validation, registration, retention."""
