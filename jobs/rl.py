"""Train the captioner by self-retrieval: `python jobs/rl.py --config my.yaml [overrides]`, the same as `finecap train rl`."""

import sys

from finecap_ray.cli import main

if __name__ == "__main__":
    main(["train", "rl", *sys.argv[1:]])
