"""Import examples: `python jobs/import.py SOURCE OUT --config my.yaml [overrides]`, the same as `finecap import`."""

import sys

from finecap_ray.cli import main

if __name__ == "__main__":
    main(["import", *sys.argv[1:]])
