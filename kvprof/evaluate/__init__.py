"""What a plan costs in quality: measured, against full precision and against rivals."""
