"""Adapters of the engine: loaded from the store, kept in memory tiers, given slots."""
