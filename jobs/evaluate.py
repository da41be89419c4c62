"""Scores of the base and the aligned model, and the report, as a Ray job.

    ray job submit --working-dir . -- python jobs/evaluate.py RECIPE.yaml [section.key=value ...]

On a cluster of several machines, run_dir is an absolute path on a file system that all of them mount.
"""

import sys

from longalign_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]) or main(["report", *sys.argv[1:]]))
