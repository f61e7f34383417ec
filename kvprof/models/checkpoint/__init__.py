"""Weights as they are published: safetensors, GGUF and the hub, read in parts and checked before they are read."""
