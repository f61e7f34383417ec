"""Files on their way to the disk: folders, atomic writes, journals, locks. Knows nothing of what is in them."""
