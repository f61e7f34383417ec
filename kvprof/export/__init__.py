"""Bit plans as other tools write them: one file a tool."""
