"""Each picture of a report, from records: one file, one picture. Returns SVG text; knows nothing of the page."""
