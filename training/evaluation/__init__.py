"""Scores of a model on rows: labels, free answers, texts, forgetting and parity."""
