"""What the programs that train are made of: command line, recipes, optimisation, checkpoints, figures of a run.

A model, clips and arguments come in; checkpoints, `metrics.jsonl` and a saved model go out. The losses are the model's.
Open `examples/train.py` first.
"""
