"""How fast a plan's cache decodes on this machine, beside caches in full precision."""
