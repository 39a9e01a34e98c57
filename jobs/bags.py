"""Mine the bags of look-alikes: `python jobs/bags.py --config my.yaml [overrides]`, the same as `finecap bags build`."""

import sys

from finecap_ray.cli import main

if __name__ == "__main__":
    main(["bags", "build", *sys.argv[1:]])
