"""Pictures for a paper and for a report, a module each: records in, figures out. The only importers of matplotlib."""
