"""An error from a worker reaches the terminal as it was raised, whatever Ray put around it."""

import ray

from finecap_ray.errors import DataError, MismatchError
from finecap_ray.unwrap import finecap_error

MESSAGE = "3 of 40 images can't be used:\n  a.jpg: truncated"


@ray.remote(max_retries=0)
def task() -> None:
    raise DataError(MESSAGE)


@ray.remote(max_retries=0)
def task_of_a_task() -> None:
    ray.get(task.remote())


@ray.remote(max_retries=0)
def broken() -> None:
    raise KeyError("not ours")


@ray.remote
class Actor:
    def __init__(self, fits: bool) -> None:
        if not fits:
            raise MismatchError(MESSAGE)

    def method(self) -> None:
        raise DataError(MESSAGE)


def raised(call) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_an_error_of_a_worker_is_found_as_it_was_raised(ray_session):
    def ray_data_function(batch):
        raise DataError(MESSAGE)

    calls = {
        DataError: [
            lambda: ray.get(task.remote()),
            lambda: ray.get(task_of_a_task.remote()),
            lambda: ray.get(Actor.remote(fits=True).method.remote()),
            lambda: ray.data.from_items([1]).map_batches(ray_data_function).take_all(),
        ],
        MismatchError: [lambda: ray.get(Actor.remote(fits=False).method.remote())],
    }
    for kind, several in calls.items():
        for call in several:
            found = finecap_error(raised(call))
            assert (type(found), str(found)) == (kind, MESSAGE)


def test_an_unknown_error_of_a_worker_is_not_ours(ray_session):
    assert finecap_error(raised(lambda: ray.get(broken.remote()))) is None


def test_an_error_in_this_process_is_itself():
    error = DataError("plain")
    assert finecap_error(error) is error
    outer = RuntimeError("outer")
    outer.__cause__ = error
    assert finecap_error(outer) is error
    assert finecap_error(KeyError("not ours")) is None
