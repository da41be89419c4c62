"""Every error that longalign_ray raises on purpose; each message names place, value, rule and remedy."""


class LongAlignError(Exception):
    """Base of all errors that a user can act on; the CLI prints its message and exits with 1."""

    exit_code = 1


class ConfigError(LongAlignError):
    """The recipe or its overrides are wrong; all problems are reported together. The CLI exits with 2."""

    exit_code = 2


class CorpusError(LongAlignError):
    """The corpus is missing, empty, or holds more bad records than `corpus.max_bad_fraction` allows."""


class PackFormatError(LongAlignError):
    """A token store or a packed block does not have the layout that its reader expects."""


class DiskError(LongAlignError):
    """A file of the run cannot be written, most often because the disk is full."""


class PlanMismatchError(LongAlignError):
    """A plan does not belong to the store or checkpoint that it is used with."""


class ModelError(LongAlignError):
    """A model directory lacks what the run needs, or its attention cannot keep packed sequences apart."""


class CheckpointError(LongAlignError):
    """A checkpoint is missing, incomplete, or belongs to another plan."""


class StorageError(LongAlignError):
    """The place of the checkpoints does not answer or refuses; it may be back when the run is tried again."""


class ServingError(LongAlignError):
    """The endpoint could not be started or does not answer."""


class OverloadedError(ServingError):
    """So many requests wait already that this one was refused; it may be sent again later."""


class ReplicaLostError(ServingError):
    """The replica that computed the answer has ended; the request may be sent again."""


class AnswerTimeoutError(ServingError):
    """An answer took longer than `serve.request_timeout_seconds`."""


class EvaluationError(LongAlignError):
    """An evaluation could not be carried out; never raised for a merely bad answer of the model."""
