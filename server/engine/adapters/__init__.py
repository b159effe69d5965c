"""The engine's adapters: loaded from the store, held in host memory and in slots under byte budgets."""
