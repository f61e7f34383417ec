"""What a plan costs in quality: measured, against full precision and against baselines."""

from kvprof.callables import make_callable

make_callable(__name__, "kvprof.api.quality")
