"""Measurements: one file, one question; each returns Scores."""
