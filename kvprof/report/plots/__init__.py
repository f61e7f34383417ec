"""Pictures for a paper, a module each: records in, figures out. The only importers of matplotlib."""
