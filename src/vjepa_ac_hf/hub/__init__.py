"""From a training run's folder to a model repository on the Hub while it goes on (docs/training.md, "On the Hub").

`cards` writes the model card, `push` says what is to be pushed and tries again, `upload` is the program that makes one
attempt. Open `push.py` first.
"""
