"""Arithmetic on records: from Scores and a budget to a BitPlan. No tensors."""
