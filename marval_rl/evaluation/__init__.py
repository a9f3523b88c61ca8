"""How good generated images are: pure measures on tensors, one evaluator of digits that runs them all, and large image
sets (`image_run`) with Inception's measures and rewards."""

from marval_rl.evaluation.diversity import within_class_diversity
from marval_rl.evaluation.evaluator import ImageEvaluator
from marval_rl.evaluation.frechet import frechet_distance
from marval_rl.evaluation.mode_coverage import mode_entropy

__all__ = ["ImageEvaluator", "frechet_distance", "mode_entropy", "within_class_diversity"]
