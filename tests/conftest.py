"""Models in tests are tiny: more than one thread a process only makes busy machines wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import torch

torch.set_num_threads(1)
