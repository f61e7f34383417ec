"""How far to trust scores and plans: resampled, explained, compared, verified, held against measurements."""
