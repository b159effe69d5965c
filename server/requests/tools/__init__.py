"""Calls of tools in answers: read from the text as it comes, in the format that the base or the adapter writes."""
