"""The command `vjepa-ac`, that finds and starts the programs, in a clone as in an installed wheel.

A command line comes in; the program that it names runs, in this process or in several. The programs themselves are
those of `examples/` and `dataset_scripts/`: a wheel has both folders in here. Nothing here imports more than Python's
own library. Open `command.py` first.
"""
