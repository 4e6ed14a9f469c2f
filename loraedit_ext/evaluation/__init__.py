"""Judging edits: procedural scenes with exact ground truth, metrics."""
