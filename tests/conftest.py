"""Models in tests are tiny: more than one thread a process only makes busy machines wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import signal
import sys

import pytest
import torch

torch.set_num_threads(1)
# A shell starts what runs in the background with Ctrl-C ignored, and so would be all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Programs that a test runs in this process set their own. Left behind, that of SIGTERM goes to the workers of any
    later pool, which then cannot be ended: `multiprocessing.Pool` waits for them for ever."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def device(request):
    """Each test that takes it runs on the CPU, and on a GPU where there is one; float32 is float32 on both."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # matrix products have it off
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def attention_in_bf16():
    """Skips where PyTorch's own attention fails: told by ATEN_CPU_CAPABILITY to use fewer instructions than the
    processor has, it packs bfloat16 for those that it may not use (torch 2.13, "pack_vnni2")."""
    q = torch.zeros(1, 2, 774, 16, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    except RuntimeError as error:
        pytest.skip(f"PyTorch's bf16 attention: {error}")


# For tests whose run on the CPU takes long and shows little that others do not.
SLOW_ON_THE_CPU = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=ON_A_GPU)], indirect=True
)
