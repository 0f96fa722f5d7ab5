"""What `examples/train.py` is made of: data, optimisation, checkpoints, model cards. The losses are the model's."""
