"""How good generated images are: one evaluation for any data and any model, in training and by `marval-rl evaluate`."""

from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.evaluation.features import load_extractors
from marval_rl.evaluation.references import Reference, open_reference

__all__ = ["ImageEvaluator", "Reference", "load_extractors", "open_reference"]
