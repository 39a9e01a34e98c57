"""What all tests share: one Ray for the whole session."""

import pytest
import ray


@pytest.fixture(scope="session")
def ray_session():
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=512 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()
