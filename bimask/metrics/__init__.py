"""Clean accuracy, attack success, recovery, what is derived from them; how alike two models answer."""

from bimask.metrics.scores import (
    CleanScores,
    CleanSet,
    EvalSets,
    Scores,
    Split,
    evaluate,
    predict,
)

__all__ = ["CleanScores", "CleanSet", "EvalSets", "Scores", "Split", "evaluate", "predict"]
