"""weft: trained networks made smaller and faster by re-weaving their weights from structured matrices.

The path is survey -> allocate -> compress -> fine_tune -> measure; `squeeze` walks all of it.

Examples:
    >>> import torch, weft
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    >>> survey = weft.survey(model, [torch.randn(128, 64)])
    >>> plan = weft.allocate(survey, ["LowRank"], weft.Budget(parameters=0.5))
    >>> small, log = weft.compress(model, plan, survey)
    >>> small(torch.randn(3, 64)).shape
    torch.Size([3, 10])
"""

import importlib.metadata

# `weft.survey` and `weft.measure` are modules and functions: the modules are imported first, and the
# functions of the same name then stand before them.
from weft.layers.attention import split_attention
from weft.measure import inputs
from weft.plan.allocate import allocate
from weft.plan.budget import Budget, Price
from weft.plan.constraints import Constraints
from weft.plan.error_curves import error_curves
from weft.plan.latency import LatencyTable
from weft.plan.plan import Plan
from weft.plan.sensitivity import Sensitivity, measure_sensitivity
from weft.report.report import Report, measure
from weft.schemes.direct import compress
from weft.schemes.fine_tune import fine_tune
from weft.schemes.from_scratch import from_scratch
from weft.schemes.iterative_pruning import IterativePruning
from weft.schemes.learning_compression import LearningCompression
from weft.schemes.result import Result
from weft.schemes.search import SearchResult, search
from weft.schemes.shards import compress_shards
from weft.sources import load
from weft.squeeze import squeeze
from weft.storage import save
from weft.structures import families, from_json
from weft.survey import Survey, survey, survey_shards

__version__ = importlib.metadata.version("weft")

__all__ = [
    "Budget",
    "Constraints",
    "IterativePruning",
    "LatencyTable",
    "LearningCompression",
    "Plan",
    "Price",
    "Report",
    "Result",
    "SearchResult",
    "Sensitivity",
    "Survey",
    "allocate",
    "compress",
    "compress_shards",
    "error_curves",
    "families",
    "fine_tune",
    "from_json",
    "from_scratch",
    "inputs",
    "load",
    "measure",
    "measure_sensitivity",
    "save",
    "search",
    "split_attention",
    "squeeze",
    "survey",
    "survey_shards",
]
