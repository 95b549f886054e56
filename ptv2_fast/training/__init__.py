"""Training systems around the model: data, metrics, recipes, curves and the Trainer."""
