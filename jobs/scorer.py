"""Train the scorers: `python jobs/scorer.py --config my.yaml [overrides]`, the same as `finecap scorer train`."""

import sys

from finecap_ray.cli import main

if __name__ == "__main__":
    main(["scorer", "train", *sys.argv[1:]])
