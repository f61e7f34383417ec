"""Pack, unpack, attend: in plain torch anywhere, by Triton's kernels on a GPU."""
