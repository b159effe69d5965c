"""The courtyard: what an adapter is, how it is written, where it is kept."""
