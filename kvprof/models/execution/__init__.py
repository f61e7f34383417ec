"""Models that run in less memory than they take: layer by layer, their activations elsewhere, wider than stored."""
