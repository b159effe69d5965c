"""Tests of adapters_store: what is accepted, what is refused with which message, and what is stored."""
