"""The courtyard's tests: what gets in, what is refused with which sentence, and what is kept."""
