"""Seeds of captions: a pure function of (run, step, image)."""

from finecap_ray.sampling.seeds import caption_seed


def test_seeds_differ_by_run_step_and_image_and_fit_64_bits():
    seeds = {
        caption_seed(run, step, image) for run in range(3) for step in range(20) for image in ("a", "b", "1/a", "0/a")
    }
    assert len(seeds) == 3 * 20 * 4
    # The engine adds the number of the caption to it, and takes a signed 64-bit seed.
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_a_seed_is_the_same_in_every_process():
    # int(sha256(b"0/7/apple").hexdigest()[:16], 16) >> 2
    assert caption_seed(0, 7, "apple") == 2749508969753724119
