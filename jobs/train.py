"""Training and the export of its model, as a Ray job; submitted again, it continues where it stopped.

    ray job submit --working-dir . -- python jobs/train.py RECIPE.yaml [section.key=value ...]

On a cluster of several machines, run_dir is an absolute path on a file system that all of them mount.
"""

import sys

from longalign_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]) or main(["export", *sys.argv[1:]]))
