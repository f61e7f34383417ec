"""How a model's attention is reached, and what a decoding query reads from a cache that obeys a plan."""
