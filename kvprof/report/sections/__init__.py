"""Each section of a report, from the files that were gathered: one file, one question and its answer."""
