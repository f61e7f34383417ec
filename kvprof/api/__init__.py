"""The commands as functions: the same names, options and results, records instead of files and tables.

    job        which model is read, where results go, whom progress is told
    measure    norms, gradients, spectra, divergence
    plan       allocate, frontier
    quality    evaluate, calibrate, generate
    benchmark  benchmark
    exchange   import
    verify     verify
    schemas    the JSON Schemas

A public function takes a request's fields as keywords; a command has the same request from its options. Both call the
function of the name `..._as_asked`, which also tells what the command prints beside the result.

Nothing is loaded before a function of it is asked for: `kvprof.allocate(...)` never imports torch.
"""
