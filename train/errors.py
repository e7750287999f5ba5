"""What ends a run through no fault of its input."""


class TrainingError(RuntimeError):
    """Why a run cannot go on, in one line. What it had saved is whole."""
