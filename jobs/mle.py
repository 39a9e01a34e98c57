"""Train the captioner on captions: `python jobs/mle.py --config my.yaml [overrides]`, the same as `finecap train mle`."""

import sys

from finecap_ray.cli import main

if __name__ == "__main__":
    main(["train", "mle", *sys.argv[1:]])
