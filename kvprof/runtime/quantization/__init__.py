"""Keys and values -> codes and scales, and back: kvprof's two schemes, and other runtimes' formats."""
