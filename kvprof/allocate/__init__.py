"""From Scores and a budget to a BitPlan: arithmetic on records, no tensors. `dispatch` finds the method of a request.

The package itself can be called: `kvprof.allocate(scores, 2.5)` is `kvprof.api.plan.allocate`.
"""

from kvprof.callables import make_callable

make_callable(__name__, "kvprof.api.plan")
