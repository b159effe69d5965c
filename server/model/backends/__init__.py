"""Compute backends: one protocol, and a folder for each that fulfils it."""
