"""One artifact: checks, validation in the engine, registration and deletion."""
