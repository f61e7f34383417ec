"""The commands as functions: the same names, options and results, records instead of files and tables.

    given     what callers give: a model in any form, a folder or none, several texts or one
    measure   norms, gradients, spectra
    plan      allocate
    quality   evaluate

Nothing is loaded before a function of it is asked for: `kvprof.allocate(...)` never imports torch.
"""
