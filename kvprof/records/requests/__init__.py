"""Requests: what a command can be asked for, each option written once.

    option    how a command's help shows a field; no pydantic, so that `kvprof --help` needs none
    request   the base of all requests, and types that several of them have
    measure   spectra, gradients, divergence
    plan      allocate, frontier, import
    check     evaluate, calibrate, benchmark, generate
    share     plot

A field has its type, bounds and default, and an `Option`. From it are made the option of the command line, the check of
the Python function's keyword, the key of a recipe's table, and the JSON Schema.
"""
