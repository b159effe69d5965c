"""Tests of the room that reads calls of tools from answers."""
