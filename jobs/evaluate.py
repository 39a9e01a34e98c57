"""Evaluate on held-out bags and write the report: `python jobs/evaluate.py --config my.yaml [overrides]`, the same as `finecap evaluate`."""

import sys

from finecap_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
