"""Every error a user can meet. Each message says what happened, with numbers, and what to do."""


class FinecapError(Exception):
    """Base of the family: `finecap` prints the message of these without a stack trace."""


class ConfigError(FinecapError):
    """A setting is unknown, out of range, or doesn't fit another one."""


class DataError(FinecapError):
    """Input data can't be used: unreadable, too little, or too much of it bad."""


class MismatchError(FinecapError):
    """Two artefacts (checkpoint, bag set, scorer) don't belong together."""


class UnsupportedError(FinecapError):
    """A model, version or platform that the engines can't run together."""


class StaleWeightsError(FinecapError):
    """A sampler doesn't hold the weights that captions were asked for from."""


class RewardError(FinecapError):
    """A component of the reward isn't a number."""


class DriftError(FinecapError):
    """Sampler and trainer disagree on the probability of the same tokens."""


class LostWorkerError(FinecapError):
    """A process that trained is gone."""


class DeadlineError(FinecapError):
    """A peer didn't answer in time; the message names it and what is missing."""
