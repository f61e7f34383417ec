"""The cache that obeys a plan, and the arithmetic that rounds for it."""
