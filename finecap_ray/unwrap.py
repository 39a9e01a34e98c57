"""The error that a person should read, out of what Ray wrapped around it on the way from a worker.

Ray hands on a task's or actor method's error as `cause`, a constructor's inside the arguments of ActorDiedError, and that
of a Ray Data function as text alone: UserCodeException loses its `__cause__` when it is pickled.
"""

from __future__ import annotations

import re

from finecap_ray import errors
from finecap_ray.errors import FinecapError

_RAY_DATA_WRAPPER = "UserCodeException"
# A line of a traceback that ends it, with what follows up to the next traceback of a chain.
_IN_TRACEBACK = re.compile(
    rf"^{re.escape(errors.__name__)}\.(\w+): (.*?)(?=\n\n(?:The above exception|During handling)|\Z)",
    re.DOTALL | re.MULTILINE,
)


def finecap_error(error: BaseException) -> FinecapError | None:
    """The FinecapError that `error` is or was raised for, as it was raised; None where there is none."""
    cause = getattr(error, "cause", None)
    # RayTaskError(DataError) is a DataError too, whose text is a stack trace: what it carries comes first.
    if isinstance(cause, BaseException):
        if type(cause).__name__ == _RAY_DATA_WRAPPER:
            return _from_text(str(error))
        return finecap_error(cause)
    if isinstance(error, FinecapError):
        return error
    inner = [*(part for part in error.args if isinstance(part, BaseException)), error.__cause__]
    return next((found for part in inner if part is not None and (found := finecap_error(part))), None)


def _from_text(text: str) -> FinecapError | None:
    for name, message in _IN_TRACEBACK.findall(text):
        kind = vars(errors).get(name)
        if isinstance(kind, type) and issubclass(kind, FinecapError):
            return kind(message.rstrip())
    return None
