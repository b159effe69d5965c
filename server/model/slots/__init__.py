"""Slots of compiled adapters on the device, and their layout."""
