"""Models in tests are tiny: more than one thread a process only makes busy machines wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def train_program():
    """`examples/train.py` as a module."""
    from helpers_training import load_program  # takes seconds, which tests of small things need not wait for

    return load_program()


@pytest.fixture
def train_here(train_program, monkeypatch):
    """Run examples/train.py with these arguments (the program's name first) in this process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def main(arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", arguments)
        train_program.main()

    main.program = train_program
    return main
