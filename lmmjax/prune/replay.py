"""Replaying a Plan on a dense checkpoint: calibrate as it records, then drop what it says."""

from lmmjax import calibrate, data
from lmmjax.checkpoint import Checkpoint
from lmmjax.errors import InputError
from lmmjax.llava import Params
from lmmjax.plan import Plan
from lmmjax.prompt import Processor
from lmmjax.prune.transform import apply_plan, rank_model


def replay(checkpoint: Checkpoint, plan: Plan) -> Params:
    """Returns a dense checkpoint's params pruned as the plan records: its data, samples, seed and score.

    Raises:
        InputError: the plan does not fit the model, was not made by score and counts alone, or lacks its data.
    """
    if plan.made_by is not None:
        raise InputError(
            f"plan: its weights were pruned by `{plan.made_by}`; run that, and use the checkpoint it writes"
        )
    config, recipe = checkpoint.config, plan.check(checkpoint.config.text).calibration
    samples = data.disjoint(data.load(recipe.data, "train"), [recipe.samples], recipe.seed)[0]
    encoded = data.encode(Processor.load(checkpoint.path, config), samples)
    stats = calibrate.statistics(config, checkpoint.params, encoded, recipe.tokens)
    return apply_plan(config, checkpoint.params, rank_model(config, checkpoint.params, stats, plan.score), plan)
