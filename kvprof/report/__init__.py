"""What people see: tables, verdicts, progress."""
