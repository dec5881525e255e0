"""What --overfit_batch proves: a model that can learn brings a single batch to a loss near zero."""

ENOUGH = 0.05  # nats per token; the check passes below this


def check(run) -> None:
    """End the command with an error on every rank if the batch was not learned. `run` is that of train.py."""
    if run.args.overfit_batch and not run.stopping and not run.loss < ENOUGH:  # or not a number
        raise run.dist.leave_with_error(
            f"one batch still has loss {run.loss:.3f} after {run.args.max_steps} steps, not {ENOUGH}: "
            "the model is broken, or needs more --max_steps, another --learning_rate or no --dropout"
        )
