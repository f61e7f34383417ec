"""From a recipe to commands, and which of them are done. No tensors, nothing is run here.

    shipped   which file a recipe's name stands for, and the recipes that come with kvprof
    words     keys as words of a command line, and what plans are called
    checks    what does not exist or go together, said before anything is measured
    steps     a recipe's commands, what each reads and writes
    done      what was done before, and whether it still holds

In a wheel the shipped recipes lie beside these files; in a checkout they are the folder recipes/ beside kvprof/.
"""
