"""Rows: files, columns, templates, tokens and batches."""
