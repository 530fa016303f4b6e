"""The client's half: models, adapters, objectives and the local training loop."""
