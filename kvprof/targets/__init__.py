"""Runtimes that plans are made for, a file each: what it can be told, and the writer of that."""
