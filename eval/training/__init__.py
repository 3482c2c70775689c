"""How the built-in model was made: `python -m eval.training.train`."""
