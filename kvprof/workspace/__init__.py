"""Which file is which: the newest scores, a plan's own, what a report or an audit reads, files of text."""
