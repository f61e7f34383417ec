# What `kvprof` gives, for type checkers and editors: __init__.py itself imports a name only when it is used.

from kvprof.api.measure import gradients as gradients
from kvprof.api.measure import norms as norms
from kvprof.api.measure import spectra as spectra
from kvprof.api.plan import allocate as allocate
from kvprof.api.quality import evaluate as evaluate
from kvprof.errors import KvprofError as KvprofError
from kvprof.records.evaluation import Evaluation as Evaluation
from kvprof.records.plan import BitPlan as BitPlan
from kvprof.records.scores import Scores as Scores
from kvprof.records.spectra import Spectra as Spectra
from kvprof.runtime.cache import PlanCache as PlanCache

__version__: str
