"""Weights that are published as codes and scales: one format a file, each dequantized as its own library does.

Everything is told by names, dtypes and shapes of tensors and by numbers in the config; no pattern of a config is
matched, and nothing in a checkpoint runs.
"""
